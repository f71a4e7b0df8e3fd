"""A model behind an address as a system that is measured: its name, order and counts, calls, and going on."""

from __future__ import annotations

import json

import pytest

from tests.stub import said, serving
from weitiao.data.rows import Call, Message
from weitiao.errors import InputError, RunError
from weitiao.evaluate.endpoint import answer_all, open_endpoint


def prompt(text: str):
    return ([Message("user", text)], ())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("weitiao.data.endpoint.FIRST_WAIT", 0.001)


def test_answers_come_in_order_and_are_counted():
    with serving(lambda body, _: said("re: " + body["messages"][-1]["content"])) as (url, seen):
        endpoint = open_endpoint(url)
        assert endpoint.options.model == "only"
        answers = answer_all(endpoint, [prompt(str(number)) for number in range(20)], 16)
    assert [answer.content for answer in answers] == [f"re: {number}" for number in range(20)]
    assert {(answer.prompt_tokens, answer.new_tokens) for answer in answers} == {(7, 3)}
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
        (answer,) = answer_all(open_endpoint(f"{url}#m"), [(messages, [{"type": "function"}])], 8)
    assert answer.calls == (Call("find", {"a": 1}),) and len(answer.problems) == 1
    sent = seen[0]["body"]["messages"]
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"b": "二"}
    assert [one["id"] for one in sent[1]["tool_calls"]] == [one["tool_call_id"] for one in sent[2:]]
    assert seen[0]["body"]["tools"] and seen[0]["body"]["model"] == "m"


def test_what_was_answered_is_not_asked_again(tmp_path):
    cache = tmp_path / "answers.jsonl"
    prompts = [prompt(letter) for letter in "abcd"]
    with serving(lambda _, number: said("ok") if number <= 2 else (500, {}, b"")) as (url, seen):
        for _ in range(2):
            with pytest.raises(RunError, match=f"{url}.*3 tries"):
                answer_all(open_endpoint(f"{url}#m", cache, concurrency=1, retries=2), prompts, 8)
            cache.write_text(cache.read_text() + '["cut')  # as a kill leaves it
        asked = [one["body"]["messages"][0]["content"] for one in seen]
        assert asked.count("a") == asked.count("b") == 1 and "d" not in asked
        assert len(answer_all(open_endpoint(f"{url}#m", cache), prompts[:2], 8)) == 2


def test_silence_is_named():
    with pytest.raises(InputError, match="#MODEL"):
        open_endpoint("http://127.0.0.1:9/v1", timeout=1)
