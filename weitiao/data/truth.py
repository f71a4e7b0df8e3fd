"""Whether a conversation that was rewritten still means the same: its calls hold, and what they take is still said.

    differences(before, after, functions={"search_hotels": search}, said={"停车场": "能停车的院子"})     # [] if true

A value of a call that stood literally in a guest's turn has to stand there still, or what is ``said`` for it; calls
have to fit their schemas and, where there are functions, to run; a call with another argument gives what it gave.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from weitiao.data.rows import Call, Chat
from weitiao.data.schema import check
from weitiao.errors import t

Functions = Mapping[str, Callable[..., Any]]
NO_WORDS: Mapping[str, str] = {}


def values_of(value: Any) -> Iterator[str]:
    """The texts and numbers in the arguments of a call, as a person would write them."""
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from values_of(one)
    elif isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield f"{value:g}"


def place_of(value: str, text: str) -> int:
    """Where ``value`` stands in ``text``, -1 if nowhere; a number not as a part of another one."""
    if not value[0].isdigit() and not value[-1].isdigit():
        return text.find(value)
    match = re.search(rf"(?<![\d.]){re.escape(value)}(?!\.?\d)", text)
    return match.start() if match else -1


def wanted(chat: Chat) -> set[str]:
    """Every value of every call."""
    return {value for message in chat.messages for call in message.calls for value in values_of(dict(call.arguments))}


def run(call: Call, functions: Functions) -> str:
    """What a call gives, as JSON; ValueError says why it gives nothing."""
    try:
        found = functions[call.name](**call.arguments)
        return json.dumps(found, ensure_ascii=False, sort_keys=True, default=str)
    except Exception as error:  # whatever a tool of a person's own raises
        raise ValueError(f"{call.name}: {type(error).__name__}: {error}") from None


def differences(
    before: Chat, after: Chat, functions: Functions | None = None, said: Mapping[str, str] = NO_WORDS
) -> list[str]:
    """Every way in which ``after`` is not true any more; ``said`` maps values to the words that now stand for them."""
    found = []
    values = wanted(before)
    for number, (one, two) in enumerate(zip(before.messages, after.messages, strict=False), 1):
        if one.role != two.role or len(one.calls) != len(two.calls):
            found.append(t("message {number} is another kind of turn", number=number))
        elif one.role == "user":
            lost = [v for v in values if place_of(v, one.content) >= 0 and not _says(two.content, v, said)]
            found += [
                t("message {number} no longer says {value}", number=number, value=value) for value in sorted(lost)
            ]
    if len(after.messages) < len(before.messages):
        found.append(t("{count} messages are missing", count=len(before.messages) - len(after.messages)))
    return found + calls_differ(before, after, functions or {})


def _says(text: str, value: str, said: Mapping[str, str]) -> bool:
    return place_of(value, text) >= 0 or (value in said and said[value] in text)


def calls_differ(before: Chat, after: Chat, functions: Functions) -> list[str]:
    """What is wrong with the calls of ``after``."""
    found = []
    old = [call for message in before.messages for call in message.calls]
    new = [call for message in after.messages for call in message.calls]
    for one, two in zip(old, new, strict=False):
        found += check(two, after.tools) if after.tools else []
        same = one.name == two.name and dict(one.arguments) == dict(two.arguments)
        if two.name not in functions:
            found += [] if same else [t("{name} cannot be run here, and has other arguments", name=two.name)]
            continue
        try:
            result = run(two, functions)
            if not same and result != run(one, functions):
                found.append(t("{name} gives another result than before", name=two.name))
        except ValueError as error:
            found.append(str(error))
    return found
