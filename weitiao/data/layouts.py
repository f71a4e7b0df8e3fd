"""Layouts: a record of somebody's file (a dict) becomes a row, or a sentence that says what is wrong with it.

    layout = Layout("messages")
    layout.row({"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好！"}]})

Known layouts: ``messages`` (OpenAI's, tools included), ``sharegpt`` (conversations with from/value), ``alpaca``,
``prompt`` (a question and an answer by column names) and ``text``.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from weitiao.data.rows import Chat, Labelled, Message, Text
from weitiao.data.schema import function_of, wrapped
from weitiao.data.turns import RowError, check_order, decoded, read_turns, shown, text_cell
from weitiao.errors import t

Record = Mapping[str, Any]

LAYOUTS = ("messages", "sharegpt", "alpaca", "prompt", "text")
LABELLED = "labelled"  # never guessed: it is what task classify reads
PROMPT_NAMES = ("prompt", "question", "query", "instruction", "input", "问题")
ANSWER_NAMES = ("answer", "completion", "response", "output", "答案", "回答")
CONVERSATION_NAMES = ("conversations", "conversation")
TEXT_NAMES = ("text", "content")
LABELLED_TEXT_NAMES = (*TEXT_NAMES, "sentence", "utterance", "review", "文本", "句子")
LABEL_NAMES = ("label", "labels", "class", "category", "标签", "类别")
NEEDED = {  # the keys that a layout is read from, as people know them
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output"),
    "prompt": ("prompt", "answer"),
    "text": ("text",),
    LABELLED: ("text", "label"),
}
SHARED_NAMES = ("id", "group", "tools", "functions", "system")
# What `data.columns` may map to a file's own column names; a row may lack the optional ones.
OPTIONAL_NAMES = ("input", "system", "history", "tools", "id", "group")
COLUMN_NAMES = (
    *("messages", "conversations", "prompt", "answer", "instruction", "output", "text", "label"),
    *OPTIONAL_NAMES,
)


def detect(records: Sequence[Any], preferred: Sequence[str] = ()) -> tuple[str, str] | None:
    """(layout, the key that gave it away) that most of ``records`` have; None if none of them has a known one.

    A layout that the ``preferred`` keys alone make up goes before what the other keys say.
    """
    votes: dict[tuple[str, str], int] = {}
    for record in records:
        if isinstance(record, Mapping):
            filled = {key for key, value in record.items() if value is not None}
            if found := layout_of(filled & set(preferred)) or layout_of(filled) or layout_of(set(record)):
                votes[found] = votes.get(found, 0) + 1
    return max(votes, key=lambda found: votes[found]) if votes else None


def layout_of(keys: set[str]) -> tuple[str, str] | None:
    """(layout, the key that gave it away) of a record with these keys."""
    return next(((layout, key) for layout in LAYOUTS if (key := _telltale(layout, keys))), None)


def _telltale(layout: str, keys: Container[str]) -> str | None:
    """The key by which a record with these keys can be read as ``layout``; None if it cannot."""
    if layout == "alpaca":
        return "instruction" if "instruction" in keys and "output" in keys else None
    if layout == "prompt":
        return _first(PROMPT_NAMES, keys) if _first(ANSWER_NAMES, keys) else None
    if layout == LABELLED:
        return _first(LABELLED_TEXT_NAMES, keys) if _first(LABEL_NAMES, keys) else None
    names = {"messages": ("messages",), "sharegpt": CONVERSATION_NAMES, "text": TEXT_NAMES}[layout]
    return _first(names, keys)


def _first(names: Sequence[str], keys: Container[str]) -> str | None:
    return next((name for name in names if name in keys), None)


def meant(keys: Iterable[str]) -> tuple[str, str]:
    """The keys that may be meant for question and answer: those that are right but for their case, or the only two;
    "..." where none is."""
    keys = list(keys)
    names = ([key for key in keys if str(key).strip().lower() in known] for known in (PROMPT_NAMES, ANSWER_NAMES))
    question, answer = (found[0] if found else "..." for found in names)
    if len(keys) == 2 and (question == "...") != (answer == "..."):
        other = next(key for key in keys if key not in (question, answer))
        return (other, answer) if question == "..." else (question, other)
    return question, answer


class Layout:
    """Reads records of one layout. ``unused`` collects the keys of records and messages that nothing was made of,
    ``numbers`` those whose number was taken for the text it is written as."""

    def __init__(self, name: str, template: str | None = None):
        self.name = name
        self.template = template
        self.unused: set[str] = set()
        self.numbers: set[str] = set()

    def row(self, record: Any, id: str = "") -> Text | Chat | Labelled:
        """The row of ``record``; RowError says what is wrong with it. ``id`` names it if it brings no id of its own."""
        if self.name == "text" and type(record) is dict and record.keys() == {"text"}:  # as most of millions are
            text = record["text"]
            if isinstance(text, str) and text.strip():
                return Text(text, id)
        if not isinstance(record, Mapping):
            raise RowError(t("found {found}, expected an object with keys", found=shown(record)))
        if misfit := self._misfit(record):
            raise RowError(misfit)
        record = _filled_of(record)
        own, group = record.get("id", ""), record.get("group", "")
        common: dict[str, Any] = {"id": id if own == "" else str(own), "group": None if group == "" else str(group)}
        if self.name == "text":
            key = _first(TEXT_NAMES, record) or "text"
            self._note(record, key)
            return Text(_filled(record, key), **common)
        if self.name == LABELLED:
            key, label = _first(LABELLED_TEXT_NAMES, record) or "", _first(LABEL_NAMES, record) or ""
            self._note(record, key, label)
            return Labelled(_filled(record, key), _label(record[label], label), **common)
        readers: dict[str, Callable[[Record], list[Message]]] = {
            "messages": self._conversation,
            "sharegpt": self._conversation,
            "alpaca": self._alpaca,
            "prompt": self._prompt,
        }
        messages = readers[self.name](record)
        system = text_cell(record.get("system", ""), "system")
        messages = [Message("system", system), *messages] if system.strip() else messages
        check_order(messages)
        tools = _tools(record)
        _check_called(messages, tools)
        return Chat(tuple(messages), tools, **common)

    def _misfit(self, record: Record) -> str:
        """Why ``record`` cannot be read as this layout; "" if its keys say that it can."""
        filled = _filled_of(record)
        if self._reads(filled) and not self._loses(filled):
            return ""
        other = layout_of(set(filled)) if self.template is None else None
        if other is not None:
            message = "of layout {other} (from the key '{key}') in a file of {layout}; give each layout its own file"
            return t(message, other=other[0], key=other[1], layout=self.name)
        nulls = [key for key in record if key not in filled]
        if self._reads(record):  # the keys are there: those without a value are what is wrong
            needed = [key for key in nulls if self._reads({*filled, key})] or nulls
            return t("{keys}: found null, expected a value", keys=", ".join(map(str, needed)))
        keys = ", ".join(map(str, record)) or t("none")
        if self.template is not None:
            message = "no answer: none of the keys {names}; the row has {keys} (data.columns names another)"
            return t(message, names=", ".join(ANSWER_NAMES), keys=keys)
        needed = ", ".join(NEEDED[self.name])
        return t(
            "not of layout {layout} (keys {needed}): its keys are {keys}", layout=self.name, needed=needed, keys=keys
        )

    def _reads(self, keys: Container[str]) -> bool:
        """Whether a record with these keys has what this layout, or the template's answer, is read from."""
        found = _telltale(self.name, keys) if self.template is None else _first(ANSWER_NAMES, keys)
        return found is not None

    def _loses(self, record: Record) -> bool:
        """Whether a record among prompts is an alpaca one, of whose question only a part would be read."""
        alone = self.template is None and self.name == "prompt" and _first(PROMPT_NAMES, record) == "instruction"
        return alone and _telltale("alpaca", record) is not None and bool(record.get("input"))

    def _note(self, record: Record, *used: str) -> None:
        self.unused.update(key for key in map(str, record) if key not in used and key not in SHARED_NAMES)
        if numbers := {key for key in used if _is_number(record.get(key))}:
            meant = template_slots(self.template) if self.template else ()  # a price in a sentence is one
            self.numbers |= numbers.difference(LABEL_NAMES, meant)

    def _conversation(self, record: Record) -> list[Message]:
        names = ("messages",) if self.name == "messages" else CONVERSATION_NAMES
        key = _first(names, record) or names[0]
        self._note(record, key)
        return read_turns(record.get(key), key, self.unused)

    def _alpaca(self, record: Record) -> list[Message]:
        self._note(record, "instruction", "input", "output", "history")
        question = _filled(record, "instruction")
        if (extra := text_cell(record.get("input", ""), "input")).strip():
            question = f"{question}\n{extra}"
        return [*_history(record), Message("user", question), Message("assistant", _answer(record, "output"))]

    def _prompt(self, record: Record) -> list[Message]:
        answer_key = _first(ANSWER_NAMES, record) or ""
        if self.template is not None:
            self._note(record, answer_key, "history", *template_slots(self.template))
            question = fill(self.template, record)
        else:
            key = _first(PROMPT_NAMES, record) or PROMPT_NAMES[0]
            self._note(record, key, answer_key, "history")
            prompt, answer = record.get(key), record[answer_key]
            if isinstance(prompt, list) and isinstance(answer, list):
                return read_turns([*prompt, *answer], key, self.unused)
            question = _filled(record, key)
        return [*_history(record), Message("user", question), Message("assistant", _answer(record, answer_key))]


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value == value


def _filled_of(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}


def _filled(record: Record, key: str) -> str:
    text = text_cell(record.get(key, ""), key)
    if not text.strip():
        raise RowError(t("{key}: empty", key=key))
    return text


def _label(value: Any, key: str) -> str | float | tuple[str, ...]:
    """A class by its name or number, a number with a point, or a list of classes."""
    value = decoded(value) if isinstance(value, str) and value.startswith("[") else value
    if isinstance(value, list):
        return tuple(text_cell(one, key).strip() for one in value)
    if isinstance(value, float) and value == value:
        return value
    if not (text := text_cell(value, key).strip()):
        raise RowError(t("{key}: no label", key=key))
    return text


def _answer(record: Record, key: str) -> str:
    text = text_cell(record.get(key, ""), key)
    if not text.strip():
        raise RowError(t("{key}: empty answer", key=key))
    return text


def _history(record: Record) -> list[Message]:
    """Earlier exchanges: ``history: [[question, answer], ...]``."""
    history = decoded(record.get("history") or [])
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise RowError(t("history: expected a list of [question, answer], found {found}", found=shown(history)))
    roles = ("user", "assistant")
    return [
        Message(role, text_cell(text, "history"))  # type: ignore[arg-type]
        for pair in history
        for role, text in zip(roles, pair, strict=True)
    ]


# ---- tools -----------------------------------------------------------------------------------------------------------


def _tools(record: Record) -> tuple[Mapping[str, Any], ...]:
    try:
        return normal_tools(decoded(record.get("tools", record.get("functions")) or [], strict=True))
    except ValueError as error:
        raise RowError(t("tools: {problem}", problem=error)) from None


def normal_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas in OpenAI's form ``{"type": "function", "function": {...}}``; ValueError if they are no schemas."""
    if not isinstance(tools, list):
        raise ValueError(t("expected a list of schemas, found {found}", found=shown(tools)))
    for tool in tools:
        if not isinstance(tool, Mapping) or not isinstance(function_of(tool).get("name"), str):
            raise ValueError(t("expected a function's schema with a name, found {found}", found=shown(tool)))
    return tuple(wrapped(tool) for tool in tools)


def _check_called(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    known = [function_of(tool)["name"] for tool in tools]
    for call in (call for message in messages for call in message.calls):
        if known and call.name not in known:
            names = ", ".join(known)
            raise RowError(t("calls {name}, which is not among its tools ({known})", name=call.name, known=names))


# ---- templates -------------------------------------------------------------------------------------------------------


def template_slots(template: str) -> list[str]:
    """The slot names of ``"问：{question}"``; ValueError if it is malformed or a slot is more than a name."""
    slots = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.strip() or set(name) & set(".[]") or spec or conversion:
            raise ValueError(
                t("slot {found}: a slot is a column's name in braces, such as {{question}}", found="{" + name + "}")
            )
        slots.append(name)
    return slots


def fill(template: str, record: Record) -> str:
    """The template with its slots filled: text as it is, everything else as JSON. RowError names the missing slots."""
    slots = template_slots(template)
    missing = [slot for slot in slots if record.get(slot) is None]
    if missing:
        raise RowError(
            t(
                "the template's slot {missing} has no value; keys of the row: {keys}",
                missing=", ".join(missing),
                keys=", ".join(map(str, record)),
            )
        )
    pieces = []
    for literal, slot, _, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if slot is not None:
            value = record[slot]
            pieces.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return "".join(pieces)
