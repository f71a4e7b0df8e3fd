"""Decoding by the compiled function against transformers, both against float32; and where it stands aside."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest
import torch

from weitiao.generate import decode
from weitiao.generate.decode import Decoder
from weitiao.generate.engine import Batch, evaluating, generate
from weitiao.generate.sample import SampleOptions
from weitiao.methods import METHODS
from weitiao.models import modules, products, quantized, tiny

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LORA = {"name": "lora", "rank": 4}
with_kernels = pytest.mark.skipif(not products.decodes(16, 3, 4), reason="no compiled decoding here")


@pytest.fixture(autouse=True)
def drawn():
    seed = random.randrange(1 << 30)
    print("seed", seed)
    torch.manual_seed(seed)


def made(family: str, method: dict | None = None, **more):
    model = tiny.make(family, **(SIZES | more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    if method:
        model = METHODS[method["name"]].model_validate(method).attach(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
    return model.eval()


def prompts(lengths=(3, 40, 17, 64), shared: int = 0) -> list[list[int]]:
    first = torch.randint(5, 300, (shared,)).tolist()
    return [first + torch.randint(5, 300, (length,)).tolist() for length in lengths]


def logits(model, rows, quick: bool, monkeypatch) -> list[torch.Tensor]:
    """After the prompts, and after each of five tokens; the second row leaves on the way."""
    with monkeypatch.context() as patch, evaluating(model), torch.inference_mode():
        if not quick:
            patch.setattr(Decoder, "of", lambda *_: None)
        batch = Batch(model, rows, SampleOptions(max_new_tokens=8), 0, range(len(rows)))
        assert (batch.decoder is not None) == quick
        found, tokens = [batch._prefill().float()], torch.arange(7, 7 + len(rows))
        for number in range(5):
            found.append(batch._decode(tokens + number).float())
            if number == 2:
                batch.keep([0, 2, 3])
                tokens = tokens[[0, 2, 3]]
    return found


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@with_kernels
@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("method", [None, LORA, LORA | {"target_modules": ["q_proj", "down_proj"], "rank": 6}])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_it_is_as_near_to_float32_as_transformers_is(monkeypatch, family, method, shared):
    monkeypatch.setattr(decode, "SPARE_TOKENS", 2)  # the cache grows on the way
    model, rows = made(family, method), prompts(shared=shared)
    ours, theirs = (logits(model, rows, quick, monkeypatch) for quick in (True, False))
    exact = deepcopy(model).float()
    modules.inner(exact).config.dtype = torch.float32
    for one, other, right in zip(ours, theirs, logits(exact, rows, False, monkeypatch), strict=True):
        assert one.shape == other.shape and apart(one, right) < 1.3 * apart(other, right) + 0.005


@with_kernels
def test_a_row_is_what_it_is_alone():
    model, rows = made("qwen3", LORA), prompts((5, 33, 18, 70, 2), shared=17)
    options = SampleOptions(max_new_tokens=20)
    together = generate(model, rows, options, stop_ids=[2], pad_id=0)
    alone = [generate(model, [row], options, stop_ids=[2], pad_id=0)[0] for row in rows]
    assert [one.ids for one in together] == [one.ids for one in alone]


@with_kernels
def test_prompts_are_read_in_parts_and_rows_are_as_many_as_it_takes(monkeypatch):
    model, rows = made("llama", LORA), prompts(random.choices(range(1, 60), k=75), shared=9)
    options, seen, of = SampleOptions(max_new_tokens=3), [], Decoder.of
    monkeypatch.setattr(Decoder, "of", lambda model, rows, tokens: seen.append(rows) or of(model, rows, tokens))
    whole = generate(model, rows, options, stop_ids=[2], pad_id=0, batch_size=75)
    assert max(seen) == products.FEW
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 100)
    parts = generate(model, rows, options, stop_ids=[2], pad_id=0, batch_size=75)
    assert [one.ids for one in whole] == [one.ids for one in parts]


def test_parts_hold_every_row_once_and_are_bounded(monkeypatch):
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 100)
    assert decode.cuts([60, 40, 1, 99, 100, 250, 7]) == [0, 2, 4, 5, 6, 7]
    assert decode.cuts([300]) == [0, 1]


@with_kernels
@pytest.mark.parametrize("width", [16, 48, 64, 128])
def test_heads_of_any_width(monkeypatch, width):
    model = made("llama", head_dim=width, num_attention_heads=3, num_key_value_heads=1)
    rows = prompts((9, 2, 130, 31))
    for one, other in zip(*(logits(model, rows, quick, monkeypatch) for quick in (True, False)), strict=True):
        assert apart(one, other) < 0.08


@with_kernels
def test_trained_weights_are_rounded(monkeypatch):
    model = made("llama", {"name": "freeze", "blocks": 1, "norms": True})
    assert any(parameter.dtype == torch.float32 for parameter in model.parameters())
    rows = prompts()
    for one, other in zip(*(logits(model, rows, quick, monkeypatch) for quick in (True, False)), strict=True):
        assert apart(one, other) < 0.08


@with_kernels
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("family", "method"), [("qwen2", None), ("llama", LORA), ("qwen3", LORA | {"rank": 6})])
def test_codes_are_read_as_they_are(monkeypatch, family, method, double):
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 1}
    model, rows = made(family, head_dim=32, **sizes), prompts(shared=20)
    quantized.quantize(model, "nf4", double)
    if method:
        model = METHODS["lora"].model_validate(method).attach(model).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
    ours = logits(model, rows, True, monkeypatch)
    generate(model, rows, SampleOptions(max_new_tokens=4), stop_ids=[], pad_id=0)
    assert not any(layer.plain is not None for layer in quantized.quantized(model))  # memory is that of the codes
    exact = deepcopy(model).float()
    modules.inner(exact).config.dtype = torch.float32
    theirs = logits(model, rows, False, monkeypatch)
    for one, other, right in zip(ours, theirs, logits(exact, rows, False, monkeypatch), strict=True):
        assert apart(one, right) < 1.3 * apart(other, right) + 0.005


@with_kernels
def test_other_codes_are_decoded_where_they_are_kept_spread_out():
    model = made("llama")  # whose rows are no whole blocks
    quantized.quantize(model, "nf4")
    assert Decoder.of(model, 2, 50) is None
    quantized.keep_plain(model, torch.bfloat16)
    assert Decoder.of(model, 2, 50) is not None


def test_it_stands_aside():
    assert Decoder.of(tiny.make("llama", **SIZES), 2, 50) is None  # float32
    assert Decoder.of(made("gemma"), 2, 50) is None
    assert Decoder.of(made("llama"), 33, 50) is None
    assert Decoder.of(made("mistral", sliding_window=8), 2, 9) is None
    assert Decoder.of(made("llama", {"name": "prompt_tuning", "tokens": 4}), 2, 50) is None
    assert Decoder.of(made("llama", LORA | {"dora": True}), 2, 50) is None
    assert Decoder.of(made("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}), 2, 50) is None
    model = made("llama")
    quantized.quantize(model, "nf4")
    assert Decoder.of(model, 2, 50) is None
    assert (Decoder.of(made("mistral", sliding_window=8), 2, 8) is not None) == products.decodes(16, 3, 2)
