"""Messages in the form that chat templates read: the dictionaries of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weitiao.data.rows import Chat, Message


def as_dicts(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them; those that are dictionaries already stay as they are."""
    return [_as_dict(message) if isinstance(message, Message) else dict(message) for message in messages]


def _as_dict(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        found["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.calls
        ]
    if message.name is not None:
        found["name"] = message.name
    return found


def record_of(chat: Chat) -> dict[str, Any]:
    """A conversation as a record of the layout ``messages``."""
    found: dict[str, Any] = {"id": chat.id, "group": chat.group, "messages": as_dicts(chat.messages)}
    return found | ({"tools": [dict(tool) for tool in chat.tools]} if chat.tools else {})


def number_calls(conversation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with ids on its calls and their results, for templates that insist on them: nine letters
    and digits, counted from the beginning, so that a conversation's first turns look the same when it goes on."""
    numbered, waiting, count = [], [], 0
    for message in map(dict, conversation):
        if calls := message.get("tool_calls"):
            waiting = [f"call{count + index:05d}" for index in range(len(calls))]
            count += len(calls)
            message["tool_calls"] = [{"id": name} | dict(call) for name, call in zip(waiting, calls, strict=True)]
        elif message["role"] == "tool" and waiting:
            message = {"tool_call_id": waiting.pop(0)} | message
        numbered.append(message)
    return numbered


def fold_system(conversation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with its opening system text before the first question, for models without system turns."""
    conversation = [dict(message) for message in conversation]
    if not conversation or conversation[0]["role"] != "system":
        return conversation
    system, *rest = conversation
    if rest and rest[0]["role"] == "user":
        return [rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [system | {"role": "user"}, *rest]
