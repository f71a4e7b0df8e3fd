"""Adapters between PEFT and this project, bases that move, checkpoints opened by themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.train.support import method_of, rows, train
from weitiao.errors import InputError
from weitiao.methods.io import open_model, save
from weitiao.models import tiny
from weitiao.runs import Run
from weitiao.weights.folders import whole

FAMILIES = ["llama", "gpt2", "qwen3", "glm"]
IDS = torch.arange(5, 25)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["norm"]}, {"target_modules": ["q_proj", "o_proj"]}])
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_loads_in_plain_peft(tmp_path, family, more):
    if (family == "gpt2" and more) or (family == "glm" and "target_modules" in more):
        more = {}
    base = open_model(tiny.make(family, tmp_path / "base"), dtype="float32")
    values = {"name": "lora", "rank": 4, "alpha": 7, **more}
    method = method_of(values)
    model = method.attach(base.model)
    train(tmp_path / "run", rows(4), values, model=(model, method), options={"learning_rate": 0.05})
    save(model, method, base.tokenizer, base.renderer, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(tiny.make(family), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(tiny.make(family)), logits(model), atol=1e-3)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base") and config["inference_mode"]


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["norm"]}]
)
def test_pefts_loads_here(tmp_path, options):
    folder = tiny.make("llama", tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    theirs = get_peft_model(open_model(folder, dtype="float32").model, config)
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    tuned = open_model(tmp_path / "adapter", dtype="float32")
    torch.testing.assert_close(logits(tuned.model), logits(theirs), rtol=0, atol=1e-6)
    assert tuned.method is not None and tuned.method.rank == 4  # type: ignore[attr-defined]


def adapter(tmp_path: Path, base: str) -> Path:
    """A LoRA adapter folder that names ``base``."""
    folder = tmp_path / "base"
    if not folder.exists():
        tiny.make("llama", folder)
    opened, method = open_model(folder, dtype="float32"), method_of({"name": "lora"})
    out = save(
        method.attach(opened.model), method, opened.tokenizer, opened.renderer, tmp_path / "adapter", str(folder)
    )
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return out


def test_a_relative_base_is_found_from_here_and_from_the_adapter(tmp_path, monkeypatch):
    out = adapter(tmp_path, "../base")
    assert open_model(out).base == "../base"
    out = adapter(tmp_path, "base")
    monkeypatch.chdir(tmp_path)
    assert open_model("adapter").base == "base"


def test_a_moved_base_is_named(tmp_path):
    out = adapter(tmp_path, str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"gone is not there.*adapter_config.json"):
        open_model(out)


def test_an_adapter_of_another_base_or_kind_is_refused(tmp_path):
    out = adapter(tmp_path, str(tiny.make("llama", tmp_path / "other", num_hidden_layers=1)))
    with pytest.raises(InputError, match="adapter"):
        open_model(out)
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        open_model(out)


def test_folders_that_are_nothing(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        open_model(tmp_path)
    with pytest.raises(InputError):
        open_model(tmp_path / "absent")


@pytest.mark.parametrize("values", [{"name": "lora"}, {"name": "full"}, {"name": "freeze", "blocks": 1}])
def test_a_checkpoint_of_a_run_opens(tmp_path, values):
    base = tiny.make("llama", tmp_path / "base")
    opened, method = open_model(base, dtype="float32"), method_of(values)
    done, model, run = train(
        tmp_path / "run",
        rows(8),
        values,
        model=(method.attach(opened.model), method),
        options={"best": None, "learning_rate": 0.05, "keep": 9},
    )
    recipe = {"model": {"path": str(base)}, "method": values}
    Run(run.path).write("recipe.yaml", json.dumps(recipe))
    assert torch.equal(logits(open_model(run.path, "float32", checkpoint=done.steps).model), logits(model))
    assert not torch.equal(logits(open_model(run.path, "float32", checkpoint=2).model), logits(model))
    with pytest.raises(InputError, match=r"no such checkpoint \(step-00000002, step-00000004\)"):
        open_model(run.path, checkpoint=3)
    (run.checkpoints / "step-00000002" / "state.json").unlink()
    with pytest.raises(InputError, match="missing"):
        open_model(run.path, checkpoint=2)


def test_saving_over_a_folder_replaces_it_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(ValueError), whole(tmp_path / "out", 10) as temporary:
        (temporary / "new").write_text("new")
        raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with whole(tmp_path / "out", 10) as temporary:
        (temporary / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_a_new_model_is_trained_in_float32_and_saved_as_it_computes(tmp_path, family):
    base = open_model(tiny.make(family, tmp_path / "base"), dtype="float32")
    base.model.config.dtype = torch.bfloat16  # what a new model gets on a machine that multiplies bfloat16 faster
    values = {"name": "full"}
    method = method_of(values)
    _, model, _ = train(tmp_path / "run", rows(4), values, model=(method.attach(base.model), method))
    out = save(model, method, base.tokenizer, base.renderer, tmp_path / "out", "")
    assert model.dtype == torch.float32 and model.config.dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())
    assert open_model(out).base == ""
