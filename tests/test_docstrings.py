"""Every module, public class, public function and public method says what it is; every option says what it does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import weitiao

PACKAGE = Path(weitiao.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def undocumented(node: ast.Module | ast.ClassDef, path: str) -> Iterator[str]:
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not inner.name.startswith("_"):
            name = f"{path}:{inner.lineno}: {inner.name}"
            if not ast.get_docstring(inner) and not overrides(inner, node):
                yield name
            if isinstance(inner, ast.ClassDef):
                yield from undocumented(inner, path)


def overrides(function: ast.AST, owner: ast.Module | ast.ClassDef) -> bool:
    """A method of a subclass may inherit its docstring from the method it overrides (``Method.attach``)."""
    return isinstance(function, ast.FunctionDef) and isinstance(owner, ast.ClassDef) and bool(owner.bases)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_public_names_are_documented(file: Path):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), f"{file}: no module docstring"
    assert not list(undocumented(tree, file.name))


def test_every_option_is_described_where_it_is_declared():
    from weitiao.recipe import Recipe

    seen = set()

    def walk(schema: dict, definitions: dict, path: str) -> Iterator[str]:
        for name, option in schema.get("properties", {}).items():
            if name != "name" and not option.get("description") and "$ref" not in str(option):
                yield f"{path}{name}"
        for name, definition in definitions.items():
            if name not in seen:
                seen.add(name)
                yield from walk(definition, {}, f"{name}.")

    schema = Recipe.model_json_schema()
    assert not list(walk(schema, schema["$defs"], ""))
