"""An OpenAI-compatible endpoint that many prompts are sent to, patiently: at once, again, and never twice.

    endpoint = Endpoint(EndpointOptions(url="http://127.0.0.1:8000/v1", model="qwen"), Path("replies.jsonl"))
    replies = endpoint.ask([[{"role": "user", "content": "你好"}]])      # [Reply("您好！")]
    endpoint.count                                                      # requests, tokens, what they cost

Replies are kept in a file as they come, by the hash of what was asked: whoever starts again asks for the rest alone.
A 429 holds everybody back for as long as it says. The key is read from the environment, sent to that host, and nowhere
written.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field

from weitiao.config import Options
from weitiao.errors import RunError, t

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds
LARGEST_REPLY = 16 * 2**20  # bytes
Prompt = Sequence[Mapping[str, str]]


class EndpointOptions(Options):
    """Where the endpoint is, and how it is used."""

    url: str = Field(description="the endpoint's base, such as http://127.0.0.1:8000/v1", pattern=r"^https?://")
    model: str = Field(description="the model's name there")
    key_variable: str = Field(default="OPENAI_API_KEY", description="the environment variable that holds the key")
    concurrency: int = Field(default=4, ge=1, le=256, description="requests under way at once")
    timeout: float = Field(default=60.0, gt=0, description="seconds until a request is given up and sent again")
    retries: int = Field(default=5, ge=0, description="how often a request is sent again")
    temperature: float = Field(default=0.8, ge=0, le=2, description="how freely the model writes")
    max_tokens: int = Field(default=1024, ge=1, description="tokens of a reply at most")
    price_in: float = Field(default=0.0, ge=0, description="price of a million prompt tokens")
    price_out: float = Field(default=0.0, ge=0, description="price of a million tokens written")


@dataclass(frozen=True)
class Reply:
    """What was answered, or why nothing was."""

    text: str
    problem: str = ""


@dataclass
class Count:
    """What has been asked so far; tokens are those of replies that said so and were not kept before."""

    requests: int = 0
    kept: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class _Refused(Exception):
    """A request that may be sent again, after ``seconds`` if the endpoint has said so."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


class _SameHost(urllib.request.HTTPRedirectHandler):
    """No redirect is followed: it would take the key along."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


class Endpoint:
    """One endpoint with the file that keeps its replies. ``sleep`` and ``clock`` are for tests."""

    def __init__(
        self,
        options: EndpointOptions,
        kept: Path,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.options, self.path, self.count = options, kept, Count()
        self._sleep, self._clock, self._open_at = sleep, clock, 0.0
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._opener = urllib.request.build_opener(_SameHost)
        self._known = _read(kept)

    def ask(
        self, prompts: Sequence[Prompt], turn: int = 0, progress: Callable[[int], None] = lambda done: None
    ) -> list[Reply]:
        """The reply to every prompt; ``turn`` asks the same once more. RunError, with what came before kept, where the
        endpoint refuses altogether (a wrong key, no such model)."""
        self._stopped.clear()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            futures = [pool.submit(self._one, prompt, turn) for prompt in prompts]
            for future in futures:
                future.add_done_callback(lambda _: progress(1))
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                return [future.result() for future in futures if not future.cancelled()]
            finally:
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def cost(self) -> float:
        """What the tokens so far cost, in the money of the prices."""
        prices = self.options
        return (self.count.tokens_in * prices.price_in + self.count.tokens_out * prices.price_out) / 1e6

    def _one(self, prompt: Prompt, turn: int) -> Reply:
        body = {
            "model": self.options.model,
            "messages": [dict(message) for message in prompt],
            "temperature": self.options.temperature,
            "max_tokens": self.options.max_tokens,
        }
        key = sha256(json.dumps([self.options.url, body, turn], sort_keys=True).encode()).hexdigest()
        if key in self._known:
            with self._lock:
                self.count.kept += 1
            return Reply(self._known[key])
        reason = ""
        for attempt in range(self.options.retries + 1):
            self._wait_for_turn()
            if self._stopped.is_set():
                return Reply("", t("stopped"))
            try:
                return Reply(self._keep(key, self._send(body)))
            except _Refused as refused:
                reason = str(refused)
                self._hold(refused, attempt)
        with self._lock:
            self.count.failed += 1
        return Reply("", reason)

    def _send(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The decoded reply; _Refused where another try may help, RunError where none will."""
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(self.options.key_variable):
            headers["Authorization"] = f"Bearer {secret}"
        url = self.options.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with self._lock:
            self.count.requests += 1
        try:
            with self._opener.open(request, timeout=self.options.timeout) as response:
                found = json.loads(response.read(LARGEST_REPLY))
            found["choices"][0]["message"]["content"].strip()
            return found
        except urllib.error.HTTPError as error:
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise _Refused(f"HTTP {error.code}", _seconds(error.headers.get("Retry-After"))) from None
            said = error.read(300).decode("utf-8", "replace").strip()
            message = "{url}: HTTP {code}: {said}"
            if error.code in (401, 403):
                message = "{url}: HTTP {code}: {said} (the key is read from the environment variable {variable})"
            values = {"url": url, "code": error.code, "said": said, "variable": self.options.key_variable}
            raise RunError(t(message, **values)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Refused(f"{type(error).__name__}: {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Refused(t("the reply is not that of a chat completion")) from None

    def _wait_for_turn(self) -> None:
        """Wait until nobody has been told to hold back."""
        while not self._stopped.is_set() and (rest := self._open_at - self._clock()) > 0:
            self._sleep(min(rest, 1.0))

    def _hold(self, refused: _Refused, attempt: int) -> None:
        """Hold everybody back where the endpoint says for how long, and this request alone where it does not."""
        if refused.seconds is not None:
            with self._lock:
                self._open_at = max(self._open_at, self._clock() + min(refused.seconds, LONGEST_WAIT))
        elif attempt < self.options.retries:
            self._sleep(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))

    def _keep(self, key: str, found: Mapping[str, Any]) -> str:
        """Write a reply to the file and count it."""
        usage = found.get("usage") if isinstance(found.get("usage"), Mapping) else {}
        tokens = [int((usage or {}).get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        text = str(found["choices"][0]["message"]["content"])
        line = json.dumps({"key": key, "text": text, "tokens": tokens}, ensure_ascii=False) + "\n"
        with self._lock:
            self.count.tokens_in += tokens[0]
            self.count.tokens_out += tokens[1]
            self._known[key] = text
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line)
        return text


def _seconds(header: str | None) -> float | None:
    """``Retry-After`` in seconds, be it a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _read(path: Path) -> dict[str, str]:
    """The replies kept in a file; a line that a kill has cut is left out, and ended so that the next one is whole."""
    found: dict[str, str] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            found[record["key"]] = record["text"]
        except (ValueError, LookupError, TypeError):
            continue
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return found
