"""Replayed rows: their share, their seed, and that they are trained on and never measured."""

from __future__ import annotations

import json

import pytest

from weitiao.data.rows import Chat, Message
from weitiao.data.sources import DataOptions, load
from weitiao.errors import InputError
from weitiao.plan.prepare import prepare
from weitiao.recipe import Recipe, check
from weitiao.recipe import load as recipe


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    own = jsonl(tmp_path / "own.jsonl", [{"题": f"问{n}", "answer": "own"} for n in range(90)])
    general = [{"conversations": [{"from": "human", "value": f"g{n}"}, {"from": "gpt", "value": "general"}]}
               for n in range(60)]  # fmt: skip
    return own, jsonl(tmp_path / "general.jsonl", general)


def kinds(rows):
    return [row.messages[-1].content for row in rows]


def options(own, **more):
    return DataOptions(train=own, columns={"prompt": "题"}, **more)


@pytest.mark.parametrize("share", [0.05, 0.25])
def test_a_share_of_the_training_rows_and_none_that_is_measured(files, share):
    own, general = files
    splits = load(options(own, replay=general, replay_share=share), "sft")
    plain = load(options(own), "sft")
    found = kinds(splits.train)
    assert found.count("general") / len(found) == pytest.approx(share, abs=0.01)
    assert [row for row in splits.train if row.messages[-1].content == "own"] == plain.train
    assert splits.validation == plain.validation and "general" not in kinds(splits.validation)
    assert str(general) in splits.said[-1]


def test_the_seed_decides_which_and_where(files):
    own, general = files
    first, again, other = (load(options(own, replay=general), "sft", seed=seed).train for seed in (1, 1, 2))
    assert first == again
    assert {row.id for row in first if "general" in row.id} != {row.id for row in other if "general" in row.id}
    assert kinds(first)[-9:] != ["general"] * 9  # mixed in, not appended


def test_too_few_are_all_taken_and_it_is_said(files):
    own, general = files
    splits = load(options(own, replay=general, replay_share=0.6), "sft")
    assert kinds(splits.train).count("general") == 60 and "wanted" in splits.said[-1]


def test_a_generator_can_be_replayed_and_what_is_bad_is_named(files, tmp_path):
    own, _ = files
    made = [Chat((Message("user", "x"), Message("assistant", "general")), id=f"made-{n}") for n in range(50)]
    splits = load(options(own, replay="generate:it"), "sft", generators={"it": lambda seed: made})
    assert "general" in kinds(splits.train)
    text = jsonl(tmp_path / "text.jsonl", [{"text": "plain"}])
    with pytest.raises(InputError, match="sft"):
        load(options(own, replay=text), "sft")
    values = {
        "data": {"train": own, "columns": {"prompt": "题"}, "replay": "no.jsonl"},
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(InputError, match=r"data\.replay.*no\.jsonl"):
        check(*recipe(values))


def test_the_tools_of_replayed_rows_are_not_the_runs_own(tmp_path):
    def chat(tool, number):
        schema = {"type": "function", "function": {"name": tool, "parameters": {"type": "object", "properties": {}}}}
        messages = [{"role": "user", "content": f"问{number}"}, {"role": "assistant", "content": "答"}]
        return {"messages": messages, "tools": [schema]}

    own = jsonl(tmp_path / "own.jsonl", [chat("mine", number) for number in range(20)])
    general = jsonl(tmp_path / "general.jsonl", [chat(f"other_{number}", number) for number in range(20)])
    data = {"train": own, "validation": 0, "replay": general, "replay_share": 0.4}
    ready = prepare(Recipe.model_validate({"data": data, "output": str(tmp_path / "run")}), {}, tmp_path / "tokenizer")
    assert [schema["function"]["name"] for schema in ready.tools] == ["mine"]
    assert len(ready.train) == 33
