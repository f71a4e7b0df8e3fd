"""Reviewing: nothing without the token, every decision on disk at once, the rows' file untouched, edits checked."""

from __future__ import annotations

import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weitiao.cli import main
from weitiao.data.review import Review, server_of
from weitiao.data.sources import DataOptions, read

ROWS = [{"question": f"<b>问{i}", "answer": "好"} for i in range(4)] + [{"question": "空", "answer": ""}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def served(file: Path) -> Iterator[str]:
    server, url = server_of(Review(file, DataOptions(), file.with_name("patch.jsonl")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield url
    server.shutdown()
    server.server_close()


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_page_and_its_decisions(served: str, file: Path):
    before, patch = file.read_bytes(), file.with_name("patch.jsonl")
    status, html = ask(served)
    assert status == 200 and "<script>" in html and "http" not in html.replace("http-equiv", "") and "src=" not in html
    rows = json.loads(ask(served + "rows")[1])
    assert [row["where"] for row in rows] == [f"rows.jsonl:{n}" for n in range(1, 6)] and "empty answer" in rows[4][
        "problem"
    ]
    assert ask(served + "decide", {"number": 0, "action": "accept"})[0] == 200
    assert ask(served + "decide", {"number": 1, "action": "reject"})[0] == 200
    assert ask(served + "decide", {"number": 2, "action": "edit", "row": ROWS[2] | {"answer": "改"}})[0] == 200
    assert ask(served + "decide", {"number": 2, "action": "edit", "row": ROWS[2] | {"answer": "再改"}})[0] == 200
    assert ask(served + "decide", {"number": 4, "action": "edit", "row": ROWS[4] | {"answer": "满"}})[0] == 200
    assert len(patch.read_text(encoding="utf-8").splitlines()) == 5 and file.read_bytes() == before
    source = read(file, DataOptions(patch=str(patch)))
    answers = [row.messages[1].content for row in source.rows]  # type: ignore[union-attr]
    assert answers == ["好", "再改", "好", "满"]
    again = Review(file, DataOptions(), patch)
    assert again.counts() == {"accept": 1, "edit": 2, "reject": 1, "left": 1}


def test_nothing_without_the_token_and_nothing_that_is_no_decision(served: str, file: Path):
    port = served.split(":")[2].split("/")[0]
    for url in (f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/wrong/rows", served + "../rows", served + "x"):
        assert ask(url)[0] == 404
    assert ask(served + "rows", None, Host="evil.example:80")[0] == 404
    for body in (
        {"number": 9, "action": "accept"},
        {"number": -1, "action": "accept"},
        {"number": 0, "action": "drop"},
        {"number": 0, "action": "edit", "row": {"question": "x", "answer": ""}},
        {"number": 0, "action": "edit", "row": [1]},
        {"action": "accept"},
        [],
    ):
        status, answer = ask(served + "decide", body)
        assert status == 400 and json.loads(answer)["problem"]
    assert ask(served + "decide", {"number": 0, "action": "accept"}, **{"Content-Type": "text/plain"})[0] == 400
    assert not file.with_name("patch.jsonl").exists()


def test_the_terminal(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("EDITOR", raising=False)
    edited = json.dumps(ROWS[2] | {"answer": "改"}, ensure_ascii=False)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"a\nx\nr\ne\nnot JSON\ne\n{edited}\ns\nq\n"))
    assert main(["data", "review", str(file), "--terminal"]) == 0
    patch = file.with_name("rows.patch.jsonl")
    assert "1 accepted, 1 edited, 1 rejected, 2 left" in capsys.readouterr().err
    out = file.with_name("clean.jsonl")
    words = ["data", "clean", str(file), f"patch={patch}", "--near", "0", "--output", str(out), "--min-characters", "1"]
    assert main(words) == 0
    assert [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()] == ["好", "改", "好"]
