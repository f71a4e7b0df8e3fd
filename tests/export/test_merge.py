"""A merged folder answers as the tuned model did, or it is not written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.train.support import method_of, rows, train
from weitiao.errors import InputError, RunError
from weitiao.export import merge as module
from weitiao.export.merge import difference, logits, merge, probe
from weitiao.methods import adapters
from weitiao.methods.base import trainable
from weitiao.methods.io import open_model, open_several, save
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


def adapters_of_one_base(tmp_path: Path, *options: dict) -> list[Path]:
    """LoRA adapters that differ, on one tiny base."""
    tiny.make("llama", tmp_path / "base")
    folders = []
    for number, values in enumerate(options):
        base = open_model(tmp_path / "base", dtype="float32")
        method = method_of({"name": "lora", **values})
        model = method.attach(base.model)
        draw = torch.Generator().manual_seed(number)
        for parameter in trainable(model).values():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
        folders.append(tmp_path / f"adapter-{number}")
        save(model, method, base.tokenizer, base.renderer, folders[-1], str(tmp_path / "base"))
    return folders


def test_several_adapters_are_switched_weighted_and_merged(tmp_path):
    options = [{"rank": 2}, {"rank": 4, "alpha": 3, "rslora": True, "target_modules": ["q_proj", "up_proj"]}]
    one, two = adapters_of_one_base(tmp_path, *options)
    several = open_several({"one": one, "two": two}, dtype="float32")
    ids = probe(several.model)
    for name, folder in (("one", one), ("two", two), ("one", one)):
        adapters.use(several.model, {name: 1.0})
        assert difference(logits(several.model, ids), logits(open_model(folder, dtype="float32").model, ids)) <= 1e-5
    found = merge([one, two], tmp_path / "sum", dtype="float32", weights=[0.7, -0.4])
    assert found["saved_difference"] <= 1e-5
    plain, changed = (open_model(tmp_path / name, dtype="float32").model for name in ("base", "sum"))
    deltas = [
        {name: open_merged(folder, tmp_path)[name] - weight for name, weight in plain.state_dict().items()}
        for folder in (one, two)
    ]
    for name, weight in changed.state_dict().items():
        wanted = plain.state_dict()[name] + 0.7 * deltas[0][name] - 0.4 * deltas[1][name]
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-5)


def open_merged(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    target = tmp_path / f"merged-{folder.name}"
    if not target.exists():
        merge(folder, target, dtype="float32")
    return open_model(target, dtype="float32").model.state_dict()


def test_what_cannot_stand_side_by_side_is_said(tmp_path):
    one, dora = adapters_of_one_base(tmp_path, {"rank": 2}, {"rank": 2, "dora": True})
    with pytest.raises(InputError, match="DoRA"):
        merge([one, dora], tmp_path / "out")
    with pytest.raises(InputError, match="2 adapters"):
        merge([one, dora], tmp_path / "out", weights=[1.0])
    with pytest.raises(InputError, match="not a LoRA adapter"):
        open_several({"one": one, "base": tmp_path / "base"})
    with pytest.raises(InputError, match="no adapter"):
        adapters.use(open_several({"one": one}).model, {"two": 1.0})
    (other,) = adapters_of_one_base(tmp_path / "elsewhere", {"rank": 2})
    with pytest.raises(InputError, match="made for the base"):
        open_several({"one": one, "other": other})


def test_verb(tmp_path, capsys):
    run = tuned_run(tmp_path, "llama", {"name": "lora"})
    module.verb([run], tmp_path / "one")
    assert "largest difference of a logit" in capsys.readouterr().err
    module.verb([run], tmp_path / "two", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "float32" and found["folder"] == str(tmp_path / "two")
