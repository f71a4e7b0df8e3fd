"""A model behind an address as a system that is measured: its name URL#MODEL, and what it is asked.

    endpoint = open_endpoint("http://127.0.0.1:8000/v1#qwen2.5-7b")     # the key, if one is needed: OPENAI_API_KEY
    answer_all(endpoint, [([Message("user", "你好")], ())], max_tokens=64)[0].content

How patiently it is asked, and what is kept, is told in ``data/endpoint.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.config import build
from weitiao.data.endpoint import Answer, Endpoint, EndpointOptions, is_address
from weitiao.data.messages import as_dicts, number_calls
from weitiao.data.rows import Message
from weitiao.errors import InputError, WeitiaoError, t
from weitiao.train.progress import counting

if TYPE_CHECKING:
    from weitiao.methods.io import Tuned

Prompt = tuple[Sequence[Message], Sequence[Mapping[str, Any]]]


def open_system(name: str, cache: Path | None = None) -> Tuned | Endpoint:
    """What a name on the command line stands for: an address, or a run, a folder or a model."""
    from weitiao.methods.io import open_model

    return open_endpoint(name, cache) if is_address(name) else open_model(name)


def open_endpoint(name: str, cache: Path | None = None, **patience: Any) -> Endpoint:
    """The endpoint that ``URL#MODEL`` names; without #MODEL the only model there. The key is OPENAI_API_KEY's.

    InputError: a key that cannot be sent, no model's name where there are several, no answer.
    """
    url, _, model = name.partition("#")
    values = {"url": url, "model": model, "temperature": 0.0, "timeout": 120.0} | patience
    endpoint = Endpoint(build(EndpointOptions, values), cache)
    if model:
        return endpoint
    try:
        names = endpoint.models()
    except WeitiaoError as error:
        message = "{url}: does not list its models ({reason}); write {url}#MODEL"
        raise InputError(t(message, url=url, reason=error)) from None
    if len(names) != 1:
        listed = ", ".join(names) or "–"
        raise InputError(t("{url}: which model? write {url}#MODEL with one of: {names}", url=url, names=listed))
    return Endpoint(build(EndpointOptions, values | {"model": names[0]}), cache)


def answer_all(endpoint: Endpoint, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
    """An answer to each prompt, in order. RunError where one stays unanswered, InputError where the address refuses."""
    bodies = [
        {"messages": _numbered(messages), "max_tokens": max_tokens} | ({"tools": list(tools)} if tools else {})
        for messages, tools in prompts
    ]
    done = count(1)
    with counting(t("asking {model}", model=endpoint.options.model)) as shown:
        return endpoint.ask(bodies, progress=lambda _: shown(next(done), len(bodies)), strict=True)


def _numbered(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with the ids that join calls and results in this protocol, and arguments as the text that it wants."""
    conversation = number_calls(as_dicts(messages))
    for message in conversation:
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            call["function"] = call["function"] | {"arguments": arguments}
    return conversation
