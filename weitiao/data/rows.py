"""Rows: what a training example is before it becomes tokens.

    Chat((Message("user", "你好"), Message("assistant", "您好！")))

Every type is frozen. ``id`` names the row in messages (file:line unless the row brings its own) and ``group`` what must
not be torn apart by a split (a dialogue).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Call:
    """A function call: a name and JSON arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn. An assistant's has text, calls or both; a tool's has the result's text and the tool's ``name``."""

    role: Role
    content: str = ""
    calls: tuple[Call, ...] = ()
    name: str | None = None


@dataclass(frozen=True)
class Text:
    """Plain text, for pretraining."""

    text: str
    id: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Chat:
    """A conversation, with the JSON schemas of the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    id: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a rejected answer."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    id: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Rated:
    """A conversation judged good or bad as a whole."""

    messages: tuple[Message, ...]
    good: bool
    id: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered by the model itself; ``facts`` are what a reward function may look at."""

    messages: tuple[Message, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Labelled:
    """A text with a class, several classes, or a number."""

    text: str
    label: str | float | tuple[str, ...]
    id: str = ""
    group: str | None = None


Row = Text | Chat | Pair | Rated | Prompt | Labelled


def text_of(row: Row) -> str:
    """The words of a row without any markup: its text, or its turns line by line, calls as JSON."""
    if isinstance(row, Text | Labelled):
        return row.text
    messages = (*row.prompt, *row.chosen, *row.rejected) if isinstance(row, Pair) else row.messages
    return "\n".join(_said_by(message) for message in messages)


def _said_by(message: Message) -> str:
    calls = [json.dumps({"name": c.name, "arguments": dict(c.arguments)}, ensure_ascii=False) for c in message.calls]
    return "\n".join(part for part in (message.content, *calls) if part)
