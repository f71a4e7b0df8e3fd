"""A model behind an address that speaks OpenAI's chat protocol (/chat/completions): answers, and what they cost.

    endpoint = open_endpoint("http://127.0.0.1:8000/v1#qwen2.5-7b")     # the key, if one is needed: OPENAI_API_KEY
    endpoint.answer_all([([Message("user", "你好")], ())], max_tokens=64)[0].content

Busy, slow, broken and non-JSON answers are asked for again, with growing pauses or as long as Retry-After says; what
the address has answered once is read from ``cache`` when the same is asked again, so that a run that stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from weitiao.data.messages import as_dicts, number_calls
from weitiao.data.rows import Call, Message
from weitiao.errors import InputError, RunError, WeitiaoError, t
from weitiao.train.progress import counting

KEY = "OPENAI_API_KEY"  # the variable that clients of this protocol read
LONGEST_PAUSE = 60.0
MOST_BYTES = 16 << 20  # of one answer
REFUSALS = (400, 401, 402, 403, 404, 405, 413, 422)  # asking again changes nothing
Prompt = tuple[Sequence[Message], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Answer:
    """One answer: words and calls, calls that cannot be read, the tokens that the address counted, whether it was cut
    at ``max_tokens``."""

    content: str
    calls: tuple[Call, ...] = ()
    problems: tuple[str, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    cut: bool = False


@dataclass(frozen=True)
class Endpoint:
    """An address, the model's name there, and how patiently it is asked; the key is never printed."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    tries: int = 6
    at_once: int = 4
    pause_seconds: float = 1.0
    timeout_seconds: float = 120.0
    cache: Path | None = None

    def answer_all(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        """An answer to each prompt, in order, several asked at once. RunError where one is not answered after all
        tries, InputError where the address refuses."""
        known, lock = self._known(), threading.Lock()

        def one(prompt: Prompt) -> Answer:
            body = self._body(prompt, max_tokens)
            name = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
            if name not in known:
                known[name] = self._post("/chat/completions", body)
                with lock:
                    self._keep(name, known[name])
            return _answer(known[name])

        done: list[Answer] = []
        with counting(t("asking {model}", model=self.model)) as progress, ThreadPoolExecutor(self.at_once) as pool:
            waiting = [pool.submit(one, prompt) for prompt in prompts]
            try:
                for number, future in enumerate(waiting, 1):
                    done.append(future.result())
                    progress(number, len(waiting))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return done

    def models(self) -> list[str]:
        """The names of the models there."""
        found = self._request("/models", None)
        listed = found.get("data") if isinstance(found, dict) else None
        return [str(one["id"]) for one in listed or [] if isinstance(one, dict) and "id" in one]

    def _body(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        messages, tools = prompt
        body = {"model": self.model, "messages": _numbered(messages), "max_tokens": max_tokens}
        return body | {"temperature": 0} | ({"tools": list(tools)} if tools else {})

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One answer that can be used, asked for up to ``tries`` times."""
        reason = ""
        for attempt in range(self.tries):
            wait = self.pause_seconds * 2**attempt * random.uniform(0.75, 1.25)
            try:
                found = self._request(path, body)
                _answer(found)
                return found
            except HTTPError as error:
                said = _start(error.read(2000))
                reason = f"HTTP {error.code} {said}"
                if error.code in REFUSALS or 300 <= error.code < 400:
                    message = "{url}: refuses what it is asked: HTTP {code} {said}"
                    raise InputError(t(message, url=self.url, code=error.code, said=said)) from None
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (URLError, HTTPException, OSError) as error:
                reason = str(getattr(error, "reason", error) or type(error).__name__)
            except ValueError as error:
                reason = str(error)
            if attempt + 1 < self.tries:
                time.sleep(min(wait, LONGEST_PAUSE))
        message = "{url}: no usable answer in {tries} tries; the last: {reason}"
        raise RunError(t(message, url=self.url, tries=self.tries, reason=reason))

    def _request(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """The JSON behind one request; ValueError where it is none."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "weitiao"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        request = Request(self.url + path, data, headers)
        handlers = [_Stay(), *([ProxyHandler({})] if _is_here(self.url) else [])]
        with build_opener(*handlers).open(request, timeout=self.timeout_seconds) as response:
            content = response.read(MOST_BYTES + 1)
        try:
            return json.loads(content) if len(content) <= MOST_BYTES else None
        except ValueError:
            raise ValueError(t("not JSON: {start}", start=_start(content))) from None

    def _known(self) -> dict[str, Any]:
        """What was answered before; a last line that was cut is asked for again."""
        if self.cache is None or not self.cache.is_file():
            return {}
        found = {}
        for line in self.cache.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                name, answer = json.loads(line)
                _answer(answer)
            except ValueError:
                continue
            found[name] = answer
        return found

    def _keep(self, name: str, answer: Mapping[str, Any]) -> None:
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, answer], ensure_ascii=False) + "\n")


class _Stay(HTTPRedirectHandler):
    """Goes nowhere else: a redirect would take the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """No redirect is followed; the answer counts as a refusal."""
        return None


def is_address(name: str) -> bool:
    """Whether a model's name is an address."""
    return name.startswith(("http://", "https://"))


def open_endpoint(name: str, cache: Path | None = None, **patience: Any) -> Endpoint:
    """The endpoint that ``URL#MODEL`` names; without #MODEL the only model there. The key is OPENAI_API_KEY's.

    InputError: a key that would cross the network unencrypted, no model's name where there are several, no answer.
    """
    url, _, model = name.partition("#")
    url, key = url.rstrip("/").removesuffix("/chat/completions"), (os.environ.get(KEY) or "").strip() or None
    if key and urlsplit(url).scheme == "http" and not _is_here(url):
        raise InputError(t("{url}: the key in {variable} would be sent unencrypted; use https", url=url, variable=KEY))
    if key and not key.isprintable():
        raise InputError(t("{variable}: holds characters that no key has", variable=KEY))
    endpoint = Endpoint(url, model, key, cache=cache, **patience)
    if model:
        return endpoint
    try:
        names = endpoint.models()
    except WeitiaoError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", error))
        raise InputError(
            t("{url}: does not list its models ({reason}); write {url}#MODEL", url=url, reason=reason)
        ) from None
    if len(names) != 1:
        listed = ", ".join(names) or "–"
        raise InputError(t("{url}: which model? write {url}#MODEL with one of: {names}", url=url, names=listed))
    return Endpoint(url, names[0], key, cache=cache, **patience)


def _is_here(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _numbered(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with the ids that join calls and results in this protocol, and arguments as the text that it wants."""
    conversation = number_calls(as_dicts(messages))
    for message in conversation:
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            call["function"] = call["function"] | {"arguments": arguments}
    return conversation


def _answer(found: Any) -> Answer:
    """What a response says; ValueError where it is not in the protocol."""
    try:
        choice = found["choices"][0]
        message, usage = choice["message"], found.get("usage") or {}
        content, listed = message.get("content") or "", message.get("tool_calls") or []
        calls, problems = [], []
        for one in listed:
            text = one["function"].get("arguments") or "{}"
            try:
                arguments = json.loads(text) if isinstance(text, str) else text
            except ValueError:
                arguments = None
            if isinstance(arguments, dict):
                calls.append(Call(str(one["function"]["name"]), arguments))
            else:
                problems.append(t("arguments that are no JSON object: {text}", text=_start(str(text).encode())))
        read, written = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        return Answer(
            str(content), tuple(calls), tuple(problems), read, written, choice.get("finish_reason") == "length"
        )
    except (TypeError, KeyError, IndexError, AttributeError):
        start = _start(json.dumps(found, ensure_ascii=False).encode())
        raise ValueError(t("not an answer of the chat protocol: {start}", start=start)) from None


def _seconds(retry_after: str | None) -> float:
    """What Retry-After asks for, where it is a number of seconds."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0


def _start(content: bytes, characters: int = 200) -> str:
    """The beginning of a response on one line."""
    return " ".join(content.decode("utf-8", "replace").split())[:characters]
