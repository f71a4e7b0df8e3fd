"""Turns: a list of somebody's message objects becomes our messages, and the order of the roles is checked.

    turns = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好！"}]
    messages = read_turns(turns, "conversations", set())
    check_order(messages)

OpenAI's names (role, content, tool_calls) and ShareGPT's (from, value, function_call, observation) are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from weitiao.data.rows import Call, Message, Role
from weitiao.errors import t

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")
CONTENT_KEYS = ("content", "value", "text")
TURN_KEYS = frozenset(
    ("role", "from", *CONTENT_KEYS, "name", "tool_calls", "function_call", "tool_call_id", "id", "type")
)
SHOWN_CHARACTERS = 60


class RowError(ValueError):
    """What is wrong with one row, in words for the person who owns the file."""


def read_turns(turns: Any, key: str, unused: set[str]) -> list[Message]:
    """Messages of the list under ``key`` (a list, or its JSON text); ``unused`` learns the keys nothing was made of.

    Calls that a file has as turns of their own join the assistant's turn before them; a tool's result takes the name of
    the call that it answers. RowError says which message is wrong, and how.
    """
    turns = decoded(turns)
    if not isinstance(turns, list) or not turns:
        raise RowError(t("{key}: expected a list of messages, found {found}", key=key, found=shown(turns)))
    messages: list[Message] = []
    names: dict[str, str] = {}
    unanswered: list[str] = []
    for number, turn in enumerate(turns, 1):
        try:
            said, message = _turn(turn, names, unused)
        except RowError as error:
            raise RowError(t("message {number}: {problem}", number=number, problem=error)) from None
        if message.role == "assistant":
            before = messages[-1] if messages and messages[-1].role == "assistant" else None
            if said in CALL_ROLES and before is not None:
                messages[-1] = Message("assistant", before.content, before.calls + message.calls)
                unanswered += [call.name for call in message.calls]
                continue
            unanswered = [call.name for call in message.calls]
        elif message.role == "tool":
            first = unanswered.pop(0) if unanswered else None
            message = Message("tool", message.content, name=message.name or first)
        if message.role != "system" or message.content.strip():
            messages.append(message)
    return messages


def _turn(turn: Any, names: dict[str, str], unused: set[str]) -> tuple[str, Message]:
    """The role as the file says it, and the message; ``names`` learns which call id stands for which tool."""
    if not isinstance(turn, Mapping):
        raise RowError(t("found {found}, expected an object with keys", found=shown(turn)))
    nulls = [key for key in CONTENT_KEYS if key in turn and turn[key] is None]
    keys, turn = ", ".join(map(str, turn)), {key: value for key, value in turn.items() if value is not None}
    unused.update(str(key) for key in turn if key not in TURN_KEYS)
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise RowError(t("unknown role {found}; known: {known}", found=shown(said), known=", ".join(ROLES)))
    if not turn.keys() & {*CONTENT_KEYS, "tool_calls", "function_call"}:
        if nulls:
            raise RowError(t("{keys}: found null, expected a value", keys=nulls[0]))
        raise RowError(t("no content: the keys of the message are {keys}", keys=keys))
    content = _parts(next((turn[key] for key in CONTENT_KEYS if key in turn), ""))
    if said in CALL_ROLES:
        called = decoded(content, strict=True)
        return said, Message(role, calls=tuple(map(_call, called if isinstance(called, list) else [called])))
    if role == "tool":
        name = turn.get("name", names.get(str(turn.get("tool_call_id"))))
        return said, Message(role, content, name=None if name is None else str(name))
    calls = _calls(turn, names)
    if calls and role != "assistant":
        raise RowError(t("a call by {role}: only the assistant calls tools", role=role))
    return said, Message(role, content, calls)


def _parts(content: Any) -> str:
    """A message's text; a list of parts is joined, and only text parts are known."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type", "text") != "text":
                raise RowError(t("content: only text parts can be read, found {found}", found=shown(part)))
        return "".join(text_cell(part.get("text", ""), "text") for part in content)
    if isinstance(content, Mapping):  # a tool's result that was left as an object
        return json.dumps(content, ensure_ascii=False)
    return text_cell(content, "content")


def _calls(turn: Mapping[str, Any], names: dict[str, str]) -> tuple[Call, ...]:
    items = decoded(turn.get("tool_calls") or [], strict=True)
    if not isinstance(items, list):
        raise RowError(t("tool_calls: expected a list, found {found}", found=shown(items)))
    if turn.get("function_call"):
        items = [*items, turn["function_call"]]
    calls = tuple(map(_call, items))
    for item, call in zip(items, calls, strict=True):
        if "id" in item:
            names[str(item["id"])] = call.name
    return calls


def _call(item: Any) -> Call:
    if isinstance(item, Mapping) and isinstance(item.get("function"), Mapping):
        item = item["function"]
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str) or not item["name"]:
        raise RowError(t("a call needs a name and arguments, found {found}", found=shown(item)))
    arguments = item.get("arguments", item.get("parameters"))
    arguments = {} if arguments is None or arguments == "" else decoded(arguments, strict=True)
    if not isinstance(arguments, Mapping):
        raise RowError(
            t("arguments of {name}: expected an object, found {found}", name=item["name"], found=shown(arguments))
        )
    return Call(item["name"], dict(arguments))


def check_order(messages: Sequence[Message]) -> None:
    """RowError unless the roles take turns and nothing is empty.

    system?, then again and again: user, (assistant with calls, their results)*, assistant. The end is the assistant's.
    """
    before, waiting = "start", 0
    for number, message in enumerate(messages, 1):
        allowed = _allowed(before, waiting)
        if message.role not in allowed:
            words = {"found": message.role, "allowed": t(" or ").join(allowed)}
            if before == "start":
                problem = t("role {found} at the start, expected {allowed}", **words)
            else:
                problem = t("role {found} after {before}, expected {allowed}", before=before, **words)
            raise RowError(t("message {number}: {problem}", number=number, problem=problem))
        if message.role in ("user", "assistant") and not message.calls and not message.content.strip():
            problem = t("empty question") if message.role == "user" else t("empty answer")
            raise RowError(t("message {number}: {problem}", number=number, problem=problem))
        waiting = waiting - 1 if message.role == "tool" else len(message.calls)
        before = message.role
    if before != "assistant":
        raise RowError(t("ends with {role}: the last message must be the assistant's", role=before))


def _allowed(before: str, waiting: int) -> tuple[Role, ...]:
    """The roles that may follow ``before`` while ``waiting`` calls have no result yet."""
    if before == "start":
        return ("system", "user")
    if before == "assistant":
        return ("tool",) if waiting else ("user",)
    if before == "tool":
        return ("tool", "assistant") if waiting > 0 else ("assistant",)
    return ("user",) if before == "system" else ("assistant",)


# ---- cells -----------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as an error shows it: JSON, cut to a few words."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def text_cell(value: Any, key: str) -> str:
    """A cell's text; a number becomes text, a missing number (NaN) is empty, anything with an inside is refused."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value) if value == value else ""
    raise RowError(t("{key}: expected text, found {found}", key=key, found=shown(value)))


def decoded(value: Any, strict: bool = False) -> Any:
    """Lists and objects that a file holds as JSON text (a csv cell, a call's arguments) are decoded."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        if strict:
            raise RowError(t("expected JSON, found {found}", found=shown(value))) from None
        return value
