"""Tasks on real (tiny) models and files, from the command line's function down; perplexity is the loop's loss."""

from __future__ import annotations

import io
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from weitiao.cli import main
from weitiao.data.batch import Example
from weitiao.errors import InputError
from weitiao.evaluate import perplexity
from weitiao.evaluate.tasks import EvaluateOptions, evaluate
from weitiao.methods.io import open_model
from weitiao.models import tiny
from weitiao.runs import Run
from weitiao.train.course import Course
from weitiao.train.loop import Trainer
from weitiao.train.many import ALONE
from weitiao.train.options import TrainOptions
from weitiao.train.stopping import Stop
from weitiao.train.tasks import TaskOptions

SCHEMA = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "find",
        "parameters": {"type": "object", "properties": {"type": {"type": "string"}}},
    },
}


def conversation(number: int) -> dict:
    call = {"type": "function", "function": {"name": "find", "arguments": {"type": f"t{number}"}}}
    return {
        "messages": [
            {"role": "user", "content": f"hello {number}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "find", "content": "[]"},
            {"role": "assistant", "content": "nothing found"},
        ],
        "tools": [SCHEMA],
    }


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.make("qwen2", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    return jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", [conversation(number) for number in range(5)])


def some_examples(count: int = 40, vocabulary: int = 200) -> list[Example]:
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 40, count)
    return [
        Example(draw.integers(5, vocabulary, length).astype(np.int32), draw.random(length) < 0.6) for length in lengths
    ]


def test_perplexity_is_the_loss_of_the_loop_and_weighs_tokens(tmp_path):
    model = tiny.make("llama").eval()
    examples = [example for example in some_examples() if example.trained_tokens]
    found = perplexity.evaluate(model, examples, pad_id=0)
    options, task = TrainOptions(micro_batch_tokens=100), TaskOptions().build()
    from weitiao.methods import METHODS

    method = METHODS["full"]()
    trainer = Trainer(
        method.attach(model),
        method,
        task,
        options,
        Run.create(tmp_path / "run", {}),
        Course(examples, task, options),
        0,
        None,
        ALONE,
    )
    trainer.validation = examples
    with torch.no_grad(), Stop() as stop:
        assert found["loss"] == pytest.approx(trainer.validation_loss(stop)["loss"], rel=1e-6)
    total = 0.0
    for example in examples:  # by hand, row by row
        with torch.no_grad():
            logps = model(torch.tensor(example.ids[None].astype(np.int64))).logits[0].log_softmax(-1)
        total -= sum(float(logps[at - 1, example.ids[at]]) for at in range(1, len(example)) if example.mask[at])
    tokens = sum(example.trained_tokens for example in examples)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"])) and found["tokens"] == tokens


def test_bits_per_byte_counts_bytes_of_the_text(model, tmp_path):
    tuned = open_model(model)
    texts = ["x hello hotel", "a 你好，酒店"]
    first = [tuned.tokenizer.decode(tuned.tokenizer.encode(text)[0]) for text in texts]  # is never predicted
    assert first == ["x", "a"]
    data = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    figures = evaluate(tuned, EvaluateOptions(task="perplexity", data=data)).figures
    text_bytes = sum(len(text.encode()) - 1 for text in texts)
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] * figures["tokens"] / math.log(2) / text_bytes)


def test_no_token_to_measure(model):
    empty = [Example(np.array([1, 2], dtype=np.int32), np.array([True, False]))]
    with pytest.raises(InputError):
        perplexity.evaluate(tiny.make("llama"), empty, 0)


def test_dialogues_with_shots_and_predictions(model, chats, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    shots = jsonl(tmp_path / "shots.jsonl", [conversation(number) for number in range(5, 8)])
    command = ["eval", model, "--task", "dialogue", "--data", chats, "--shots", "2", "--shot-data", shots]
    command += ["--max-new-tokens", "8", "--predictions", str(out), "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert figures["slot_f1"]["count"] >= 5 and 0 <= figures["call_exact_match"]["value"] <= 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["turn"], line["gold"]["calls"]) for line in lines[:2]] == [
        (1, [{"name": "find", "arguments": {"type": "t0"}}]),
        (3, []),
    ]
    assert "cut" in captured.err  # random weights never end an answer


def test_perplexity_of_conversations_as_a_table(model, chats, capsys):
    assert main(["eval", model, "--task", "perplexity", "--data", chats]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_bad_usage_ends_with_2(model, chats, capsys, tmp_path):
    assert main(["eval", model, "--task", "dialog", "--data", chats]) == 2
    assert "dialogue" in capsys.readouterr().err
    assert main(["eval", model, "--task", "dialogue", "--data", str(tmp_path / "none.jsonl")]) == 2
    assert main(["eval", model, "--task", "dialogue", "--data", chats, "--shots", "2"]) == 2
    assert "shot_data" in capsys.readouterr().err
    assert main(["eval", model, "--task", "dialogue", "--data", chats, "--shots", "2", "--shot-data", chats]) == 2
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": "no conversation"}])
    assert main(["eval", model, "--task", "dialogue", "--data", texts]) == 2


def test_talking_to_a_model_folder(model, capsys, monkeypatch):
    assert main(["chat", model, "--once", "hello", "--max-new-tokens", "4", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["type"] == "end" and lines[-1]["role"] == "assistant"
    assert main(["chat", model, "--once", "hello", "--tools", "nothing-here"]) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", model, "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize("task", ["dialogue", "perplexity"])
def test_a_log_is_told_how_far_an_evaluation_is(task, model, chats, monkeypatch, capsys):
    """Even before the first answer of a batch is whole."""
    clock = SimpleNamespace(monotonic=itertools.count(0.0, 31.0).__next__)
    monkeypatch.setattr("weitiao.train.progress.time", clock)
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 64)
    assert main(["eval", model, "--task", task, "--data", chats, "--max-new-tokens", "8"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" left")]
    assert len(said) >= 3
    if task == "dialogue":
        assert said[0] == "answering: 0 of 10  – left" and said[-1].startswith("answering: 10 of 10 ")
    else:
        assert said[-1].startswith("measuring: 5 of 5 ")
