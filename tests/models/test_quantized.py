"""Codes against their definition and bitsandbytes where it runs; a quantised model against its spread weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from weitiao.generate.engine import generate
from weitiao.generate.sample import SampleOptions
from weitiao.models import quantized as coding
from weitiao.models import tiny
from weitiao.models.experts import ExpertLinear
from weitiao.models.quantized import (
    BLOCK,
    QuantizedLinear,
    codes_only,
    decode_scales,
    dequantize,
    dynamic_map,
    encode_nf4,
    encode_scales,
    levels,
    linear_bytes,
    plain_state,
    quantize,
    quantized,
)

SIZES = [(64, 64), (48, 40), (7, 6), (256, 192)]
KINDS = [("nf4", False), ("nf4", True), ("int8", False)]
causal = pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "bert"])
kinds = pytest.mark.parametrize(("kind", "double"), KINDS, ids=["nf4", "nf4 double", "int8"])


def halves(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack((codes >> 4, codes & 15), 1).view(-1).long()


@pytest.mark.parametrize("size", SIZES)
def test_every_code_is_the_nearest_level_of_its_block(size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(3))
    codes, scales = encode_nf4(weight)
    flat = weight.view(-1)
    for block, values in enumerate(flat.split(BLOCK)):
        assert scales[block] == values.abs().max()
        nearest = (values[:, None] / scales[block] - levels()).abs().argmin(1)
        assert torch.equal(halves(codes)[block * BLOCK : block * BLOCK + len(values)], nearest)


def test_a_block_of_zeros_stays_zero():
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data[::2] = 0
    spread = QuantizedLinear(linear, "nf4").spread(torch.float32)
    assert torch.equal(spread[::2], torch.zeros(32, 64)) and spread.isfinite().all()


def test_scales_in_eight_bits_are_near():
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    again = decode_scales(*encode_scales(scales))
    assert len(dynamic_map()) == 256 and dynamic_map().unique().numel() == 256
    assert (again - scales).abs().max() < 0.012


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("double", [False, True])
def test_the_same_bits_as_bitsandbytes(size, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(size, generator=torch.Generator().manual_seed(5))
    theirs, state = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
    linear = nn.Linear(size[1], size[0], bias=False)
    linear.weight.data = weight
    ours = QuantizedLinear(linear, "nf4", double)
    assert torch.equal(ours.codes, theirs.view(-1))
    if double:
        assert torch.equal(ours.scale_codes, state.absmax) and torch.equal(ours.tops, state.state2.absmax)
    else:
        assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.spread(torch.float32), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (3, 64), (129, 448)])
def test_compiled_or_not_the_weights_are_the_same_bits(size, double, monkeypatch):
    linear = QuantizedLinear(nn.Linear(size[1], size[0]), "nf4", double)
    compiled = linear.spread(torch.bfloat16)
    monkeypatch.setattr("weitiao.models.kernels.spreads", lambda: False)
    assert torch.equal(compiled, linear.spread(torch.bfloat16))


@kinds
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_what_the_plan_counts(kind, double, size):
    linear = QuantizedLinear(nn.Linear(size[1], size[0]), kind, double)
    assert linear.bytes() == linear_bytes(*size, kind, double)


@causal
@kinds
def test_a_quantised_model_computes_with_its_spread_weights(family, kind, double):
    ids = torch.randint(5, 300, (2, 9))
    model = quantize(tiny.make(family), kind, double).eval()
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    wanted = model(input_ids=ids).logits
    plain = dequantize(model)
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=0, atol=1e-5)


@kinds
def test_gradients_pass_through(kind, double):
    linear = nn.Linear(64, 32)
    quantised = QuantizedLinear(linear, kind, double)
    plain = nn.Linear(64, 32)
    plain.weight.data, plain.bias = quantised.spread(torch.float32), linear.bias
    inputs = [torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in range(2)]
    for module, x in zip((quantised, plain), inputs, strict=True):
        module(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@kinds
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_experts_are_codes_too(family, kind, double):
    model = tiny.make(family)
    stacks = {name: weight for name, weight in model.named_parameters() if weight.ndim == 3}
    plain = {name: weight.clone() for name, weight in stacks.items()}
    quantize(model, kind, double)
    assert not any(parameter.ndim == 3 for parameter in model.parameters())
    held = sum(module.bytes() for module in model.modules() if isinstance(module, ExpertLinear))
    assert held == sum(len(weight) * linear_bytes(*weight.shape[1:], kind, double) for weight in plain.values())
    assert plain_state(model, torch.float32).keys() == tiny.make(family).state_dict().keys()
    dequantize(model)
    error = {"int8": 0.01, "nf4": 0.15}[kind]
    for name, weight in plain.items():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=error * weight.abs().max().item())


def test_experts_that_train_stay_as_they_are():
    names = {f"model.layers.1.mlp.experts.{own}" for own in ("gate_up_proj", "down_proj")}
    ids = torch.randint(5, 300, (2, 9))
    model, other = (quantize(tiny.make("qwen3_moe"), "nf4", training=training) for training in (names, ()))
    assert {name for name, parameter in model.named_parameters() if parameter.ndim == 3} == names
    plain = dequantize(copy.deepcopy(model))
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(other(input_ids=ids).logits, model(input_ids=ids).logits)


def test_generating_keeps_the_weights_spread_out_until_training(monkeypatch: pytest.MonkeyPatch, capsys):
    """The answers are those of the codes; training and a run's own evaluation hold codes alone."""
    model = quantize(tiny.make("llama"), "nf4")
    prompts, options = [[5, 6, 7], [8, 9]], SampleOptions(max_new_tokens=8)

    def answers() -> list[list[int]]:
        return [done.ids for done in generate(model, prompts, options, stop_ids=[], pad_id=0)]

    with codes_only(model):
        wanted = answers()
        assert not any(layer.plain is not None for layer in quantized(model))
    assert answers() == wanted
    assert all(layer.plain is not None for layer in quantized(model))
    model.train()
    assert not any(layer.plain is not None for layer in quantized(model))
    model.eval()
    monkeypatch.setattr("weitiao.models.quantized.RESERVE_BYTES", 1 << 60)
    assert answers() == wanted == answers()
    assert not any(layer.plain is not None for layer in quantized(model))
    assert capsys.readouterr().err.count("weitiao merge") == 1


def test_what_is_coded_in_pieces_has_the_codes_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(6, 7 * BLOCK + 2)
    whole = encode_nf4(weight)
    monkeypatch.setattr(coding, "PIECE", 2 * BLOCK)
    assert all(torch.equal(*both) for both in zip(encode_nf4(weight), whole, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
@kinds
def test_a_mapped_weight_lets_go_of_its_file(kind: str, double: bool, tmp_path: Path):
    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    (tmp_path / "weight").write_bytes(torch.randn(2048, 2048).numpy().tobytes())
    linear = nn.Linear(2048, 2048, bias=False, device="meta")
    mapped = torch.from_file(str(tmp_path / "weight"), False, 2048 * 2048).view(2048, 2048)
    linear.weight = nn.Parameter(mapped, requires_grad=False)
    total, before = mapped.sum(), resident()
    QuantizedLinear(linear, kind, double)
    assert before - resident() > 0.9 * (16 << 10)
    assert torch.equal(mapped.sum(), total)
