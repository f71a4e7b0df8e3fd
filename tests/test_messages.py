"""Messages exist in two languages: what is given to ``t``, ``say`` or ``Refused`` is in the table, with its slots."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

import weitiao
from weitiao import cli, config
from weitiao.errors import chinese, t

PACKAGE = Path(weitiao.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def literals(function: ast.AST) -> Iterator[tuple[int, str]]:
    """Messages of calls inside ``function``, given as a literal, by a choice of two, or through a local name."""
    named: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named.setdefault(node.targets[0].id, []).append(node.value)
    for node in ast.walk(function):
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        if isinstance(node, ast.Call) and called in ("t", "say", "Refused") and node.args:
            first = node.args[0]
            for given in named.get(first.id, []) if isinstance(first, ast.Name) else [first]:
                for choice in (given.body, given.orelse) if isinstance(given, ast.IfExp) else (given,):
                    if isinstance(choice, ast.Constant) and isinstance(choice.value, str) and choice.value:
                        yield node.lineno, choice.value


def messages() -> dict[str, str]:
    """Every message of the package and where it is said first."""
    found = {}
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]
        for line, text in (item for scope in scopes for item in literals(scope)):
            found.setdefault(text, f"{file.relative_to(PACKAGE)}:{line}")
    tables = (
        [config.COMMAND_LINE],
        [verb.help for verb in cli.VERBS],
        cli.HELP_WORDS,
        config._EXPECTED.values(),
        (said for _, said in config._RANGE.values()),
    )
    return found | {text: "a table" for table in tables for text in table}


def slots(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_message_has_its_chinese():
    table = chinese()
    missing = [f"{where}: {text}" for text, where in messages().items() if text not in table]
    assert not missing, "\n".join(missing)


def test_translations_fill_the_same_slots_and_none_is_left_over():
    table = chinese()
    assert not [text for text, translated in table.items() if slots(text) != slots(translated)]
    written = {
        node.value
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not sorted(set(table) - written)


def test_the_language_follows_the_locale(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert t("is required") == "必须给出"
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    assert t("is required") == "is required"


def test_what_is_counted_once_is_singular(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    message = "{path}: {count} bad rows left out, {rows} kept"
    assert t(message, path="2 rows", count=1, rows=1) == "2 rows: 1 bad row left out, 1 kept"
    assert t(message, path="x", count=11, rows=1) == "x: 11 bad rows left out, 1 kept"
    assert t("{rows} conversations in {rows} filesystems", rows="1") == "1 conversation in 1 filesystems"
    assert t("{count} steps, {bad} of {all} rows are bad", count="1", bad=1, all=1) == "1 step, 1 of 1 rows are bad"
