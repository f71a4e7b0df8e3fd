"""Reviewing rows by hand: accept, edit or reject each, on a local page or in the terminal.

    weitiao data review rows.jsonl                     # prints a URL with a random token; Ctrl-C ends
    weitiao data clean rows.jsonl patch=rows.patch.jsonl

Every decision is a line of the patch file as soon as it is made (``patch.py``); the rows' own file is only read. The
page is served on 127.0.0.1 alone, to whoever has the token.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import typer

from weitiao.data.patch import ACTIONS, Decision, Patch, hash_of
from weitiao.data.sources import DataOptions, arguments, problem_of, scan
from weitiao.errors import InputError, language, say, t
from weitiao.runs import disk_error

LARGEST_REQUEST = 4 * 2**20  # bytes
HOSTS = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Item:
    """A row under review: its place, its record as the file has it, what is wrong with it, what was decided."""

    number: int
    line: int
    record: Any
    problem: str = ""
    decision: Decision | None = None


class Review:
    """The rows of one file and the decisions about them, written to ``patch`` as they are made."""

    def __init__(self, file: Path, options: DataOptions, patch: Path):
        source = scan(file, options, keep=True)
        found = [(line, record, "") for line, record in zip(source.lines, source.records, strict=True)]
        bad = [one for one in source.bad if isinstance(one.record, Mapping)]  # these can be mended
        found += [(int(one.where.rpartition(":")[2]), one.record, one.reason) for one in bad]
        known = Patch.read(patch).decisions if patch.exists() else {}
        self.file, self.options, self.patch, self.layout = file, options, patch, source.format
        self.items = [
            Item(number, line, record, problem, known.get(hash_of(record)))
            for number, (line, record, problem) in enumerate(sorted(found, key=lambda one: one[0]))
        ]
        self._lock = Lock()

    def decide(self, number: int, action: str, row: Any = None) -> Item:
        """Keep a decision about a row; InputError for an action or an edit that is none."""
        if not isinstance(number, int) or not 0 <= number < len(self.items):
            raise InputError(t("no row {number}", number=number))
        if action not in ACTIONS:
            names = ", ".join(ACTIONS)
            raise InputError(t("action: {found} is not one of {names}", found=json.dumps(action), names=names))
        if action == "edit" and (problem := problem_of(row, self.options, self.layout)):
            raise InputError(problem)
        item = self.items[number]
        decision = Decision(hash_of(item.record), action, row if action == "edit" else None, self.file.name, item.line)
        line = json.dumps(decision.to_dict(), ensure_ascii=False, default=str) + "\n"
        with self._lock:
            try:
                with self.patch.open("a", encoding="utf-8") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise disk_error(error, self.patch, len(line.encode())) from error
            self.items[number] = replace(item, decision=decision)
        return self.items[number]

    def shown(self, item: Item) -> dict[str, Any]:
        """An item as the page reads it."""
        edited = item.decision is not None and item.decision.action == "edit"
        return {
            "number": item.number,
            "where": f"{self.file.name}:{item.line}",
            "row": item.decision.row if edited and item.decision else item.record,
            "problem": "" if edited else item.problem,
            "action": item.decision.action if item.decision else "",
        }

    def counts(self) -> dict[str, int]:
        """How many rows were accepted, edited and rejected, and how many are left."""
        made = [item.decision.action if item.decision else "left" for item in self.items]
        return {name: made.count(name) for name in (*ACTIONS, "left")}


# ---- the page --------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """``/TOKEN/`` is the page, ``/TOKEN/rows`` the rows, ``/TOKEN/decide`` takes decisions; all else is not there."""

    def do_GET(self) -> None:
        server: Any = self.server
        if (path := self._path()) == "":
            self._answer(200, server.page.encode(), "text/html; charset=utf-8")
        elif path == "rows":
            self._json([server.review.shown(item) for item in server.review.items])

    def do_POST(self) -> None:
        server: Any = self.server
        if self._path() != "decide":
            return
        try:
            size = int(self.headers.get("Content-Length") or 0)
            if not 0 < size <= LARGEST_REQUEST or self.headers.get_content_type() != "application/json":
                raise InputError(t("the request is not a decision"))
            asked = json.loads(self.rfile.read(size))
            item = server.review.decide(asked["number"], asked["action"], asked.get("row"))
            self._json(server.review.shown(item))
        except InputError as error:
            self._json({"problem": str(error)}, 400)
        except (ValueError, LookupError, TypeError, AttributeError):
            self._json({"problem": t("the request is not a decision")}, 400)

    def _path(self) -> str | None:
        """What is asked for behind the token; without the token, or from another host's page, nothing is there."""
        server: Any = self.server
        token, _, path = self.path.lstrip("/").partition("/")
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        allowed = hmac.compare_digest(token.encode(), server.token.encode()) and host in HOSTS
        if allowed and path in ("", "rows", "decide"):
            return path
        self._answer(404, b"", "text/plain")
        return None

    def _json(self, found: Any, code: int = 200) -> None:
        self._answer(code, json.dumps(found, ensure_ascii=False, default=str).encode(), "application/json")

    def _answer(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: requests hold the token."""


def server_of(review: Review, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server of the page on 127.0.0.1, and its URL; port 0 takes a free one."""
    try:
        server: Any = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    except OSError as error:
        raise InputError(t("--port {port}: {reason}", port=port, reason=error.strerror)) from None
    server.review, server.token, server.page = review, secrets.token_urlsafe(24), page(review)
    return server, f"http://127.0.0.1:{server.server_port}/{server.token}/"


def page(review: Review) -> str:
    """The page, in the person's language."""
    from jinja2 import Environment

    words = {
        "accept": t("accept (a)"),
        "reject": t("reject (r)"),
        "edit": t("edited"),
        "save": t("save the edit"),
        "back": t("back (k)"),
        "next": t("next (j)"),
        "open": t("undecided ones only"),
        "undecided": t("undecided"),
        "none": t("no rows"),
    }
    text = (files("weitiao.data") / "review.jinja").read_text(encoding="utf-8")
    title = t("review of {file}", file=review.file.name)
    return Environment(autoescape=True).from_string(text).render(words=words, title=title, language=language())


# ---- the terminal ----------------------------------------------------------------------------------------------------


def terminal(review: Review) -> None:
    """Every undecided row in turn: a letter from stdin decides."""
    for item in [item for item in review.items if item.decision is None]:
        shown = review.shown(item)
        print(f"\n{shown['where']}  ({item.number + 1} / {len(review.items)})  {shown['problem']}")
        print(json.dumps(item.record, ensure_ascii=False, indent=2, default=str))
        while True:
            print(t("a accept, r reject, e edit, s skip, q quit: "), end="", flush=True)
            word = sys.stdin.readline()
            if not word or word.strip() == "q":
                return
            if word.strip() == "s" or _decided(review, item, word.strip()):
                break


def _decided(review: Review, item: Item, letter: str) -> bool:
    """Whether a letter was a decision that could be kept."""
    try:
        action = {"a": "accept", "r": "reject", "e": "edit"}[letter]
        review.decide(item.number, action, _edited(item.record) if action == "edit" else None)
        return True
    except KeyError:
        return False
    except (InputError, ValueError) as error:
        print(error)
        return False


def _edited(record: Any) -> Any:
    """The record as a person edits it: in ``$EDITOR``, or as one line of JSON where there is none."""
    if not (editor := os.environ.get("EDITOR")):
        print(t("the row as one line of JSON: "), end="", flush=True)
        return json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory(prefix="weitiao-") as folder:
        path = Path(folder) / "row.json"
        path.write_text(json.dumps(record, ensure_ascii=False, indent=2, default=str), encoding="utf-8")
        subprocess.run([*shlex.split(editor), str(path)], check=False)
        return json.loads(path.read_text(encoding="utf-8"))


def verb(
    file: Annotated[str, typer.Argument(help="a file of rows")],
    settings: Annotated[list[str] | None, typer.Argument(help="data options, such as columns.prompt=问题")] = None,
    patch: Annotated[Path | None, typer.Option(help="where decisions are kept; FILE.patch.jsonl")] = None,
    in_terminal: Annotated[bool, typer.Option("--terminal", help="ask here instead of on a page")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="the page's port on 127.0.0.1; 0 takes a free one")] = 0,
) -> None:
    """Accept, edit or reject the rows of FILE by hand; decisions go to a patch file, FILE stays as it is."""
    names, options = arguments([file, *(settings or [])])
    if names != [file]:
        raise InputError(t("one file at a time; found {files}", files=", ".join(names)))
    path = Path(file)
    review = Review(path, options, patch or path.with_name(f"{path.stem}.patch.jsonl"))
    if in_terminal:
        terminal(review)
    else:
        server, url = server_of(review, port)
        print(url, flush=True)
        say("open this address; Ctrl-C ends, decisions are kept as they are made")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
    message = "{patch}: {accept} accepted, {edit} edited, {reject} rejected, {left} left; use it with patch={patch}"
    say(message, patch=review.patch, **review.counts())
