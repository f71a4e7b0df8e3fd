"""Where things are in a model, for every tiny family."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig
from transformers.pytorch_utils import Conv1D

from weitiao.errors import InputError
from weitiao.models import modules, shape, tiny

SMALL: Any = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_head_of_backbone_is_the_model(family):
    model = tiny.make(family)
    ids = torch.tensor([[5, 9, 11, 7]])
    with torch.no_grad():
        hidden = modules.backbone(model)(input_ids=ids).last_hidden_state
        assert torch.equal(modules.head(model)(hidden), model(input_ids=ids).logits)
    modules.check_head(model)
    assert modules.embedding(model)(ids).shape == (1, 4, 64)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_blocks_and_linears(family):
    model = tiny.make(family, num_hidden_layers=3) if family != "gpt2" else tiny.make(family, n_layer=3)
    assert len(modules.blocks(model)) == 3
    found = modules.linears(model)
    assert modules.output_linear(model) not in found.values()
    assert all(isinstance(module, Conv1D if family == "gpt2" else nn.Linear) for module in found.values())
    inside = {id(module) for block in modules.blocks(model) for module in block.modules()}
    outside = [name for name, module in found.items() if id(module) not in inside]
    assert outside == {"bert": ["cls.predictions.transform.dense"], "roberta": ["lm_head.dense"]}.get(family, [])


def test_conv1d_widths_are_not_swapped():
    found = modules.linears(tiny.make("gpt2"))
    assert modules.in_out(found["transformer.h.0.attn.c_attn"]) == (64, 192)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5),
        CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=4.0),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_that_are_scaled_or_capped(config):
    torch.manual_seed(0)
    model = shape.auto_class(config).from_config(config).eval()
    modules.check_head(model)
    assert isinstance(modules.head(model), modules.Head)


def test_a_family_that_breaks_the_equality_is_refused():
    model = tiny.make("llama")
    model.config.logit_scale = 3.0  # now the head found is not what the model does
    with pytest.raises(InputError, match="llama"):
        modules.check_head(model)


def test_peft_is_looked_through():
    from peft import LoraConfig, get_peft_model

    model = tiny.make("qwen2")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert modules.backbone(wrapped) is model.model
    assert len(modules.blocks(wrapped)) == 2


def test_pick_by_the_end_of_a_name():
    names = list(modules.linears(tiny.make("llama")))
    assert modules.pick(names, "all-linear") == names
    assert modules.pick(names, ["q_proj", "v_proj"]) == [n for n in names if n.endswith((".q_proj", ".v_proj"))]
    assert modules.pick(names, "layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(InputError) as error:
        modules.pick(names, ["qproj", "v_proj", "zzz"])
    assert len(error.value.problems) == 2
    assert 'did you mean "q_proj"?' in error.value.problems[0] and "all-linear" in error.value.problems[1]
