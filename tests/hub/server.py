"""A hub on the loopback that does wrong what it is told to: the hub's API, ModelScope's, a Seafile share, plain files.

    with serving({"org/tiny": {"config.json": b"{}"}}) as hub:
        hub.faults.extend([Fault("cut", 1000), Fault("status", value=503)])     # of the next two replies with a file
        fetch.fetch("org/tiny", web=Web(), ...)

``hub.sent`` counts the bytes of files that went out, ``hub.seen`` the requests with the key that each brought.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARE = "fb9f16d6dc8f482596c2"
LARGE = (".safetensors", ".bin")  # what the hub keeps in LFS, named by sha256
CHUNK = 16 << 10
BUFFER_BYTES = 16 << 10  # of a socket: what lies there at a kill was sent, and no program has seen it
KINDS = (
    *("cut", "flip", "status", "stall", "trickle", "ignore_range", "wrong_range", "no_length", "wrong_length"),
    *("changed", "redirect", "circle", "gzip", "empty"),
)


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one reply: ``at`` a byte of its body (counted round and round, but by ``every``, a cut after
    so many bytes if there are as many), with a ``value`` (a status, seconds)."""

    kind: str
    at: int = 0
    value: float = 0


def sha1_of_git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def flipped(data: bytes, at: int) -> bytes:
    """One bit of a byte turned."""
    at %= max(1, len(data))
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :] if data else data


class Server(ThreadingHTTPServer):
    """What the little hub has, was asked, and does wrong."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Hub)
        self.repositories = {name: dict(files) for name, files in repositories.items()}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: deque[Fault] = deque()  # one for each of the next replies with a file
        self.always: Fault | None = None  # for every reply that has none of its own
        self.metadata: deque[Fault] = deque()  # for the next replies without a file
        self.cdn = ""  # where large files are redirected to
        self.seen: list[tuple[str, str, str]] = []  # host, "GET /path", the key
        self.ranges: list[str] = []
        self.sent = self.cuts = 0
        self.watch: tuple[int, threading.Event] | None = None  # set when so many bytes were sent
        self.lock = threading.Lock()
        self.hashes: dict[bytes, tuple[str, str]] = {}

    @property
    def requests(self) -> list[str]:
        return [request for _, request, _ in self.seen]

    def names(self, data: bytes) -> tuple[str, str]:
        """git's sha1 and the sha256 of a file, each computed once."""
        if data not in self.hashes:
            self.hashes[data] = sha1_of_git(data), hashlib.sha256(data).hexdigest()
        return self.hashes[data]

    def count(self, number: int) -> None:
        with self.lock:
            self.sent += number
            if self.watch and self.sent >= self.watch[0]:
                self.watch[1].set()

    def handle_error(self, *_: object) -> None:
        """A client that went away is none of ours."""


class Hub(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        super().setup()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def as_json(self, value: object, **headers: str) -> None:
        body = json.dumps(value).encode()
        fault = self.server.metadata.popleft() if self.server.metadata else None
        if fault and fault.kind == "status":
            return self.answer(int(fault.value), Retry_After="0")
        if fault and fault.kind == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: fault.at])
            self.close_connection = True
            return None
        if fault and fault.kind == "page":  # of a captive portal
            return self.answer(200, b"<html>please log in</html>", Content_Type="text/html")
        return self.answer(200, body, Content_Type="application/json", **headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        key = self.headers.get("Authorization") or ""
        self.server.seen.append((self.headers.get("Host", ""), f"{self.command} {self.path}", key))
        parts = urlsplit(self.path)
        words, query = unquote(parts.path).strip("/").split("/"), parse_qs(parts.query)
        with contextlib.suppress(ConnectionError):
            if words[:2] == ["api", "v1"]:
                return self.modelscope(words[2:], query)
            if words[0] == "cdn":
                return self.file(self.server.repositories["/".join(words[1:3])]["/".join(words[3:])])
            if SHARE in words or words[0] == "seafhttp":
                return self.seafile(words, query)
            if words[0] == "plain":
                return self.file(self.server.repositories["plain"][words[1]], tag=f'"{len(words[1])}-1"')
            return self.hub(words)
        return None

    # ---- the hub ---------------------------------------------------------------------------------------------------

    def hub(self, words: list[str]) -> None:
        api, dataset = words[0] == "api", "datasets" in words[:2]
        words = words[2:] if api else words[1:] if dataset else words
        name = "/".join(words[:2])
        if name == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        stored = self.server.repositories.get(("datasets/" if dataset else "") + name)
        if stored is None:
            return self.answer(401, X_Error_Code="RepoNotFound")
        what, revision, path = words[2], words[3], "/".join(words[4:])
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if api and what == "revision":
            siblings = [{"rfilename": path} for path in stored]
            return self.as_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        if api and what == "tree":
            return self.tree([self.entry(path, data) for path, data in stored.items()])
        if path not in stored:
            return self.answer(404, X_Error_Code="EntryNotFound")
        entry = self.entry(path, stored[path])
        tag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        if self.server.cdn and "lfs" in entry and self.command == "GET":
            to = f"{self.server.cdn}/cdn/{'datasets/' if dataset else ''}{name}/{path}?sig=secret"
            return self.answer(302, Location=to, X_Repo_Commit=COMMIT, X_Linked_ETag=f'"{tag}"')
        return self.file(stored[path], tag=f'"{tag}"')

    def tree(self, entries: list[dict]) -> None:
        """Half of the files, then the rest, as the hub pages them."""
        half = (len(entries) + 1) // 2
        if "cursor=2" in self.path:
            return self.as_json(entries[half:])
        following = f'<{self.server.url}{self.path}&cursor=2>; rel="next"'
        return self.as_json(entries[:half], Link=following)

    def entry(self, path: str, data: bytes) -> dict:
        sha1, sha256 = self.server.names(data)
        found: dict = {"type": "file", "path": path, "size": len(data), "oid": sha1}
        if path.endswith(LARGE):
            found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return found

    # ---- ModelScope and Seafile ------------------------------------------------------------------------------------

    def modelscope(self, words: list[str], query: dict[str, list[str]]) -> None:
        name = "/".join(words[1:3])
        stored = self.server.repositories.get(name if words[0] == "models" else f"datasets/{name}")
        if stored is None or query["Revision"] != ["master"]:
            return self.answer(404)
        if words[3:] in (["repo", "files"], ["repo", "tree"]):
            files = [
                {"Path": path, "Size": len(data), "Sha256": self.server.names(data)[1], "Type": "blob"}
                for path, data in stored.items()
            ]
            return self.as_json({"Code": 200, "Data": {"Files": files}, "Success": True})
        path = query["FilePath"][0]
        return self.file(stored[path]) if path in stored else self.answer(404)

    def seafile(self, words: list[str], query: dict[str, list[str]]) -> None:
        stored = self.server.repositories["share"]
        if words[0] == "api":
            folder = query["path"][0].strip("/")
            inside = {path.removeprefix(f"{folder}/") if folder else path for path in stored if path.startswith(folder)}
            folders = {path.split("/")[0] for path in inside if "/" in path}
            found: list[dict] = [{"is_dir": True, "folder_path": f"/{folder}/{name}/"} for name in folders]
            for path in sorted(path for path in inside if "/" not in path):
                whole = f"{folder}/{path}" if folder else path
                found.append({"is_dir": False, "file_path": f"/{whole}", "size": len(stored[whole])})
            return self.as_json({"dirent_list": found})
        if words[0] == "seafhttp":
            return self.file(stored["/".join(words[2:])])
        return self.answer(302, Location=f"/seafhttp/token{query['p'][0]}")

    # ---- a file, and what goes wrong with it -----------------------------------------------------------------------

    def file(self, data: bytes, tag: str = "") -> None:
        if self.command == "HEAD":
            return self.head(data, tag)
        with self.server.lock:
            fault = self.server.faults.popleft() if self.server.faults else self.server.always
            self.server.cuts += fault is not None
        fault = fault or Fault("")
        self.server.ranges.append(self.headers.get("Range", ""))
        if fault.kind == "status":
            code = {"X_Error_Code": "GatedRepo"} if fault.value == 403 else {}
            return self.answer(int(fault.value), Retry_After="0", Connection="close", **code)
        if fault.kind in ("redirect", "circle"):
            again = self.path if fault.kind == "circle" else f"{self.path}{'&' if '?' in self.path else '?'}hop=1"
            return self.answer(302, Location=again)
        if fault.kind == "empty":
            self.close_connection = True
            return None
        if fault.kind == "odd_tag":  # as long as a hash, and none of the file's
            tag = f'"{"a" * 64}"'
        if fault.kind == "changed":
            data = flipped(data, fault.at)
            tag = f'"{self.server.names(data)[len(tag) == 66]}"' if tag else tag
        return self.body(data, tag, fault)

    def head(self, data: bytes, tag: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, "ETag": tag}.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self, data: bytes, tag: str, fault: Fault) -> None:
        size, asked = len(data), self.headers.get("Range", "")
        start, stop = 0, size
        ranged = asked.startswith("bytes=") and fault.kind not in ("ignore_range", "gzip")
        if ranged:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(size, int(last) + 1 if last else size)
            if start >= size:
                return self.answer(416, Content_Range=f"bytes */{size}")
        if fault.kind == "wrong_range" and ranged:
            start = (start + 1 + fault.at) % max(1, stop)
        part = data[start:stop]
        if fault.kind == "flip":
            part = flipped(part, fault.at)
        if fault.kind == "gzip":
            part = gzip.compress(part, 1)
        length = len(part) + (fault.at % 1000 - 500 if fault.kind == "wrong_length" else 0)
        self.send_response(206 if ranged else 200)
        headers = {"ETag": tag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", "Connection": "close"}
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if ranged else {}
        headers |= {"Content-Encoding": "gzip"} if fault.kind == "gzip" else {}
        headers |= {"Content-Length": str(max(0, length))} if fault.kind not in ("no_length", "gzip") else {}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        self.pour(part, fault)

    def pour(self, part: bytes, fault: Fault) -> None:
        """Send a body; stop, stall or dribble in it."""
        at = fault.at % (len(part) + 1) if fault.kind in ("cut", "stall", "trickle") else len(part)
        at = min(fault.at, len(part)) if fault.kind == "every" else at
        position = 0
        while position < len(part):
            if fault.kind in ("cut", "every") and position >= at:
                return
            if fault.kind == "stall" and position >= at:
                time.sleep(fault.value)
                return
            slow = fault.kind == "trickle" and at <= position < at + 64
            end = position + 1 if slow else min(position + CHUNK, len(part), at if position < at else len(part))
            if slow:
                time.sleep(fault.value)
            self.wfile.write(part[position:end])
            self.server.count(end - position)
            position = end


@contextlib.contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Server]:
    """A running server."""
    server = Server(repositories)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """``python -m tests.hub.server FOLDER --every 5000000``: a folder as org/NAME, each connection cut so often."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=0, help="cut every connection after so many bytes")
    options = parser.parse_args()
    files = {path.name: path.read_bytes() for path in sorted(options.folder.iterdir()) if path.is_file()}
    with serving({f"org/{options.folder.name}": files}) as server:
        server.always = Fault("every", options.every) if options.every else None
        print(f"export HF_ENDPOINT={server.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print(f"{server.sent} bytes of files sent in {len(server.ranges)} requests, {server.cuts} of them cut")


if __name__ == "__main__":
    main()
