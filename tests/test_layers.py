"""The one total order of rooms: a room imports only rooms to its left, imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import weitiao

ORDER = """
errors < config < machine < runs < weights < models < data < methods < generate < train < evaluate < rl < compress
< export < serve < plan < recipe < sweep < demo < bench < studio < cli
"""
ROOMS = ORDER.split()[::2]
PACKAGE = Path(weitiao.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
UNPICKLING = ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.jit.load", "joblib.load")
HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib"}


def imported(tree: ast.AST, inside: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import; ``from weitiao import runs`` names ``weitiao.runs``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{inside}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_to_its_left(file: Path):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    assert room in ROOMS, f"{room} has no place in the order"
    for line, name in imported(ast.parse(file.read_text(encoding="utf-8")), file.name):
        parts = name.split(".")
        if parts[0] != "weitiao" or parts[1] in ("__version__", room):
            continue
        assert parts[1] in ROOMS, f"{file}:{line}: {name}"
        assert ROOMS.index(parts[1]) < ROOMS.index(room), f"{file}:{line}: {room} imports {parts[1]}, to its right"


@pytest.mark.parametrize("name", ["cli.py", "errors.py", "config.py", "runs.py", "machine/__init__.py", "__init__.py"])
def test_what_the_command_line_starts_with_is_light(name: str):
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {name.split(".")[0] for _, name in imported(top, name)} & HEAVY


def test_only_models_load_calls_from_pretrained_of_a_model():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config"):
                owner = ast.unparse(node.value)
                assert file == PACKAGE / "models" / "load.py" or "AutoModel" not in owner, f"{file}:{node.lineno}"


def test_no_code_from_a_model_folder_is_ever_run():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{file}: trust_remote_code"
            if isinstance(node, ast.Attribute) and ast.unparse(node) in UNPICKLING:
                raise AssertionError(f"{file}:{node.lineno}: pickle")
