"""The bridge to lm-eval: likelihoods are the loop's own, and a task of one's own is measured row by row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from weitiao.cli import main
from weitiao.data.rows import Text
from weitiao.errors import InputError
from weitiao.evaluate.harness import _pair, likelihoods
from weitiao.evaluate.perplexity import measured
from weitiao.evaluate.tasks import EvaluateOptions, evaluate
from weitiao.methods.io import open_model

TASK = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: [blue, red]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tuned(tiny_llama: Path):
    return open_model(tiny_llama)


def test_likelihoods_are_those_of_perplexity(tuned):
    text = "the hotel is near the station"
    examples, losses = measured(tuned, [Text(text, id="a")])
    ids = examples[0].ids.tolist()
    ((value, _),) = likelihoods(tuned, [(ids[:1], ids[1:])])
    assert value == pytest.approx(-losses[0], abs=1e-3)
    parts = likelihoods(tuned, [(ids[:1], ids[1:4]), (ids[:4], ids[4:])])
    assert sum(part for part, _ in parts) == pytest.approx(value, abs=1e-3)


def test_the_likeliest_token_is_known_as_such(tuned):
    before = tuned.tokenizer("the hotel")["input_ids"]
    asked = [(before, [token]) for token in range(len(tuned.tokenizer))]
    found = likelihoods(tuned, asked)
    assert [likeliest for _, likeliest in found].count(True) == 1
    assert max(found)[1]


def test_a_space_belongs_to_what_follows(tuned):
    before, asked = _pair(tuned, "the hotel ", "is near")
    assert [*before, *asked] == tuned.tokenizer("the hotel is near", add_special_tokens=False)["input_ids"]
    assert before == tuned.tokenizer("the hotel", add_special_tokens=False)["input_ids"]
    assert len(_pair(tuned, "", "x")[0]) == 1


def test_without_the_package_it_says_how_to_install_it(tuned, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(InputError, match=r"weitiao\[lm-eval\]"):
        evaluate(tuned, EvaluateOptions(task="lm-eval", data="arc_easy"))


def test_a_recipe_names_no_task_of_lm_eval(tiny_llama, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    words = [f"model.path={tiny_llama}", f"data.train={rows}", f"output={tmp_path / 'run'}", "--dry-run"]
    assert main(["train", *words, f"evaluate={{task: lm-eval, data: {rows}}}"]) == 2
    assert "a recipe names no code" in capsys.readouterr().err


def test_a_task_of_ones_own(tiny_llama, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"colour {n} is", "label": n % 2}) + "\n" for n in range(8)))
    (tmp_path / "colours.yaml").write_text(TASK.format(rows=rows), encoding="utf-8")
    words = ["eval", str(tiny_llama), "--task", "lm-eval", "--data", str(tmp_path / "colours.yaml")]
    out = tmp_path / "out.jsonl"
    assert main([*words, "--json", "--predictions", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["acc"]["count"] == 8 and 0 <= found["acc"]["low"] <= found["acc"]["value"] <= 1
    assert len(out.read_text().splitlines()) == 8
    assert main([*words[:-1], "no_such_task"]) == 2
    assert "no_such_task" in capsys.readouterr().err
