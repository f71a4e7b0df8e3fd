"""What the formula says is kept is what autograd keeps: every family, adapter or whole, in both compute dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weitiao.methods import METHODS
from weitiao.methods.base import Method, computing
from weitiao.models import block, modules, shape, tiny
from weitiao.models.block import fused
from weitiao.plan.activations import kept_blocks, tape
from weitiao.plan.blocks import block_bytes, fused_bytes, square_bytes

ROWS, LENGTH = 4, 251  # a prime: no weight, and no copy of one, has a multiple of it; 4 leave nothing to fill up to 32
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 80, "num_experts": 8, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "mistral": SIZES,
    "qwen3": SIZES | {"head_dim": 64},
    "gemma": SIZES | {"num_key_value_heads": 1, "head_dim": 32},
    "glm": SIZES | {"head_dim": 32},
    "chatglm": {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4},
    "gpt2": {"n_embd": 128, "n_head": 4},
    "glm4": SIZES | {"head_dim": 32},
    "phi": SIZES | {"num_key_value_heads": 4},
    "phi3": SIZES,
    "qwen2_moe": SIZES | EXPERTS | {"shared_expert_intermediate_size": 192},
    "qwen3_moe": SIZES | EXPERTS | {"head_dim": 64},
    "bloom": {"hidden_size": 128},
    "rwkv": {"hidden_size": 128, "intermediate_size": 320},
}


def kept(family: str, layers: int, method: Method, dtype: torch.dtype, whole: bool = False) -> tuple[int, shape.Shape]:
    """Bytes that a forward pass keeps beside the weights and their casts, and the model's shape."""
    depth = {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    model = tiny.make(family, **FAMILIES[family], **depth).to(dtype)
    model.config.dtype = dtype
    found = shape.read(model.config)
    model = method.attach(model.train())
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages, alive = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        of_tokens = tensor.shape[:1] == (ROWS,) or tensor.numel() % LENGTH == 0
        if storage.data_ptr() not in own and of_tokens:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(5, 300, (ROWS, LENGTH))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        computing(model),
        method.training(model),
        fused(model, whole),
    ):
        _ = modules.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    return sum(storages.values()), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_keeps_what_the_formula_says(family: str, name: str, dtype: torch.dtype):
    method = METHODS[name]()
    less, _ = kept(family, 2, method, dtype)
    more, found = kept(family, 4, method, dtype)
    measured = (more - less) / 2 / (ROWS * LENGTH)
    tolerance = 0.025 if family == "rwkv" else 0.01
    formula = block_bytes(found, method, dtype.itemsize) + LENGTH * square_bytes(found, dtype.itemsize)
    assert formula == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("family", block.FAMILIES)
def test_a_block_in_one_piece_keeps_what_its_formula_says(family: str, name: str, dtype: torch.dtype):
    method = METHODS[name]()
    less, _ = kept(family, 2, method, dtype, whole=True)
    more, found = kept(family, 4, method, dtype, whole=True)
    measured = (more - less) / 2 / (ROWS * LENGTH)
    assert fused_bytes(found, method, dtype.itemsize) == pytest.approx(measured, rel=0.01)
    assert fused_bytes(found, method, dtype.itemsize) < 0.75 * block_bytes(found, method, dtype.itemsize)


def test_what_is_not_known_has_no_formula_of_its_own():
    found = kept("llama", 2, METHODS["lora"](), torch.float32)[1]
    assert fused_bytes(found, METHODS["lora"](dora=True), 4) is None
    assert fused_bytes(found, METHODS["adapter"](), 4) is None
    assert fused_bytes(kept("phi", 2, METHODS["lora"](), torch.float32)[1], METHODS["lora"](), 4) is None


def test_fewer_adapted_linears_keep_less():
    method = METHODS["lora"](target_modules=("q_proj", "v_proj"))
    less, _ = kept("llama", 2, method, torch.float32)
    more, found = kept("llama", 4, method, torch.float32)
    assert block_bytes(found, method, 4) == pytest.approx((more - less) / 2 / (ROWS * LENGTH), rel=0.01)


def test_frozen_blocks_below_the_first_that_trains_keep_nothing():
    found = kept("llama", 4, METHODS["full"](), torch.float32)[1]
    assert kept_blocks(found, METHODS["freeze"](blocks=1)) == 1
    assert kept_blocks(found, METHODS["freeze"](blocks=4)) == kept_blocks(found, METHODS["lora"]()) == 4
    one, _ = kept("llama", 4, METHODS["freeze"](blocks=1), torch.float32)
    two, _ = kept("llama", 4, METHODS["freeze"](blocks=2), torch.float32)
    measured = (two - one) / (ROWS * LENGTH)
    assert block_bytes(found, METHODS["freeze"](blocks=2), 4) == pytest.approx(measured, rel=0.01)


def test_recomputing_keeps_one_block_and_an_input_of_each():
    found = kept("llama", 4, METHODS["full"](), torch.float32)[1]
    whole = tape(found, METHODS["full"](), "float32")
    spared = whole.kept_bytes(4096, 512, 0) - whole.kept_bytes(4096, 512, 0, recomputed=whole.blocks)
    assert spared == pytest.approx(4096 * (3 * whole.block_bytes - 4 * whole.hidden_bytes), rel=1e-6)
