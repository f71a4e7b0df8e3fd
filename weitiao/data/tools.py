"""Tools: how a call is written and read; with ``schema.py``, whether it fits and what a function takes.

    parsed = parse_calls(text, "hermes")               # Parsed(content, calls, problems)
    problems = check(parsed.calls[0], tools)           # [] when every argument fits the tool's JSON schema
    schema = schema_of(search_hotels)                  # from the signature and the docstring

Nothing is guessed: a call whose JSON is broken, cut or of the wrong shape is not repaired but named in ``problems``,
and its text stays in ``content``. Tools are given as JSON schemas in the OpenAI form, with or without the outer
``{"type": "function", "function": …}``.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from weitiao.data.broken import explained
from weitiao.data.rows import Call
from weitiao.data.schema import check, function_of, schema_of, wrapped
from weitiao.errors import InputError, t

__all__ = [
    "SYNTAXES",
    "Parsed",
    "check",
    "detect",
    "format_call",
    "format_calls",
    "function_of",
    "parse_calls",
    "schema_of",
    "wrapped",
]


@dataclass(frozen=True)
class Parsed:
    """An assistant's text taken apart: the words, the calls, and what looked like a call and is none."""

    content: str
    calls: tuple[Call, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Syntax:
    """One way to write calls: ``marks`` are pieces of text by which a chat template shows that it writes them so."""

    marks: tuple[str, ...]
    write: Callable[[Sequence[Call]], str]
    read: Callable[[str], Parsed]


def format_call(call: Call, syntax: str) -> str:
    """One call as a model of this syntax writes it."""
    return format_calls([call], syntax)


def format_calls(calls: Sequence[Call], syntax: str) -> str:
    """Several calls of one turn as a model of this syntax writes them."""
    return _syntax(syntax).write(calls)


def parse_calls(text: str, syntax: str | None) -> Parsed:
    """What an assistant wrote, as words and calls. ``text`` holds no end-of-turn token; no syntax: words alone."""
    return Parsed(text.strip()) if syntax is None else _syntax(syntax).read(text)


def detect(template: str) -> str | None:
    """The call syntax that a chat template's text shows, or None."""
    for name, syntax in SYNTAXES.items():
        if any(mark in template for mark in syntax.marks):
            return name
    return None


def _syntax(name: str) -> Syntax:
    if name not in SYNTAXES:
        raise InputError(t("no call syntax {name}; there are {names}", name=name, names=", ".join(SYNTAXES)))
    return SYNTAXES[name]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- reading ------------------------------------------------------------------------------------------------------


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(t("a key occurs twice"))
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(t("{name} is not JSON", name=name))


def _finite(digits: str) -> float:
    number = float(digits)
    return _no_constant(digits) if math.isinf(number) else number


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
_BLANK = re.compile(r"\s*")


def _skip_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _read_json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at ``at`` (blanks skipped) and where it ends; ValueError says what is wrong with it."""
    try:
        return _DECODER.raw_decode(text, _skip_blank(text, at))
    except json.JSONDecodeError as error:
        raise ValueError(f"{explained(error)}, {_excerpt(text, error.pos)}") from None
    except RecursionError:
        raise ValueError(t("nested too deeply")) from None


def _excerpt(text: str, at: int) -> str:
    return _dump(text[max(0, at - 20) : at + 20])


def _call(value: Any, arguments: str) -> Call:
    """A decoded JSON object as a call; ValueError if it is not one."""
    if not isinstance(value, dict):
        raise ValueError(t("a call is an object with name and {arguments}", arguments=arguments))
    if not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError(t("the call has no name"))
    if not isinstance(value.get(arguments), dict):
        raise ValueError(t("the call of {name} has no object {arguments}", name=value["name"], arguments=arguments))
    return Call(value["name"], value[arguments])


def _problem(reason: object) -> str:
    return t("unreadable call: {reason}", reason=reason)


def _read_hermes(text: str) -> Parsed:
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, any number of them, words around them allowed."""
    calls, problems, words, at = [], [], [], 0
    while (start := text.find("<tool_call>", at)) >= 0:
        words.append(text[at:start])
        at = start + len("<tool_call>")
        try:
            value, end = _read_json(text, at)
            call = _call(value, "arguments")
            end = _skip_blank(text, end)
            if not text.startswith("</tool_call>", end):
                raise ValueError(t("<tool_call> is not closed"))
            calls.append(call)
            at = end + len("</tool_call>")
        except ValueError as error:
            problems.append(_problem(error))
            words.append("<tool_call>")
    words.append(text[at:])
    return Parsed("".join(words).strip(), tuple(calls), tuple(problems))


def _read_llama3(text: str) -> Parsed:
    """``{"name": …, "parameters": {…}}`` as the whole turn; several are separated by ``;`` or a line break."""
    body = text.strip()
    marked = body.startswith("<|python_tag|>")
    at = len("<|python_tag|>") if marked else 0
    if not marked and not re.match(r'\{\s*("(name|type|parameters)"|$)', body):
        return Parsed(body)
    calls = []
    try:
        while at < len(body):
            value, at = _read_json(body, at)
            calls.append(_call(value, "parameters"))
            at = _skip_blank(body, at)
            if body.startswith(";", at):
                at = _skip_blank(body, at + 1)
    except ValueError as error:
        return Parsed(body, (), (_problem(error),))
    return Parsed("", tuple(calls))


def _read_mistral(text: str) -> Parsed:
    """``[TOOL_CALLS] [{"name": …, "arguments": {…}}]``, after any words."""
    words, mark, body = text.partition("[TOOL_CALLS]")
    if not mark:
        return Parsed(text.strip())
    try:
        values, end = _read_json(body, 0)
        if not isinstance(values, list) or not values:
            raise ValueError(t("[TOOL_CALLS] is followed by a list of calls"))
        calls = tuple(_call(value, "arguments") for value in values)
        if body[end:].strip():
            raise ValueError(t("text after the calls: {text}", text=_excerpt(body, end)))
    except ValueError as error:
        return Parsed(text.strip(), (), (_problem(error),))
    return Parsed(words.strip(), calls)


_GLM_CALL = re.compile(r"\s*([\w.-]+)[ \t]*\r?\n\s*(?=\{)")


def _read_glm(text: str) -> Parsed:
    """The tool's name on a line, then the arguments as JSON; several calls, and words, each after ``<|assistant|>``."""
    words, calls, problems = [], [], []
    for part in text.split("<|assistant|>"):
        match = _GLM_CALL.match(part)
        try:
            if match is None:
                words.append(part.strip())
                continue
            value, end = _read_json(part, match.end())
            if part[end:].strip():
                raise ValueError(t("text after the calls: {text}", text=_excerpt(part, end)))
            calls.append(Call(match[1], value))
        except ValueError as error:
            words.append(part.strip())
            problems.append(_problem(error))
    return Parsed("\n".join(filter(None, words)), tuple(calls), tuple(problems))


_CHATGLM3_CALL = re.compile(r"\s*([\w.-]+)[ \t]*\r?\n\s*```python\s*\n(.*)\n\s*```\s*", re.DOTALL)


def _read_chatglm3(text: str) -> Parsed:
    """The tool's name on a line, then ``tool_call(name=value, …)`` as a block of Python, which is read and never run;
    several calls, and words, each after ``<|assistant|>``."""
    words, calls, problems = [], [], []
    for part in text.split("<|assistant|>"):
        match = _CHATGLM3_CALL.fullmatch(part)
        try:
            if match is None:
                words.append(part.strip())
                continue
            calls.append(Call(match[1], _keywords(match[2])))
        except ValueError as error:
            words.append(part.strip())
            problems.append(_problem(error))
    return Parsed("\n".join(filter(None, words)), tuple(calls), tuple(problems))


class _Constants(ast.NodeTransformer):
    """JSON's constants as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


def _keywords(code: str) -> dict[str, Any]:
    """The arguments of ``tool_call(…)``, literals only; ValueError for anything else."""
    try:
        called = _Constants().visit(ast.parse(code.strip(), mode="eval")).body
        if not isinstance(called, ast.Call) or ast.unparse(called.func) != "tool_call" or called.args:
            raise ValueError(t("tool_call(name=value, …) is expected, {text}", text=_excerpt(code, 0)))
        values = [(word.arg, ast.literal_eval(word.value)) for word in called.keywords]
        # **{…} has no name of its own and brings several
        pairs = [pair for name, value in values for pair in ([(name, value)] if name else value.items())]
        return json.loads(json.dumps(_no_duplicates(pairs), allow_nan=False))
    except (SyntaxError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}, {_excerpt(code, 0)}") from None


# --- writing ------------------------------------------------------------------------------------------------------


def _hermes(call: Call) -> str:
    return "<tool_call>\n" + _dump({"name": call.name, "arguments": dict(call.arguments)}) + "\n</tool_call>"


def _chatglm3(call: Call) -> str:
    """Arguments by name, or as ``**{…}`` where a name is none in Python or another one (``ﬁ`` is read as ``fi``)."""
    named = all(name.isidentifier() and name.isascii() and not iskeyword(name) for name in call.arguments)
    words = ", ".join(f"{name}={_python(value)}" for name, value in call.arguments.items())
    return f"{call.name}\n ```python\ntool_call({words if named else '**' + _dump(dict(call.arguments))})\n```"


def _python(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, bool) else _dump(value)


def _llama3(call: Call) -> str:
    return _dump({"name": call.name, "parameters": dict(call.arguments)})


SYNTAXES: dict[str, Syntax] = {
    "hermes": Syntax(("<tool_call>",), lambda calls: "\n".join(map(_hermes, calls)), _read_hermes),
    "mistral": Syntax(
        ("[TOOL_CALLS]",),
        lambda calls: (
            f"[TOOL_CALLS] {_dump([{'name': call.name, 'arguments': dict(call.arguments)} for call in calls])}"
        ),
        _read_mistral,
    ),
    "llama3": Syntax(('"parameters":', "<|python_tag|>"), lambda calls: "; ".join(map(_llama3, calls)), _read_llama3),
    "chatglm3": Syntax(("tool_call(",), lambda calls: "<|assistant|>".join(map(_chatglm3, calls)), _read_chatglm3),
    "glm": Syntax(
        ("<|observation|>",),
        lambda calls: "<|assistant|>".join(f"{call.name}\n{_dump(dict(call.arguments))}" for call in calls),
        _read_glm,
    ),
}
