"""Conversations: history, the bounded tool loop, what is shown and what is not; the verb's loop over lines."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from weitiao.data.render import Renderer
from weitiao.data.rows import Call, Message
from weitiao.data.rows import Chat as Row
from weitiao.data.sources import DataOptions, read
from weitiao.errors import InputError
from weitiao.generate.chat import (
    Chat,
    End,
    Problem,
    ShowText,
    TextDelta,
    ToolCall,
    ToolResult,
    converse,
    show_json,
    words,
)
from weitiao.generate.sample import SampleOptions
from weitiao.generate.toolset import Toolset, find_toolset, named_toolset, save_toolset
from weitiao.models import tiny
from weitiao.runs import Run

SCHEMA = {
    "name": "find",
    "description": "find hotels",
    "parameters": {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]},
}
CALL = Call("find", {"type": "经济型"})
QUESTION = Message("user", "找一家酒店")


class Scripted(nn.Module):
    """A model that writes given tokens, one list a prompt."""

    def __init__(self, tokenizer, positions: int = 4096):
        super().__init__()
        self.config = tiny.make_model("llama", tokenizer).config
        self.config.max_position_embeddings = positions
        self.nothing = nn.Parameter(torch.zeros(1))
        self.answers: list[list[int]] = []
        self.prompts: list[list[int]] = []

    @property
    def device(self):
        return self.nothing.device

    def forward(self, input_ids, past_key_values: Any, **_: Any):
        if input_ids.shape[1] > 1:
            self.prompts.append(input_ids[0].tolist())
            self.rest = list(self.answers.pop(0))
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[..., self.rest.pop(0)] = 1
        return SimpleNamespace(logits=logits)


def scripted(family: str, *answers: Message | str, positions: int = 4096) -> Any:
    """A tuned model that will write ``answers``, messages as the family's template writes them, texts as they are."""
    tokenizer = tiny.make_tokenizer(family)
    renderer = Renderer.of(tokenizer, tools=True)
    model = Scripted(tokenizer, positions)
    for answer in answers:
        if isinstance(answer, str):
            model.answers.append([*tokenizer.encode(answer, add_special_tokens=False), renderer.stop_ids[0]])
        else:
            rendered = renderer.renders([Row((QUESTION, answer), tools=(SCHEMA,))], train_on="last")[0][0]
            model.answers.append([i for i, trained in zip(rendered.ids, rendered.mask, strict=True) if trained])
    return SimpleNamespace(model=model, tokenizer=tokenizer, renderer=renderer)


def hotels(type: str):
    if type == "豪华型":
        raise LookupError("no such type")
    return {"count": 1, "hotels": [type]}


TOOLS = Toolset({"find": hotels}, (SCHEMA,))


def said(events) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def shown_of(events) -> str:
    out, show = io.StringIO(), ShowText()
    with contextlib.redirect_stdout(out):
        for event in events:
            show(event)
    return out.getvalue()


def kinds(events) -> list[type]:
    return [type(event) for event in events if not isinstance(event, TextDelta)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "glm", "gpt2", "phi3"])
def test_a_call_is_executed_and_answered(family):
    tuned = scripted(family, Message("assistant", calls=(CALL,)), Message("assistant", "为您找到一家。"))
    chat = Chat(tuned, TOOLS)
    events = list(chat.send(QUESTION.content))
    assert kinds(events) == [ToolCall, ToolResult, End]
    assert said(events) == "为您找到一家。"
    result = Message("tool", '{"count": 1, "hotels": ["经济型"]}', name="find")
    assert chat.messages == [
        QUESTION,
        Message("assistant", calls=(CALL,)),
        result,
        Message("assistant", "为您找到一家。"),
    ]
    assert tuned.model.prompts == [
        tuned.renderer.prompt(chat.messages[:1], TOOLS.schemas),
        tuned.renderer.prompt(chat.messages[:3], TOOLS.schemas),
    ]


def test_wrong_arguments_and_failing_tools_are_told_to_the_model():
    wrong, failing = Call("find", {"typ": "x"}), Call("find", {"type": "豪华型"})
    answers = [Message("assistant", calls=(call,)) for call in (wrong, failing, Call("fnd", {}))]
    chat = Chat(scripted("qwen2", *answers, Message("assistant", "抱歉。")), TOOLS)
    events = list(chat.send("x"))
    assert kinds(events) == [ToolCall, ToolResult, ToolCall, Problem, ToolResult, ToolCall, ToolResult, End]
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert [bool(call.problems) for call in calls] == [True, False, True]
    told = [json.loads(message.content)["error"] for message in chat.messages if message.role == "tool"]
    assert "typ" in told[0] and told[1] == "LookupError: no such type" and "fnd" in told[2]


def test_the_tool_loop_is_bounded():
    chat = Chat(scripted("qwen2", *[Message("assistant", calls=(CALL,))] * 5), TOOLS, rounds=3)
    events = list(chat.send("x"))
    assert kinds(events) == [ToolCall, ToolResult] * 3 + [Problem, End]


def test_calls_without_functions_are_shown_and_not_executed():
    chat = Chat(scripted("qwen2", Message("assistant", calls=(CALL,))), Toolset({}, (SCHEMA,)))
    assert kinds(chat.send("x")) == [ToolCall, End]
    assert chat.messages[-1].calls == (CALL,)


def test_an_unreadable_call_is_a_problem():
    chat = Chat(scripted("qwen2", '<tool_call>\n{"name": "find", "arg</tool_call>'), TOOLS)
    assert kinds(chat.send("x")) == [Problem, End]


def test_words_stream_and_call_markup_does_not():
    call = json.dumps({"name": "find", "arguments": CALL.arguments})
    tuned = scripted("qwen2", f"好的，我来找。\n<tool_call>\n{call}\n</tool_call>", "完。")
    events = list(Chat(tuned, TOOLS).send("x"))
    pieces = [event.text for event in events if isinstance(event, TextDelta)]
    assert "".join(pieces) == "好的，我来找。完。" and len(pieces) > 3
    assert shown_of(events).splitlines() == [
        "好的，我来找。",
        '→ find({"type": "经济型"})',
        '← {"count": 1, "hotels": ["经济型"]}',
        "完。",
    ]
    assert words("a < b <tool", "hermes") == "a < b" and words("a <b", "hermes") == "a <b"
    assert words("{", "llama3") == "" and words("a {", None) == "a {"


def test_a_cut_answer_is_said():
    chat = Chat(scripted("qwen2", "一二三四五六七八九十"), options=SampleOptions(max_new_tokens=2))
    assert kinds(chat.send("x")) == [Problem, End]


def test_history_reset_and_an_answer_that_is_broken_off():
    tuned = scripted("qwen2", "一", "二", "三")
    chat = Chat(tuned, system="系统")
    list(chat.send("x"))
    assert [message.role for message in chat.messages] == ["system", "user", "assistant"]
    before = list(chat.messages)
    events = chat.send("y")
    next(events)
    events.close()
    assert chat.messages == before
    chat.reset()
    assert chat.messages == before[:1]


def test_a_conversation_longer_than_the_model_keeps_its_history():
    chat = Chat(scripted("qwen2", "一", positions=60))
    list(chat.send("x"))
    before = list(chat.messages)
    with pytest.raises(InputError) as error:
        list(chat.send("长" * 200))
    assert "60" in str(error.value) and chat.messages == before


def test_a_saved_conversation_is_training_data(tmp_path):
    chat = Chat(scripted("qwen2", Message("assistant", calls=(CALL,)), "完。", "再见"), TOOLS, system="s")
    list(chat.send("x"))
    chat.save(tmp_path / "a.jsonl")
    chat.reset()
    list(chat.send("bye"))
    chat.save(tmp_path / "a.jsonl")
    rows = read(tmp_path / "a.jsonl", DataOptions()).rows
    assert [len(row.messages) for row in rows] == [5, 3]
    assert rows[0].messages[2].calls == (CALL,) and rows[0].tools


# --- toolsets


def builder(seed: int = 0):
    return {"find": hotels, "seed": lambda: seed}


def test_a_run_names_its_toolset(tmp_path):
    run = Run.create(tmp_path / "run", {}).path
    (run / "adapter").mkdir()
    assert find_toolset(run, {}) == Toolset()
    save_toolset(run, [SCHEMA], toolset="hotel", arguments={"seed": 7})
    for place in (run, run / "adapter"):
        found = find_toolset(place, {"hotel": builder})
        assert found.schemas == (SCHEMA,) and found.functions["seed"]() == 7


def test_a_toolset_that_is_not_here_is_said(tmp_path, capsys):
    save_toolset(tmp_path, [SCHEMA], toolset="hotel")
    assert find_toolset(tmp_path, {}) == Toolset({}, (SCHEMA,))
    assert "hotel" in capsys.readouterr().err


def test_named_toolsets(tmp_path):
    def find(type: str) -> str:
        """Find hotels."""
        return type

    found = named_toolset("hotel", {"hotel": lambda: {"find": find}})
    assert found.functions["find"] is find and len(found.schemas) == 1
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"type": "function", "function": SCHEMA}]))
    assert len(named_toolset(str(file), {}).schemas) == 1
    for content in ("{", "3", '{"schemas": 3}', '[{"nme": "x"}]'):
        file.write_text(content)
        with pytest.raises(InputError):
            named_toolset(str(file), {})
    with pytest.raises(InputError, match="hotel"):
        named_toolset("hotl", {"hotel": builder})


# --- the loop over lines


def test_lines_of_a_pipe(monkeypatch, capsys, tmp_path):
    chat = Chat(scripted("qwen2", Message("assistant", calls=(CALL,)), "一家。", "再见"), TOOLS)
    file = tmp_path / "kept.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"找酒店\n\n/save {file}\n/what\n/reset\n再见"))
    converse(chat, ShowText())
    captured = capsys.readouterr()
    assert captured.out == '→ find({"type": "经济型"})\n← {"count": 1, "hotels": ["经济型"]}\n一家。\n再见\n'
    assert "/what" in captured.err and file.exists()
    assert [message.content for message in chat.messages] == ["再见", "再见"]


def test_quit_ends_and_errors_do_not(monkeypatch, capsys):
    chat = Chat(scripted("qwen2", "好", "不", positions=60))
    monkeypatch.setattr("sys.stdin", io.StringIO("长" * 300 + "\n你好\n/quit\n你好\n"))
    converse(chat, show_json)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert lines == [{"type": "text", "text": "好"}, {"type": "end", "role": "assistant", "content": "好"}]


def test_rows_with_a_function_each_leave_no_toolset_and_say_so(tmp_path, capsys):
    save_toolset(tmp_path, [SCHEMA] * 33)
    assert "33" in capsys.readouterr().err
    save_toolset(tmp_path, [])
    assert not list(tmp_path.iterdir())
