"""A model behind an address that speaks OpenAI's chat protocol: many prompts at once, patiently, and none twice.

    endpoint = Endpoint(EndpointOptions(url="http://127.0.0.1:8000/v1", model="qwen"), Path("replies.jsonl"))
    endpoint.ask([{"messages": [{"role": "user", "content": "你好"}]}])[0].content      # "您好！"
    endpoint.count                                                                    # requests, tokens, their cost

Busy, slow, broken and non-JSON answers are asked for again with growing pauses; Retry-After holds everybody back.
Answers are kept in a file as they come, by the hash of what was asked, so that whoever starts again asks for the rest
alone. The key is read from the environment, sent to that address alone and never in the clear, and nowhere written.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from pydantic import Field, field_validator

from weitiao.config import Options
from weitiao.data.rows import Call
from weitiao.errors import InputError, RunError, t

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
LARGEST_REPLY = 16 * 2**20  # bytes
AGAIN = (408, 409, 425, 429)  # besides 5xx: the same may be answered later
Prompt = Mapping[str, Any]  # what a request's body has of its own: messages, and perhaps tools or max_tokens


class EndpointOptions(Options):
    """Where the endpoint is, and how it is used."""

    url: str = Field(description="the endpoint's base, such as http://127.0.0.1:8000/v1")
    model: str = Field(description="the model's name there")
    key_variable: str = Field(default="OPENAI_API_KEY", description="the environment variable that holds the key")
    concurrency: int = Field(default=4, ge=1, le=256, description="requests under way at once")
    timeout: float = Field(default=60.0, gt=0, description="seconds until a request is given up and sent again")
    retries: int = Field(default=5, ge=0, description="how often a request is sent again")
    temperature: float = Field(default=0.8, ge=0, le=2, description="how freely the model writes")
    max_tokens: int = Field(default=1024, ge=1, description="tokens of a reply at most")
    price_in: float = Field(default=0.0, ge=0, description="price of a million prompt tokens")
    price_out: float = Field(default=0.0, ge=0, description="price of a million tokens written")

    @field_validator("url")
    @classmethod
    def _base(cls, url: str) -> str:
        if not is_address(url):
            raise ValueError(t("expected http://… or https://…, found {found}", found=url))
        return url.rstrip("/").removesuffix("/chat/completions")


@dataclass(frozen=True)
class Answer:
    """One answer: words and calls, the tokens that the endpoint counted, whether it was cut at ``max_tokens``.
    ``problems`` are calls that cannot be read, or why there is no answer."""

    content: str
    calls: tuple[Call, ...] = ()
    problems: tuple[str, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    cut: bool = False


@dataclass
class Count:
    """What has been asked so far; tokens are those of answers that said so and were not kept before."""

    requests: int = 0
    kept: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class Unanswered(RunError):
    """A request that may be sent again, after ``seconds`` if the endpoint has said so."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


class _Stay(HTTPRedirectHandler):
    """No redirect is followed: it would take the key along."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """One endpoint with the file, if any, that keeps its answers. InputError: a key that cannot be sent."""

    def __init__(self, options: EndpointOptions, kept: Path | None = None):
        self.options, self.path, self.count = options, kept, Count()
        self._key, self._known, self._open_at = _key(options), _read(kept), 0.0
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._opener = build_opener(_Stay, *([ProxyHandler({})] if _is_here(options.url) else []))

    def ask(
        self,
        prompts: Sequence[Prompt],
        turn: int = 0,
        progress: Callable[[int], None] = lambda done: None,
        strict: bool = False,
    ) -> list[Answer]:
        """The answer to every prompt, in order; ``turn`` asks the same once more. What came before an error is kept.

        InputError where the endpoint refuses (a wrong key, no such model). What stays unanswered after all tries is an
        Answer with the reason as its problem; if ``strict``, RunError at once.
        """

        def one(prompt: Prompt) -> Answer:
            try:
                return self._one(prompt, turn, strict)
            except BaseException:
                self._stopped.set()  # before this thread takes up another prompt
                raise

        self._stopped.clear()
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            futures = [pool.submit(one, prompt) for prompt in prompts]
            for future in futures:
                future.add_done_callback(lambda _: progress(1))
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()  # raises before those that are still waiting are waited for
                return [future.result() for future in futures]
            finally:
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def models(self) -> list[str]:
        """The names of the models there. Unanswered, InputError: it does not tell."""
        found = self._request("/models")
        listed = found.get("data") if isinstance(found, dict) else None
        listed = listed if isinstance(listed, list) else []
        return [str(one["id"]) for one in listed if isinstance(one, dict) and "id" in one]

    def cost(self) -> float:
        """What the tokens so far cost, in the money of the prices."""
        prices = self.options
        return (self.count.tokens_in * prices.price_in + self.count.tokens_out * prices.price_out) / 1e6

    def _one(self, prompt: Prompt, turn: int, strict: bool) -> Answer:
        options = self.options
        body = {"model": options.model, "temperature": options.temperature, "max_tokens": options.max_tokens, **prompt}
        name = sha256(json.dumps([options.url, body, turn], sort_keys=True).encode()).hexdigest()
        if name in self._known:
            with self._lock:
                self.count.kept += 1
            return self._known[name]
        reason = ""
        for attempt in range(options.retries + 1):
            self._wait_for_turn()
            if self._stopped.is_set():
                return Answer("")  # nobody will see it
            try:
                with self._lock:
                    self.count.requests += 1
                found = self._request("/chat/completions", body)
                return self._keep(name, found, answer_of(found))
            except Unanswered as error:
                reason = str(error)
                self._hold(error.seconds, attempt)
        with self._lock:
            self.count.failed += 1
        if strict:
            message = "{url}: no usable answer in {tries} tries; the last: {reason}"
            raise RunError(t(message, url=options.url, tries=options.retries + 1, reason=reason))
        return Answer("", problems=(reason,))

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON behind one request; Unanswered where another try may help, InputError where none will."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "weitiao"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        response: Any
        try:
            request = Request(self.options.url + path, data, headers)
            try:
                response = self._opener.open(request, timeout=self.options.timeout)
            except HTTPError as error:
                response = error  # a response like others
            with response:
                code, again, content = response.status, response.headers["Retry-After"], response.read(LARGEST_REPLY)
        except (OSError, HTTPException, ValueError, OverflowError) as error:
            raise Unanswered(str(getattr(error, "reason", error)) or type(error).__name__) from None
        said = _start(content.decode("utf-8", "replace"))
        if code in AGAIN or code >= 500:
            raise Unanswered(f"HTTP {code} {said}".strip(), _seconds(again))
        if code >= 300:
            message = "{url}: refuses what it is asked: HTTP {code} {said}"
            if code in (401, 403):
                message = "{url}: HTTP {code}: {said} (the key is read from the environment variable {variable})"
            values = {"url": self.options.url, "code": code, "said": said, "variable": self.options.key_variable}
            raise InputError(t(message, **values))
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Unanswered(t("not JSON: {start}", start=said)) from None

    def _wait_for_turn(self) -> None:
        """Wait until nobody has been told to hold back."""
        while not self._stopped.is_set() and (rest := self._open_at - time.monotonic()) > 0:
            self._stopped.wait(rest)

    def _hold(self, seconds: float | None, attempt: int) -> None:
        """Hold everybody back for as long as the endpoint says, and this request a little longer at each attempt."""
        if seconds is not None:
            with self._lock:
                self._open_at = max(self._open_at, time.monotonic() + min(seconds, LONGEST_WAIT))
        if attempt < self.options.retries:
            spread = random.SystemRandom().uniform(0.75, 1.25)  # the seeds of others stay as they are
            self._stopped.wait(min(FIRST_WAIT * 2**attempt * spread, LONGEST_WAIT))

    def _keep(self, name: str, found: Any, answer: Answer) -> Answer:
        """Write a response to the file and count its tokens."""
        line = json.dumps([name, found], ensure_ascii=False) + "\n"
        with self._lock:
            self.count.tokens_in += answer.prompt_tokens
            self.count.tokens_out += answer.new_tokens
            self._known[name] = answer
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(line)
        return answer


def is_address(name: str) -> bool:
    """Whether a model's name is an address."""
    return name.startswith(("http://", "https://"))


def answer_of(found: Any) -> Answer:
    """What a response says; Unanswered where it is not in the protocol."""
    try:
        choice, usage = found["choices"][0], found.get("usage")
        message, counted = choice["message"], usage if isinstance(usage, dict) else {}
        content, calls, problems = message.get("content") or "", [], []
        if not isinstance(content, str):
            raise TypeError("parts of a content are what is sent, never what is answered")
        for one in message.get("tool_calls") or []:
            name, text = str(one["function"]["name"]), one["function"].get("arguments") or "{}"
            try:
                arguments = json.loads(text) if isinstance(text, str) else text
            except (ValueError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                calls.append(Call(name, arguments))
            else:
                problems.append(t("arguments that are no JSON object: {text}", text=_start(str(text))))
        numbers = (counted.get(name) for name in ("prompt_tokens", "completion_tokens"))
        read, written = (number if isinstance(number, int) else 0 for number in numbers)
        cut = choice.get("finish_reason") == "length"
        return Answer(content, tuple(calls), tuple(problems), read, written, cut)
    except (TypeError, LookupError, AttributeError):
        raise Unanswered(t("not an answer of the chat protocol: {start}", start=_start(json.dumps(found)))) from None


def _key(options: EndpointOptions) -> str:
    """The key, or nothing. InputError: one that would cross the network unencrypted, or that is none."""
    variable, key = options.key_variable, os.environ.get(options.key_variable, "").strip()
    if key and options.url.startswith("http://") and not _is_here(options.url):
        message = "{url}: the key in {variable} would be sent unencrypted; use https"
        raise InputError(t(message, url=options.url, variable=variable))
    if not (key.isascii() and key.isprintable()):
        raise InputError(t("{variable}: holds characters that no key has", variable=variable))
    return key


def _is_here(url: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _seconds(header: str | None) -> float | None:
    """``Retry-After`` in seconds, be it a number or a date."""
    try:
        return max(0.0, float(header or ""))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header or "").timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _read(path: Path | None) -> dict[str, Answer]:
    """The answers kept in a file; a line that a kill has cut is left out, and ended so that the next one is whole."""
    if path is None or not path.exists():
        return {}
    found, text = {}, path.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):  # splitlines() would cut at what JSON leaves as it is, such as U+2028
        try:
            name, response = json.loads(line)
            found[name] = answer_of(response)
        except (ValueError, TypeError, RecursionError, Unanswered):
            continue
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return found


def _start(text: str, characters: int = 200) -> str:
    """The beginning of a response on one line."""
    return " ".join(text.split())[:characters]
