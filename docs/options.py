"""Write the reference of recipe options, docs/en/options.md and docs/zh/options.md, from the options themselves.

    python docs/options.py

Names, types, defaults and the English text come from the options classes; the Chinese text is docs/zh/options.yaml.
A test runs `pages` and compares, so the reference cannot go stale.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from weitiao.config import Options
from weitiao.data.sources import DataOptions
from weitiao.evaluate.tasks import EvaluateOptions
from weitiao.methods import METHODS
from weitiao.models.load import ModelOptions
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import TaskOptions

DOCS = Path(__file__).parent
SECTIONS: dict[str, type[Options]] = {
    "model": ModelOptions,
    **{f"method ({name})": method for name, method in METHODS.items()},
    "data": DataOptions,
    "task": TaskOptions,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
}
WORDS = {
    "en": {
        "title": "# Options of a recipe",
        "intro": "Every option has a default unless it says *required*; `data.train` (or `data.folder`) and `output` "
        "are enough for a run. On the command line an option is `section.option=value`. This page is written by "
        "`docs/options.py`.",
        "head": ["option", "type", "default", "meaning"],
        "required": "*required*",
        "rest": "## `output`, `stages`\n\n`output` is the run folder. `stages` is a list of partial recipes that are "
        "run in order, each with a `name` and starting from the former's result; the sections above are their "
        "defaults.",
    },
    "zh": {
        "title": "# 配方的选项",
        "intro": "除了写明*必填*的，每个选项都有默认值；给出 `data.train`（或 `data.folder`）和 `output` 就能运行。"
        "在命令行上写作 `节.选项=值`。本页由 `docs/options.py` 生成。",
        "head": ["选项", "类型", "默认", "含义"],
        "required": "*必填*",
        "rest": "## `output`、`stages`\n\n`output` 是运行文件夹。`stages` 是按顺序执行的若干份不完整的配方，"
        "每份有一个 `name`，从上一份的结果出发；上面各节是它们的默认值。",
    },
}


def pages() -> dict[str, str]:
    """The page of each language."""
    chinese = yaml.safe_load((DOCS / "zh" / "options.yaml").read_text(encoding="utf-8"))
    return {language: page(language, chinese) for language in WORDS}


def page(language: str, chinese: dict[str, str]) -> str:
    """One page: a table for each section."""
    words = WORDS[language]
    parts = [words["title"], words["intro"]]
    for section, options in SECTIONS.items():
        rows = [words["head"], ["---"] * 4]
        for key, values, default, meaning in fields(section, options):
            name = f"{section.split()[0]}.{key.partition('.')[2]}"
            told = meaning if language == "en" else cell(chinese[key])
            rows.append([f"`{name}`", values, default or words["required"], told])
        parts.append(f"## `{section}`\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join([*parts, words["rest"]]) + "\n"


def fields(section: str, options: type[Options]) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default or "" where there is none, meaning); a method's keys begin with the method's name."""
    prefix = section.split(" (")[-1].rstrip(")")
    for name, field in options.model_fields.items():
        default = plain(field.get_default(call_default_factory=True))
        shown = "" if field.is_required() else f"`{json.dumps(default, ensure_ascii=False)}`"
        yield f"{prefix}.{name}", kind(field.annotation), shown, cell(field.description or "")


def plain(value: Any) -> Any:
    """A default as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def kind(annotation: Any) -> str:
    """A type in the words of YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return ", ".join(dict.fromkeys(kind(argument) for argument in arguments))
    if origin in (list, tuple):
        return "list"
    if origin is Annotated:
        return kind(arguments[0])
    names = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", type(None): "`null`"}
    return names.get(annotation, "mapping")


def cell(text: str) -> str:
    """Text that cannot end a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    for language, text in pages().items():
        (DOCS / language / "options.md").write_text(text, encoding="utf-8")
