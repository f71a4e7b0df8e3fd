"""A model behind an address: good answers, calls, and every way in which a server can be bad."""

from __future__ import annotations

import json
import os

import pytest

from tests.evaluate.stub import said, serving
from weitiao.data.rows import Call, Message
from weitiao.errors import InputError, RunError
from weitiao.evaluate.endpoint import KEY, open_endpoint

QUICK = {"pause_seconds": 0.001, "tries": 3}


def prompt(text: str):
    return ([Message("user", text)], ())


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)


def test_answers_come_in_order_and_are_counted(monkeypatch):
    monkeypatch.setenv(KEY, " secret ")
    with serving(lambda body, _: said("re: " + body["messages"][-1]["content"])) as (url, seen):
        endpoint = open_endpoint(url)
        assert endpoint.model == "only" and "secret" not in repr(endpoint)
        answers = endpoint.answer_all([prompt(str(number)) for number in range(20)], 16)
    assert [answer.content for answer in answers] == [f"re: {number}" for number in range(20)]
    assert {answer.prompt_tokens for answer in answers} == {7} and {answer.new_tokens for answer in answers} == {3}
    assert {one["key"] for one in seen} == {"Bearer secret"} and {one["path"] for one in seen} == {
        "/v1/chat/completions"
    }
    assert all(one["body"]["max_tokens"] == 16 and one["body"]["temperature"] == 0 for one in seen)


def test_calls_and_results_have_ids_and_are_read_back():
    call = {"id": "x", "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}
    broken = {"id": "y", "type": "function", "function": {"name": "find", "arguments": "[1]"}}
    messages = [
        Message("user", "go"),
        Message("assistant", calls=(Call("find", {"b": "二"}), Call("find", {}))),
        Message("tool", "[]", name="find"),
        Message("tool", "{}", name="find"),
    ]
    with serving(lambda *_: said("", tool_calls=[call, broken])) as (url, seen):
        (answer,) = open_endpoint(f"{url}#m").answer_all([(messages, [{"type": "function"}])], 8)
    assert answer.calls == (Call("find", {"a": 1}),) and len(answer.problems) == 1
    sent = seen[0]["body"]["messages"]
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"b": "二"}
    assert [one["id"] for one in sent[1]["tool_calls"]] == [one["tool_call_id"] for one in sent[2:]]
    assert seen[0]["body"]["tools"] and seen[0]["body"]["model"] == "m"


BAD = {
    "busy": (429, {"Retry-After": "0"}, b"slow down"),
    "down": (503, {}, b""),
    "not JSON": (200, {}, b"<html>proxy</html>"),
    "no choices": (200, {}, b'{"error": "?"}'),
    "a list": (200, {}, b"[]"),
    "cut": (200, {"Content-Length": "999"}, b'{"choices'),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_once_is_asked_again_and_what_stays_bad_is_named(name):
    with serving(lambda _, number: BAD[name] if number == 1 else said("ok")) as (url, seen):
        (answer,) = open_endpoint(f"{url}#m", timeout_seconds=2, **QUICK).answer_all([prompt("a")], 8)
        assert answer.content == "ok" and len(seen) == 2
    if name == "cut":
        return
    with serving(lambda *_: BAD[name]) as (url, seen), pytest.raises(RunError) as error:
        open_endpoint(f"{url}#m", **QUICK).answer_all([prompt("a")], 8)
    assert len(seen) == 3 and url in str(error.value) and "3" in str(error.value)


@pytest.mark.parametrize("status", [401, 404, 302])
def test_a_refusal_is_not_asked_again_and_leads_nowhere_else(status, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    with serving(lambda *_: said("stolen")) as (other, stolen):
        refused = (status, {"Location": f"{other}/chat/completions"}, b"who are you")
        with serving(lambda *_: refused) as (url, seen), pytest.raises(InputError) as error:
            open_endpoint(f"{url}#m", **QUICK).answer_all([prompt("a")], 8)
    assert len(seen) == 1 and not stolen
    assert str(status) in str(error.value) and "secret" not in str(error.value)


def test_what_was_answered_is_not_asked_again(tmp_path):
    cache = tmp_path / "answers.jsonl"

    def respond(body, number):
        return said("ok") if number <= 2 else (500, {}, b"")

    prompts = [prompt(letter) for letter in "abcd"]
    with serving(respond) as (url, seen):
        with pytest.raises(RunError):
            open_endpoint(f"{url}#m", cache, at_once=1, **QUICK).answer_all(prompts, 8)
        cache.write_text(cache.read_text() + '["cut')  # as a kill leaves it
        assert [json.loads(line)[1] for line in cache.read_text().splitlines()[:2]]
        with pytest.raises(RunError):
            open_endpoint(f"{url}#m", cache, at_once=1, **QUICK).answer_all(prompts, 8)
        asked = [one["body"]["messages"][0]["content"] for one in seen]
        assert asked.count("a") == asked.count("b") == 1
        assert len(open_endpoint(f"{url}#m", cache, **QUICK).answer_all(prompts[:2], 8)) == 2


def test_a_key_is_never_sent_unencrypted_and_silence_is_named(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    with pytest.raises(InputError, match="https"):
        open_endpoint("http://192.0.2.1/v1#m")
    monkeypatch.setenv(KEY, "sec\x7fret")
    with pytest.raises(InputError, match=KEY):
        open_endpoint("https://192.0.2.1/v1#m")
    monkeypatch.delenv(KEY)
    with pytest.raises(InputError, match="#MODEL"):
        open_endpoint("http://127.0.0.1:9/v1", timeout_seconds=1)
    assert KEY not in os.environ
