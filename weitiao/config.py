"""Options: YAML or a dict plus ``key=value`` become frozen, strict, typed models; every problem is reported at once,
as ``FILE:LINE: key: ...``, since a tree remembers where each value came from.

    tree = read("recipes/hotel-lora.yaml", ["train.epochs=1", "train.learning_rate=1e-4"])
    recipe = build(Recipe, tree)        # one InputError names every unknown key, wrong type and value out of range
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from weitiao.errors import InputError, t

COMMAND_LINE = "command line"
MOST_VALUES = 20_000  # of a recipe


class Options(BaseModel):
    """Base of every options class: frozen, no unknown keys, ``"1e-4"`` is a number, a bool is not."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name:
            kinds = set(_leaves(cls.model_fields[info.field_name].annotation))
            if kinds & {int, float} and not kinds & {bool, Any}:
                raise PydanticCustomError("float_type" if float in kinds else "int_type", "a number, not a bool")
        return value


OptionsT = TypeVar("OptionsT", bound=BaseModel)


@dataclass(frozen=True)
class Tree:
    """Plain nested values and, for each dotted key, where it came from (``FILE:LINE`` or ``command line``)."""

    values: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)
    source: str = ""

    def given(self, key: str) -> str | None:
        """Where ``key`` or what holds it was given, or None for a default."""
        if key in self.origins:
            return self.origins[key]
        return next((COMMAND_LINE for above in _above(key) if self.origins.get(above) == COMMAND_LINE), None)

    def origin(self, key: str) -> str:
        """Where a problem with ``key`` is to be mended: its own origin, its nearest given parent's, or the file."""
        return next((self.origins[above] for above in (key, *_above(key)) if above in self.origins), self.source)


def _above(key: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b``, ``a``."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``1e-4`` is a number; ``yes``, dates, ``1:30`` and ``007`` are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)


for _tag, _pattern in {
    "null": r"^(~|null|Null|NULL|)$",
    "bool": r"^(true|True|TRUE|false|False|FALSE)$",
    "int": r"^[-+]?(0|[1-9][0-9]*)$",
    "float": r"^([-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)


def read(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Tree:
    """A YAML file (or a mapping) with ``a.b=c`` overrides laid on top; InputError if either is malformed."""
    tree = Tree(json_like(source)) if isinstance(source, Mapping) else parse(_text(Path(source)), str(Path(source)))
    problems = []
    for override in overrides:
        try:
            _override(tree, override)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return tree


def parse(text: str, name: str) -> Tree:
    """The tree of YAML ``text``; ``name`` stands for the file in messages."""
    loader = _Loader(text)
    try:
        node, origins = loader.get_single_node(), {}
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise InputError(t("{file}: expected sections such as model: and data:, found no mapping", file=name))
        return Tree(_construct(loader, node, "", origins, name, ()) if node else {}, origins, name)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a tag that the scalar does not fit
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        problem = t("nested too deeply") if isinstance(error, RecursionError) else problem
        message = "{file}:{line}: not valid YAML: {problem}"
        raise InputError(t(message, file=name, line=mark.line + 1 if mark else 1, problem=problem)) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(t("{path}: no such file", path=path)) from None
    except UnicodeDecodeError as error:
        raise InputError(t("{path}: not UTF-8 at byte {byte}", path=path, byte=error.start)) from None
    except OSError as error:
        raise InputError(t("{path}: cannot be read: {reason}", path=path, reason=error.strerror)) from None


def _construct(
    loader: _Loader, node: yaml.Node, key: str, origins: dict[str, str], name: str, above: tuple[yaml.Node, ...]
) -> Any:
    """The value of a YAML node; ``origins`` gains the line of every key under it."""
    at: dict[str, Any] = {"file": name, "line": node.start_mark.line + 1, "key": key}
    if any(node is parent for parent in above):
        raise InputError(t("{file}:{line}: {key}: an anchor that contains itself", **at))
    if len(origins) > MOST_VALUES:  # anchors in anchors double with every line
        raise InputError(t("{file}:{line}: {key}: more than {most} values", most=MOST_VALUES, **at))
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            word, line = str(key_node.value), key_node.start_mark.line + 1
            inner = f"{key}.{word}" if key else word
            if word in values:
                raise InputError(t("{file}:{line}: {key}: given twice", file=name, line=line, key=inner))
            origins[inner] = f"{name}:{line}"
            values[word] = _construct(loader, value_node, inner, origins, name, above)
        return values
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            origins[f"{key}.{index}"] = f"{name}:{item.start_mark.line + 1}"
            items.append(_construct(loader, item, f"{key}.{index}", origins, name, above))
        return items
    return loader.construct_object(node, deep=True)


def _override(tree: Tree, override: str) -> None:
    """Lay one ``a.b=c`` over the tree; list elements are reached by their number (``stages.0.train.epochs=1``)."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(t("command line: expected key=value, found {found}", found=_shown(override)))
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    place: Any = tree.values
    *parents, last = key.split(".")
    for word in parents:
        place = _step(place, word, key)
    place[_index(place, last, key) if isinstance(place, list) else last] = value
    for inner in [inner for inner in tree.origins if inner.startswith(key + ".")]:
        del tree.origins[inner]
    tree.origins[key] = COMMAND_LINE


def _step(place: Any, word: str, key: str) -> Any:
    """What ``word`` holds; a section that is not there yet is made."""
    if isinstance(place, dict) and place.get(word) is None:
        place[word] = {}
    inner = place[_index(place, word, key) if isinstance(place, list) else word]
    if not isinstance(inner, dict | list):
        raise InputError(t("command line: {key}: {word} is a value and has no options of its own", key=key, word=word))
    return inner


def _index(place: list[Any], word: str, key: str) -> int:
    if not word.isdecimal() or int(word) >= len(place):
        message = "command line: {key}: {word} is not one of the numbers 0 to {last}"
        raise InputError(t(message, key=key, word=word, last=len(place) - 1))
    return int(word)


def json_like(value: Any) -> Any:
    """A deep copy in plain dicts and lists; options objects become their values, paths become text."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): json_like(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_like(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def build(cls: type[OptionsT], tree: Tree | Mapping[str, Any]) -> OptionsT:
    """The options object of a tree, or ONE InputError that names every problem with its origin."""
    tree = tree if isinstance(tree, Tree) else read(tree)
    try:
        return cls.model_validate(tree.values)
    except ValidationError as error:
        raise InputError(problems(cls, tree, error.errors(include_url=False))) from None


def problems(cls: type[BaseModel], tree: Tree, errors: Sequence[ErrorDetails]) -> list[str]:
    """One line for each key that is wrong: ``ORIGIN: key: what was found, what would be right``."""
    by_key: dict[str, list[tuple[ErrorDetails, _Owner]]] = {}
    for error in errors:
        key, owner = _locate(cls, tree.values, error)
        by_key.setdefault(key, []).append((error, owner))
    return [problem(tree, key, _said(found)) for key, found in by_key.items()]


def wrong(errors: Sequence[ErrorDetails]) -> str:
    """What is wrong with one value that is no option of a tree, from the errors that pydantic has with it."""
    return _said([(error, _Owner("", ())) for error in errors])


def problem(tree: Tree, key: str, what: str) -> str:
    """The line ``ORIGIN: key: what``; a key that is missing stands where what should hold it was given."""
    origin = tree.origin(key)
    return ": ".join(part for part in (t(origin) if origin == COMMAND_LINE else origin, key, what) if part)


@dataclass(frozen=True)
class _Owner:
    """Who has the options among which a key was sought: its name in messages and the names of its options."""

    label: str
    names: tuple[str, ...]


def _locate(cls: type[BaseModel], values: Any, error: ErrorDetails) -> tuple[str, _Owner]:
    """The dotted key of a pydantic error, without the branches of unions that pydantic puts into its path."""
    classes: list[Any] = [cls]
    place: Any = values
    key, label = [], cls.__name__.lower()
    for number, part in enumerate(error["loc"]):
        last = number == len(error["loc"]) - 1
        within = (isinstance(place, Mapping) and part in place) or (isinstance(place, list) and isinstance(part, int))
        if not within and not (last and error["type"] == "missing"):
            if chosen := [c for c in classes if part in _choice_names(c)]:
                classes, label = chosen, str(part)
            continue
        key.append(str(part))
        if last and error["type"] == "extra_forbidden":
            break
        if annotations := [c.model_fields[str(part)].annotation for c in classes if part in c.model_fields]:
            leaves = (leaf for annotation in annotations for leaf in _leaves(annotation))
            classes, label = [leaf for leaf in leaves if hasattr(leaf, "model_fields")], str(part)
        place = None if last and error["type"] == "missing" else place[part]  # pyright: ignore
    if error["type"] == "union_tag_invalid":
        key.append("name")
    return ".".join(key), _Owner(label, tuple(dict.fromkeys(name for c in classes for name in c.model_fields)))


def _choice_names(cls: type[BaseModel]) -> tuple[Any, ...]:
    """The names under which a class is chosen: the values of its literal option ``name``."""
    name = cls.model_fields.get("name")
    return get_args(name.annotation) if name is not None and get_origin(name.annotation) is Literal else ()


def _leaves(annotation: Any) -> Iterator[Any]:
    """The plain types inside a type hint, and the values of its literals."""
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _leaves(argument)


_EXPECTED = {
    "float": "a number",
    "int": "a whole number",
    "string": "a text",
    "bool": "true or false",
    "none": "null",
    **dict.fromkeys(("list", "tuple"), "a list"),
    **dict.fromkeys(("dict", "mapping", "model", "union"), "options of its own (key: value)"),
}
_PATTERNS = {  # what texts of these patterns are called
    r"^[0-9]+(\.[0-9]+)?(MiB|GiB)$": "a size such as 4GiB or 900MiB",
    r"^https?://": "an address that begins with https:// or http://",
    r"\.py:[A-Za-z_]\w*$": "FILE.py:FUNCTION",
}
_RANGE = {
    "greater_than": ("gt", "must be greater than {limit}, found {found}"),
    "greater_than_equal": ("ge", "must be at least {limit}, found {found}"),
    "less_than": ("lt", "must be less than {limit}, found {found}"),
    "too_short": ("min_length", "must have at least {limit} elements, found {found}"),
    "too_long": ("max_length", "must have at most {limit} elements, found {found}"),
    "string_too_short": ("min_length", "must have at least {limit} characters, found {found}"),
    "less_than_equal": ("le", "must be at most {limit}, found {found}"),
}


def _said(found: Sequence[tuple[ErrorDetails, _Owner]]) -> str:
    """What is wrong with one key; the errors are those of every branch of its union."""
    for error, owner in found:
        kind, context = error["type"], error.get("ctx", {})
        if kind == "extra_forbidden":
            return unknown(str(error["loc"][-1]), owner.label, owner.names)
        if kind == "missing":
            return t("is required")
        if kind in _RANGE:
            limit, message = _RANGE[kind]
            return t(message, limit=context[limit], found=_shown(error["input"]))
        if kind == "union_tag_invalid":
            return _no_choice(context["tag"], [name.strip("' ") for name in context["expected_tags"].split(",")])
    return _wrong_type(found)


def _wrong_type(found: Sequence[tuple[ErrorDetails, _Owner]]) -> str:
    value, expected, choices = found[0][0]["input"], [], []
    for error, _ in found:
        kind, context = error["type"], error.get("ctx", {})
        if kind == "literal_error":
            choices += re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        elif kind == "finite_number":
            return t("must be a finite number, found {found}", found=value)
        elif kind == "string_pattern_mismatch" and context["pattern"] in _PATTERNS:
            expected.append(t(_PATTERNS[context["pattern"]]))
        elif (word := kind.partition("_")[0]) in _EXPECTED:
            expected.append(t(_EXPECTED[word]))
        else:
            return str(context.get("error", error["msg"]))
    if choices and isinstance(value, str):
        return _no_choice(value, choices, expected)
    wanted = [*choices, *dict.fromkeys(expected)]
    return t("expected {expected}, found {found}", expected=t(" or ").join(wanted), found=_shown(value))


def _no_choice(value: Any, choices: Sequence[str], expected: Sequence[str] = ()) -> str:
    said = {"found": _shown(value), "names": ", ".join([*choices, *dict.fromkeys(expected)])}
    if near := nearest(str(value), choices):
        return t('{found} is not a choice; did you mean "{near}"? ({names})', near=near, **said)
    return t("{found} is not a choice ({names})", **said)


def unknown(name: str, owner: str, names: Iterable[str]) -> str:
    """``lora has no such option; did you mean "rank"? (rank, alpha, ...)``"""
    names = list(names)
    said = {"owner": owner, "names": ", ".join(names)}
    if near := nearest(name, names):
        return t('{owner} has no such option; did you mean "{near}"? ({names})', near=near, **said)
    return t("{owner} has no such option ({names})", **said)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant, or None."""
    small = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), small, n=1, cutoff=0.5)
    return small[close[0]] if close else None


def _shown(value: Any) -> str:
    text = json.dumps(json_like(value), ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def resolved(options: BaseModel, tree: Tree | None = None) -> str:
    """YAML of every option; with a ``tree``, each line says where its value came from."""
    lines = _lines(json_like(options), "", 0, tree)
    width = max((len(text) for text, _ in lines if len(text) <= 72), default=0)
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _lines(values: Mapping[str, Any], above: str, depth: int, tree: Tree | None) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        key, indent = f"{above}{name}", "  " * depth
        if isinstance(value, Mapping) and value:
            lines += [(f"{indent}{_inline(name)}:", ""), *_lines(value, key + ".", depth + 1, tree)]
        else:
            origin = "" if tree is None else tree.given(key) or t("default")
            lines.append((f"{indent}{_inline(name)}: {_inline(value)}", origin))
    return lines


def _inline(value: Any) -> str:
    """One line of YAML: JSON where the plain form would be read as something else."""
    if isinstance(value, float):
        return repr(value)
    plain = isinstance(value, str) and re.fullmatch(r"(?!\.\.\.)[A-Za-z_./][\w./-]*", value)
    return value if plain and yaml.load(value, _Loader) == value else json.dumps(value, ensure_ascii=False)


def json_schema(cls: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema of an options class, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}
