"""JSON schemas of tools: what a Python function takes, and whether a call fits.

schema = schema_of(search_hotels)                  # from the signature and the docstring
problems = check(Call("search_hotels", {"rating_range_lower": "4"}), [schema])
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from typing import Any

from weitiao.data.rows import Call
from weitiao.errors import InputError, t

DEEPEST_SCHEMA = 32  # a schema that refers to itself is followed no further than this


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema inside the OpenAI wrapping, or the schema itself."""
    return tool["function"] if isinstance(tool.get("function"), Mapping) else tool


def wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema in the OpenAI wrapping, which chat templates expect."""
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}


def check(call: Call, tools: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every way in which ``call`` does not fit the JSON schema of its tool; empty when it fits.

    Looked at: the tool's name, required and unknown arguments, type, nullable, enum, const, anyOf, oneOf, allOf, $ref
    within the schema, items and their number, additionalProperties, ranges of numbers, lengths and patterns of strings.
    An argument that the schema does not list is wrong unless it allows ``additionalProperties`` in so many words: to a
    function that is called, it is a mistake.
    """
    functions = {function_of(tool)["name"]: function_of(tool) for tool in tools}
    if call.name not in functions:
        return [_unknown(t("no tool {name}", name=call.name), call.name, list(functions))]
    schema = functions[call.name].get("parameters") or {}
    return _Checker(schema).object(dict(call.arguments), schema, call.name, strict=True)


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    nearest = get_close_matches(name, known, n=1)
    if nearest:
        what = t("{what}; did you mean {nearest}?", what=what, nearest=nearest[0])
    return f"{what} ({', '.join(known)})" if known else what


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    kinds: dict[str, bool] = {
        "string": isinstance(value, str),
        "number": number,
        "integer": number and (isinstance(value, int) or value.is_integer()),
        "boolean": isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, Mapping),
        "null": value is None,
    }
    return kinds.get(kind, True)


class _Checker:
    """Checks values against the parts of one schema; ``path`` names the value in messages."""

    def __init__(self, root: Mapping[str, Any]):
        self.root = root

    def value(self, value: Any, schema: Any, path: str, depth: int = 0) -> list[str]:
        """Every problem of ``value``."""
        if schema is False:
            return [t("{path}: not allowed", path=path)]
        if not isinstance(schema, Mapping) or depth > DEEPEST_SCHEMA:
            return []
        if value is None and schema.get("nullable"):
            return []
        if "$ref" in schema:
            return self.value(value, self._resolve(schema["$ref"]), path, depth + 1)
        found = self._choices(value, schema, path, depth)
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(_is(value, kind) for kind in kinds):
            message = "{path}: {value} is not of type {kinds}"
            return [*found, t(message, path=path, value=_dump(value), kinds=" | ".join(kinds))]
        if isinstance(value, Mapping):
            found += self.object(value, schema, path, depth=depth)
        elif isinstance(value, list):
            found += self._array(value, schema, path, depth)
        elif isinstance(value, str):
            found += self._string(value, schema, path)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found += self._number(value, schema, path)
        return found

    def object(
        self, value: Mapping[str, Any], schema: Mapping[str, Any], path: str, depth: int = 0, strict: bool = False
    ) -> list[str]:
        """Every problem of an object; ``strict``: an unlisted key is wrong unless allowed in so many words."""
        properties = schema.get("properties") or {}
        more = schema.get("additionalProperties", not strict)
        found = [
            t("{path}: {name} is missing", path=path, name=name)
            for name in schema.get("required") or []
            if name not in value
        ]
        for name, item in value.items():
            if name in properties:
                found += self.value(item, properties[name], f"{path}.{name}", depth + 1)
            elif more is False:
                found.append(_unknown(t("{path}: no argument {name}", path=path, name=name), name, list(properties)))
            else:
                found += self.value(item, more, f"{path}.{name}", depth + 1)
        return found

    def _choices(self, value: Any, schema: Mapping[str, Any], path: str, depth: int) -> list[str]:
        found = []
        if "enum" in schema and not any(_equal(value, choice) for choice in schema["enum"]):
            choices = ", ".join(map(_dump, schema["enum"]))
            found.append(t("{path}: {value} is not one of {choices}", path=path, value=_dump(value), choices=choices))
        if "const" in schema and not _equal(value, schema["const"]):
            message = "{path}: {value} is not {constant}"
            found.append(t(message, path=path, value=_dump(value), constant=_dump(schema["const"])))
        for part in schema.get("allOf") or []:
            found += self.value(value, part, path, depth + 1)
        for key in ("anyOf", "oneOf"):
            if options := schema.get(key):
                tried = [(self.value(value, option, path, depth + 1), self._fits(value, option)) for option in options]
                found += min(tried, key=lambda one: (bool(one[0]) and not one[1], len(one[0])))[0]
        return found

    def _fits(self, value: Any, schema: Any) -> bool:
        """Whether ``value`` is at least of the type meant, so that its problems are the ones to name."""
        for _ in range(DEEPEST_SCHEMA):
            schema = self._resolve(schema["$ref"]) if isinstance(schema, Mapping) and "$ref" in schema else schema
        kinds = schema.get("type", []) if isinstance(schema, Mapping) else []
        return any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds))

    def _array(self, value: list[Any], schema: Mapping[str, Any], path: str, depth: int) -> list[str]:
        first = schema.get("prefixItems") or []
        found = []
        for index, item in enumerate(value):
            part = first[index] if index < len(first) else schema.get("items", True)
            found += self.value(item, part, f"{path}[{index}]", depth + 1)
        found += _between(len(value), schema, "minItems", "maxItems", t("{path}: number of elements", path=path))
        if schema.get("uniqueItems") and len({json.dumps(item, sort_keys=True) for item in value}) < len(value):
            found.append(t("{path}: an element occurs twice", path=path))
        return found

    def _string(self, value: str, schema: Mapping[str, Any], path: str) -> list[str]:
        found = _between(len(value), schema, "minLength", "maxLength", t("{path}: length", path=path))
        try:
            matches = re.search(schema.get("pattern", ""), value)
        except re.error as error:
            wrong = "{path}: the schema's pattern {pattern} cannot be read: {reason}"
            raise InputError(t(wrong, path=path, pattern=schema["pattern"], reason=error)) from None
        if not matches:
            message = "{path}: {value} does not match {pattern}"
            found.append(t(message, path=path, value=_dump(value), pattern=schema["pattern"]))
        return found

    def _number(self, value: float, schema: Mapping[str, Any], path: str) -> list[str]:
        found = _between(value, schema, "minimum", "maximum", path)
        low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        if low is not None and value <= low:
            found.append(t("{path}: {value} is not above {limit}", path=path, value=value, limit=low))
        if high is not None and value >= high:
            found.append(t("{path}: {value} is not below {limit}", path=path, value=value, limit=high))
        step = schema.get("multipleOf")
        if step and not _is_multiple(value, step):
            found.append(t("{path}: {value} is not a multiple of {step}", path=path, value=value, step=step))
        return found

    def _resolve(self, reference: str) -> Any:
        """The part of the schema that ``#/a/b`` names; anything goes where it names nothing."""
        part: Any = self.root
        for key in reference.removeprefix("#").strip("/").split("/"):
            part = part.get(key, {}) if key and isinstance(part, Mapping) else part
        return part if reference.startswith("#") else {}


def _is_multiple(value: float, step: float) -> bool:
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    try:
        return abs(value / step - round(value / step)) < 1e-9
    except OverflowError:  # beyond the numbers a float can tell apart
        return True


def _equal(value: Any, other: Any) -> bool:
    """JSON equality: true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _between(value: float, schema: Mapping[str, Any], least: str, most: str, path: str) -> list[str]:
    found = []
    if least in schema and value < schema[least]:
        found.append(t("{path}: {value} is below {limit}", path=path, value=value, limit=schema[least]))
    if most in schema and value > schema[most]:
        found.append(t("{path}: {value} is above {limit}", path=path, value=value, limit=schema[most]))
    return found


# --- the schema of a function -------------------------------------------------------------------------------------

_SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    type(None): {"type": "null"},
    Any: {},
    inspect.Parameter.empty: {},
}


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, in the OpenAI wrapping: types from the annotations, descriptions from the
    docstring (its first paragraph; arguments as in Google's style, ``Args:`` or ``参数：``, or as ``:param name:``).

    ``X | None`` also takes null, ``Literal`` and ``Enum`` become enum, ``Annotated[X, "words"]`` describes an argument.
    InputError for an annotation that has no JSON type, and for ``*args``.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    summary, described = _docstring(function)
    properties: dict[str, Any] = {}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    required = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            schema["additionalProperties"] = True
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            message = "{function}: {name} cannot be given by name, as tool calls do"
            raise InputError(t(message, function=function.__name__, name=name))
        properties[name] = _type_schema(hints.get(name, parameter.empty), f"{function.__name__}: {name}")
        if name in described:
            properties[name].setdefault("description", described[name])
        if parameter.default is parameter.empty:
            required.append(name)
    schema["required"] = required
    return {
        "type": "function",
        "function": {"name": function.__name__, "description": summary, "parameters": schema},
    }


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    """The schema of one annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        words = [note for note in arguments[1:] if isinstance(note, str)]
        return _type_schema(arguments[0], where) | ({"description": words[0]} if words else {})
    if origin is typing.Literal:
        return _enum(list(arguments))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum([member.value for member in hint])
    if origin in (typing.Union, types.UnionType):
        return _union([_type_schema(argument, where) for argument in arguments])
    if origin in (list, set, frozenset, Sequence, Iterable) or (origin is tuple and arguments[1:] == (...,)):
        return {"type": "array", "items": _type_schema(arguments[0], where)}
    if origin is tuple:
        parts = [_type_schema(argument, where) for argument in arguments]
        return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _type_schema(arguments[1], where)}
    try:
        return dict(_SIMPLE[hint])
    except (KeyError, TypeError):
        raise InputError(t("{where}: no JSON type for {hint}", where=where, hint=hint)) from None


def _enum(values: list[Any]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(_SIMPLE[type(value)]["type"] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several types as one ``type`` list where nothing but types is said; X | None keeps what is said of X."""
    others = [part for part in parts if part != {"type": "null"}]
    if len(others) == 1 and isinstance(others[0].get("type"), str):
        enum = {"enum": [*others[0]["enum"], None]} if "enum" in others[0] else {}
        return others[0] | {"type": [others[0]["type"], "null"]} | enum
    if all(set(part) == {"type"} and isinstance(part["type"], str) for part in parts):
        return {"type": [part["type"] for part in parts]}
    return {"anyOf": parts}


_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|参数)\s*[:：]\s*$")
_END_OF_SECTION = re.compile(r"^\s*(Returns?|Raises|Yields|Examples?|Notes?|返回值?|异常|示例)\s*[:：]")
_ARGUMENT = re.compile(r"^(\s*)(\w+)\s*(?:\([^)]*\))?\s*[:：]\s*(.*)$")
_PARAM = re.compile(r"^\s*:param\s+(?:\S+\s+)?(\w+)\s*:\s*(.*)$")


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The summary paragraph and what is said of each argument."""
    text = inspect.getdoc(function) or ""
    summary = re.split(r"\n\s*\n|\n(?=\s*(?::param|Args:|Arguments:|Parameters:|参数[:：]))", text, maxsplit=1)[0]
    described: dict[str, str] = {}
    current, indent, inside = None, None, False
    for line in text.splitlines():
        if _SECTION.match(line):
            inside, current, indent = True, None, None
        elif match := _PARAM.match(line):
            current, described[match[1]] = match[1], match[2].strip()
        elif inside and _END_OF_SECTION.match(line):
            inside, current = False, None
        elif inside and (match := _ARGUMENT.match(line)) and indent in (None, len(match[1])):
            indent, current = len(match[1]), match[2]
            described[current] = match[3].strip()
        elif not line.strip() or line.lstrip().startswith(":"):
            current = None
        elif current is not None:
            described[current] = f"{described[current]} {line.strip()}".strip()
    return " ".join(summary.split()), described
