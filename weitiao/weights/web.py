"""Requests as a download needs them: what can pass is told from what cannot, and a key goes to its own host only.

    web = Web(keys={"https://huggingface.co": {"Authorization": "Bearer …"}})
    with web.open("https://huggingface.co/gpt2/resolve/main/config.json", {"Range": "bytes=0-99"}) as reply:
        for chunk in chunks(reply): ...

Redirects are followed here, hop by hop, because each hop is another host that must not see the keys of the one before.
The standard library's client does the rest; it takes proxies from the environment and never unpacks a body by itself,
so that bytes can be counted.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit, urlunsplit

from weitiao.errors import t

REDIRECTS = 10
JSON_LIMIT_BYTES = 64 << 20
CHUNK_BYTES = 64 << 10
RETRIED = (408, 416, 425, 429)  # and everything from 500 on
AGENT = "weitiao"
ResultT = TypeVar("ResultT")


class Fault(Exception):
    """A request that went wrong and may go well next time; ``wait`` is how many seconds the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):
    """The server's final no: the HTTP status and the hub's own word for it (``GatedRepo``, ``RepoNotFound``, …)."""

    def __init__(self, status: int, code: str = ""):
        super().__init__(f"HTTP {status}" + (f" {code}" if code else ""))
        self.status, self.code = status, code


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True)
class Web:
    """A client: for each origin the headers that only it may see, and the seconds without a byte that are too many."""

    keys: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    timeout_s: float = 30.0
    tries: int = 3  # of a request for metadata
    wait_s: float = 0.5
    _opener: Any = field(default_factory=lambda: urllib.request.build_opener(_NoRedirects), repr=False)

    def open(self, url: str, headers: Mapping[str, str] | None = None) -> Any:
        """The reply (status 200 or 206) at the end of all redirects; Fault or Refused if there is none."""
        first, seen = origin(url), {url}
        for _ in range(REDIRECTS):
            reply = self._once(url, headers or {})
            if reply.status not in (301, 302, 303, 307, 308):
                return _checked(reply, at_home=origin(url) == first)
            url = _next(url, reply.headers.get("Location") or "")
            reply.close()
            if url in seen:
                raise Fault(t("its redirects go round in a circle"))
            seen.add(url)
        raise Fault(t("it redirects more than {count} times", count=REDIRECTS))

    def _once(self, url: str, headers: Mapping[str, str]) -> Any:
        sent = {"User-Agent": AGENT, "Accept-Encoding": "identity", **headers, **self.keys.get(origin(url), {})}
        try:
            return self._opener.open(urllib.request.Request(bare(url), headers=sent), timeout=self.timeout_s)
        except urllib.error.HTTPError as reply:  # redirects come here, too
            return reply
        except (OSError, HTTPException, ValueError) as error:
            raise Fault(_reason(error)) from error

    def json(self, url: str) -> tuple[Any, Mapping[str, str]]:
        """The JSON value at an address and the reply's headers, after ``tries`` tries."""
        return self.again(lambda: self._json(url))

    def _json(self, url: str) -> tuple[Any, Mapping[str, str]]:
        with self.open(url, {"Accept": "application/json"}) as reply:
            body = b"".join(chunks(reply, JSON_LIMIT_BYTES))
            length = reply.headers.get("Content-Length", "")
            plain = reply.headers.get("Content-Encoding", "identity") == "identity"
            if plain and length.isdigit() and int(length) != len(body):
                raise Fault(t("cut after {found} of {size} bytes", found=len(body), size=length))
            try:
                return json.loads(body), reply.headers
            except (ValueError, RecursionError) as error:
                raise Fault(t("the answer is not JSON")) from error

    def again(self, work: Callable[[], ResultT]) -> ResultT:
        """``work`` until it goes well, at most ``tries`` times, with longer and longer waits between."""
        for number in range(self.tries - 1):
            try:
                return work()
            except Fault as fault:
                time.sleep(min(max(fault.wait, self.wait_s * 2**number), self.timeout_s))
        return work()


def _next(url: str, location: str) -> str:
    """Where a redirect leads; Fault unless it is http or https, and https if it was."""
    try:
        to = urljoin(url, location)
        origin(to)  # ValueError for a port that is none
        if (urlsplit(url).scheme, urlsplit(to).scheme) in (("http", "http"), ("http", "https"), ("https", "https")):
            return to
    except ValueError:
        pass
    raise Fault(t("it redirects to an address that is not safe"))


def chunks(reply: Any, limit: int | None = None) -> Iterator[bytes]:
    """A reply's body as it comes, unpacked if it was packed although nobody asked; Fault when the line breaks."""
    packing = reply.headers.get("Content-Encoding", "identity").lower()
    unpack = zlib.decompressobj(47) if packing in ("gzip", "x-gzip", "deflate") else None
    if unpack is None and packing not in ("identity", ""):
        raise Fault(t("it packs its answers ({how})", how=packing))
    total = 0
    try:
        while chunk := reply.read1(CHUNK_BYTES):
            while chunk:
                data = unpack.decompress(chunk, CHUNK_BYTES) if unpack else chunk  # a bomb comes in small pieces
                chunk = unpack.unconsumed_tail if unpack else b""
                total += len(data)
                if limit is not None and total > limit:
                    raise Fault(t("its answer is longer than {limit} bytes", limit=limit))
                if data:
                    yield data
    except (OSError, HTTPException, ValueError, zlib.error) as error:
        raise Fault(_reason(error)) from error


def _checked(reply: Any, at_home: bool) -> Any:
    """The reply if it is a good one. A no from the host that was redirected to may be a signed address that ran out."""
    if reply.status in (200, 206):
        return reply
    wait, code = _asked_wait(reply.headers), reply.headers.get("X-Error-Code") or ""
    reply.close()
    if reply.status in RETRIED or reply.status >= 500 or not at_home:
        raise Fault(f"HTTP {reply.status}", wait)
    raise Refused(reply.status, code)


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds of Retry-After, a number or a date (RFC 9110, 10.2.3), or of the hub's ``RateLimit: …;t=SECONDS``."""
    value = headers.get("Retry-After") or ""
    if re.fullmatch(r"\d{1,9}", value.strip()):
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    found = re.search(r";\s*t=(\d{1,9})", headers.get("RateLimit") or "")
    return float(found[1]) if found else 0.0


def _reason(error: Exception) -> str:
    """What went wrong on a line, on one line, without the address that was asked."""
    inner = getattr(error, "reason", None) or error
    if isinstance(inner, TimeoutError) or "timed out" in str(inner):
        return t("nothing came for too long")
    text = getattr(inner, "strerror", None) or " ".join(str(inner).split()) or type(inner).__name__
    return str(text)[:200]


# ---- addresses -----------------------------------------------------------------------------------------------------


def origin(url: str) -> str:
    """Scheme, host and port: what a key belongs to (RFC 6454)."""
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    return f"{parts.scheme}://{parts.hostname}:{port}"


def bare(url: str) -> str:
    """An address without the name and password that may stand in it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def shown(url: str) -> str:
    """An address as it may be written down: no password, and no query, which may hold a signature."""
    return urlunsplit(urlsplit(bare(url))._replace(query="", fragment=""))
