"""A merged folder answers as the tuned model did, or it is not written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.train.support import method_of, rows, train
from weitiao.errors import InputError, RunError
from weitiao.export import merge as module
from weitiao.export.merge import merge
from weitiao.methods.io import open_model, save
from weitiao.methods.lora import LoRA
from weitiao.models import tiny


def tuned_run(tmp_path: Path, family: str, values: dict) -> Path:
    """A run that tuned a tiny model, with its result saved."""
    base = open_model(tiny.make(family, tmp_path / "base"), dtype="float32")
    method = method_of(values)
    model = method.attach(base.model)
    _, model, run = train(tmp_path / "run", rows(6), values, model=(model, method), options={"learning_rate": 0.05})
    save(model, method, base.tokenizer, base.renderer, getattr(run, method.saves), str(tmp_path / "base"))
    return run.path


@pytest.mark.parametrize("values", [{"name": "lora", "rank": 4}, {"name": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "qwen2"])
def test_equal_logits(tmp_path, family, values):
    run = tuned_run(tmp_path, family, values)
    found = merge(run, tmp_path / "merged", dtype="float32")
    assert found["merged_difference"] <= 1e-5 and found["saved_difference"] <= 1e-5 and found["largest_logit"] > 0
    ids = torch.arange(5, 30)[None]
    one, two = open_model(run, dtype="float32"), open_model(tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(two.model(input_ids=ids).logits, one.model(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert two.renderer.template == one.renderer.template and not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_merge_that_changes_outputs_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    run = tuned_run(tmp_path, "llama", {"name": "lora"})
    monkeypatch.setattr(LoRA, "merge", lambda self, model: model.unload())
    with pytest.raises(RunError, match="differ by"):
        merge(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_refuses_a_folder_with_something_in_it_and_a_plain_model(tmp_path):
    run = tuned_run(tmp_path, "llama", {"name": "lora"})
    with pytest.raises(InputError, match="exists already"):
        merge(run, tmp_path / "base")
    with pytest.raises(InputError, match="nothing to merge"):
        merge(tmp_path / "base", tmp_path / "merged")


def test_verb(tmp_path, capsys):
    run = tuned_run(tmp_path, "llama", {"name": "lora"})
    module.verb(run, tmp_path / "one")
    assert "largest difference of a logit" in capsys.readouterr().err
    module.verb(run, tmp_path / "two", True)
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "float32" and found["folder"] == str(tmp_path / "two")
