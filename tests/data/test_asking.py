"""An endpoint that misbehaves in every way loses nothing, is not pressed, and never gets a key that is not its own."""

from __future__ import annotations

import json
import os
import threading
import time
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.stub import said, serving
from weitiao.config import build
from weitiao.data.endpoint import Answer, Endpoint, EndpointOptions
from weitiao.errors import InputError, RunError

KEY = "sk-this-is-secret"
FAULTS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "busy": (429, {"Retry-After": "0.05"}, b"slow down"),
    "down": (503, {}, b""),
    "not JSON": (200, {}, b"<html>proxy</html>"),
    "no choices": (200, {}, b'{"error": "?"}'),
    "a list": (200, {}, b"[]"),
    "parts": said([{"type": "text"}]),  # type: ignore[arg-type]
    "deep": (200, {}, b"[" * 100_000),
    "cut": (200, {"Content-Length": "999"}, b'{"choices'),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("weitiao.data.endpoint.FIRST_WAIT", 0.001)


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"问题 {number}"}]} for number in range(count)]


def endpoint(url: str, kept: Path | None = None, **options: Any) -> Endpoint:
    return Endpoint(build(EndpointOptions, {"url": url, "model": "m", **options}), kept)


@pytest.mark.parametrize("seed", range(2))
def test_an_endpoint_that_misbehaves_loses_nothing(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY} ")
    monkeypatch.setattr("weitiao.data.endpoint.LONGEST_WAIT", 0.05)
    draw, times, kept = Random(seed), dict[str, int](), tmp_path / "folder" / "kept.jsonl"

    def respond(body: dict[str, Any], _: int) -> tuple[int, dict[str, str], bytes]:
        text = body["messages"][0]["content"]
        times[text] = times.get(text, 0) + 1
        fault = draw.choice([*FAULTS, "slow", *["none"] * 5]) if times[text] < 4 else "none"
        time.sleep(1.5 if fault == "slow" else 0)
        return FAULTS.get(fault, said(f"答\u2028\ud800{text}"))

    options = {"retries": 30, "timeout": 1.0, "price_in": 1e6}
    with serving(respond) as (url, seen):
        first = endpoint(url, kept, **options)
        answers = first.ask(prompts(30))
        assert [answer.content for answer in answers] == [f"答\u2028\ud800问题 {number}" for number in range(30)]
        assert first.count.requests == len(seen) > 30 and first.count.failed == 0
        assert first.count.tokens_in == first.cost() == 210 and first.count.tokens_out == 90
        kept.write_bytes(kept.read_bytes()[:-9])  # as a kill leaves it
        times.update({prompt["messages"][0]["content"]: 9 for prompt in prompts(32)})
        for new, asked in ((31, 2), (32, 1)):  # whoever starts again asks for the rest alone
            again = endpoint(f"{url}/chat/completions", kept, **options)
            assert again.ask(prompts(new))[:30] == answers
            assert (again.count.requests, again.count.kept) == (asked, new - asked)
        assert again.ask(prompts(1), turn=1) == answers[:1] and again.count.requests == 2  # once more is another answer
    assert {(one["key"], one["path"]) for one in seen} == {(f"Bearer {KEY}", "/v1/chat/completions")}
    assert KEY not in kept.read_text(encoding="utf-8") and KEY not in repr(again)


@pytest.mark.parametrize("name", FAULTS)
def test_what_stays_bad_is_named_and_the_others_are_answered(name: str):
    def respond(body: dict[str, Any], _: int) -> tuple[int, dict[str, str], bytes]:
        return FAULTS[name] if body["messages"][0]["content"] == "问题 1" else said("ok")

    with serving(respond) as (url, seen):
        asked = endpoint(url, retries=2, timeout=0.5)
        answers = asked.ask(prompts(3))
        assert [answer.content for answer in answers] == ["ok", "", "ok"] and len(answers[1].problems) == 1
        assert (len(seen), asked.count.failed) == (5, 1)
        with pytest.raises(RunError) as error:
            endpoint(url, retries=2, timeout=0.5).ask(prompts(3), strict=True)
    assert url in str(error.value) and "3 tries" in str(error.value) and answers[1].problems[0] in str(error.value)


@pytest.mark.parametrize("status", [401, 404, 302])
def test_a_refusal_stops_at_once_and_leads_nowhere_else(status: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda *_: said("stolen")) as (other, stolen):
        refused = (status, {"Location": f"{other}/chat/completions"}, b"who are you")
        with serving(lambda *_: refused) as (url, seen), pytest.raises(InputError) as error:
            endpoint(url, key_variable="MY_KEY").ask(prompts(50))
    assert len(seen) < 20 and not stolen and KEY not in str(error.value)
    assert f"HTTP {status}" in str(error.value) and "who are you" in str(error.value)
    assert ("environment variable MY_KEY" in str(error.value)) == (status == 401)


@pytest.mark.parametrize("form", ["number", "date"])
def test_retry_after_holds_everybody_back(form: str):
    came: list[float] = []

    def respond(_: object, number: int) -> tuple[int, dict[str, str], bytes]:
        came.append(time.time())
        until = {"number": "0.4", "date": formatdate(time.time() + 2, usegmt=True)}[form]
        came.append(came[0] + 0.4 if form == "number" else parsedate_to_datetime(until).timestamp())
        return (429, {"Retry-After": until}, b"") if number == 1 else said("ok")

    with serving(respond) as (url, _):
        answers = endpoint(url, retries=0, concurrency=1).ask(prompts(2))  # the second was told nothing
    assert answers == [Answer("", problems=("HTTP 429",)), Answer("ok", prompt_tokens=7, new_tokens=3)]
    assert came[2] >= came[1] - 0.02


def test_as_many_are_under_way_as_may_be_and_no_more():
    under_way, most, lock, three = 0, 0, threading.Lock(), threading.Barrier(3)

    def respond(*_: object) -> tuple[int, dict[str, str], bytes]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        three.wait(30)
        with lock:
            under_way -= 1
        return said("ok")

    with serving(respond) as (url, _):
        assert {answer.content for answer in endpoint(url, concurrency=3, retries=0).ask(prompts(21))} == {"ok"}
    assert most == 3


def test_a_key_is_never_sent_unencrypted_and_what_is_no_address_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:1")  # nobody's: this machine is asked without it
    with serving(lambda *_: said("ok")) as (url, _):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert endpoint(url, timeout=5, retries=0).ask(prompts(1))[0].content == "ok"
    with pytest.raises(InputError, match="https"):
        endpoint("http://192.0.2.1/v1")
    for bad in ("sec\x7fret", "密钥"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(InputError, match="OPENAI_API_KEY"):
            endpoint("https://192.0.2.1/v1")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="url: expected http"):
        endpoint("192.0.2.1/v1")
    monkeypatch.delenv("http_proxy")
    for wrong in ("http://[::1", "http://127.0.0.1:x", "http://127.0.0.1:99999", "http://a b", "http://" + "a" * 70):
        assert endpoint(wrong, retries=0).ask(prompts(1))[0].problems
    assert json.dumps(dict(os.environ)).count(KEY) == 0
