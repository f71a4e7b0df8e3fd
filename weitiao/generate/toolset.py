"""Toolsets: functions a model may call, with their JSON schemas, and the ``tools.json`` that names a run's own.

    save_toolset(folder, schemas, toolset="hotel", arguments={"seed": 0})       # beside the adapter, when training
    tools = find_toolset("runs/hotel-demo", builders={"hotel": hotel_tools})    # when talking to the run

A file names a toolset and never holds code: the functions come from ``builders``, which the caller passes in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weitiao.data.render import Renderer
from weitiao.data.tools import function_of, schema_of
from weitiao.errors import InputError, redact, say, t
from weitiao.runs import is_run, write_atomic

FILE = "tools.json"
MOST = 32  # functions that a conversation can still list; rows that bring more have none in common
Functions = Mapping[str, Callable[..., Any]]
Builder = Callable[..., Functions]


@dataclass(frozen=True)
class Toolset:
    """Schemas of what may be called, and the functions behind those that can be executed here."""

    functions: Functions = field(default_factory=dict)
    schemas: tuple[Mapping[str, Any], ...] = ()


def save_toolset(
    folder: str | Path,
    schemas: Sequence[Mapping[str, Any]],
    toolset: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write ``tools.json`` into ``folder``: the schemas, and which builder with which arguments makes the functions.

    Nothing is written for no schemas at all; nor, said aloud, for more than a conversation could list.
    """
    if len(schemas) > MOST:
        message = (
            "{count} functions in the rows are more than a conversation can list ({most}); weitiao chat is given none"
        )
        say(message, count=len(schemas), most=MOST)
    if not 0 < len(schemas) <= MOST:
        return
    content = {"toolset": toolset, "arguments": dict(arguments or {}), "schemas": [dict(schema) for schema in schemas]}
    write_atomic(Path(folder) / FILE, redact(json.dumps(content, ensure_ascii=False, indent=1)) + "\n")


def find_toolset(model: str | Path, builders: Mapping[str, Builder]) -> Toolset:
    """The toolset recorded with a run, an adapter or a model folder; an empty one where nothing is recorded."""
    folder = Path(model)
    places = [folder, folder / "adapter", folder / "model"] if folder.is_dir() else []
    if is_run(folder.parent):
        places.append(folder.parent)
    for place in places:
        if (place / FILE).is_file():
            return read_toolset(place / FILE, builders)
    return Toolset()


def named_toolset(name: str, builders: Mapping[str, Builder]) -> Toolset:
    """What ``--tools`` means: a builder's name, or a JSON file of schemas (or a ``tools.json``)."""
    if name in builders:
        functions = builders[name]()
        return Toolset(functions, tuple(schema_of(function) for function in functions.values()))
    if not Path(name).is_file():
        known = ", ".join(builders) or "-"
        raise InputError(t("no such tools: {name}; a JSON file of schemas, or one of: {known}", name=name, known=known))
    return read_toolset(Path(name), builders)


def read_toolset(path: Path, builders: Mapping[str, Builder]) -> Toolset:
    """The toolset of a file: a list of schemas, or an object with ``schemas`` and perhaps a toolset with arguments."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(t("{path}: not JSON: {problem}", path=path, problem=error)) from None
    content = {"schemas": content} if isinstance(content, list) else content
    schemas = content.get("schemas") if isinstance(content, dict) else None
    if not isinstance(schemas, list) or not all(map(_is_schema, schemas)):
        raise InputError(t("{path}: expected a list of tool schemas, each with a name", path=path))
    name, functions = content.get("toolset"), {}
    if isinstance(name, str) and name in builders:
        functions = builders[name](**(content.get("arguments") or {}))
    elif name:
        say("{path}: no toolset {name} here; calls are shown, not executed", path=path, name=name)
    return Toolset(functions, tuple(schemas))


def able(renderer: Renderer, tools: bool) -> Renderer:
    """``renderer``, or where ``tools`` are needed and its template cannot write them, the fallback, which is said."""
    if not tools or renderer.can_call:
        return renderer
    other = Renderer.of(renderer.tokenizer, tools=True)
    for line in other.said:
        say("{line}", line=line)
    return other


def _is_schema(schema: Any) -> bool:
    return isinstance(schema, dict) and isinstance(function_of(schema).get("name"), str)
