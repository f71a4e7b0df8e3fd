"""The training block against transformers' own modules: outputs, gradients, losses of fifty steps, and where it stands
aside. Weights, inputs and methods are drawn anew in every run."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import DynamicCache

from weitiao.methods import METHODS
from weitiao.methods.base import computing
from weitiao.models import block, kernels, modules, products, quantized, tiny, whole
from weitiao.models.block import FAMILIES, fused
from weitiao.models.prefixes import LEAST, OPTION, Fronts, Layout

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LORA = {"name": "lora", "rank": 4}
METHOD_VALUES = {
    "full": {"name": "full"},
    "freeze": {"name": "freeze", "blocks": 2, "norms": True, "modules": ["layers.0.mlp"]},
    "lora": LORA,
    "odd": LORA | {"rank": 5, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]},
    "some": LORA | {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "rslora": True},
}


@pytest.fixture(autouse=True)
def drawn():
    seed = random.randrange(1 << 30)
    print("seed", seed)
    torch.manual_seed(seed)


def made(family: str, values: dict, dtype: torch.dtype = torch.float32, quantize: str | None = None, trains="none"):
    """A model with a method, none of whose tensors is where it was initialised to be."""
    model = tiny.make(family, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model = model.to(dtype)
    model.config.dtype = dtype
    if quantize:
        quantized.quantize(model, quantize, training={name for name, _ in model.named_parameters() if trains in name})
    if family.startswith("glm") and "target_modules" in values:  # one linear for both
        joined = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
        wanted = [joined.get(name, name) for name in values["target_modules"]]
        values = values | {"target_modules": wanted}
    model = METHODS[values["name"]].model_validate(values).attach(model).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def ran(model, ids, active: bool, weight, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, and the gradients of a weighted sum of them."""
    model.zero_grad(set_to_none=True)
    with fused(model, active), computing(model):
        hidden = modules.backbone(model)(input_ids=ids, use_cache=False, **options).last_hidden_state
    (hidden.float() * weight).sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def batch(rows: int = 3, length: int = 77):
    return torch.randint(5, 300, (rows, length)), torch.randn(rows, length, SIZES["hidden_size"])


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("twin", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("values", METHOD_VALUES.values(), ids=METHOD_VALUES)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_that_of_transformers(monkeypatch, family, values, twin):
    if twin:
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    model, (ids, weight) = made(family, values), batch()
    (wanted, right), (hidden, gradients) = ran(model, ids, False, weight), ran(model, ids, True, weight)
    assert apart(hidden, wanted) < 1e-5
    assert gradients.keys() == right.keys() and gradients
    for name, gradient in gradients.items():
        assert gradient.dtype == right[name].dtype and apart(gradient, right[name]) < 1e-4, name


@pytest.mark.parametrize("values", METHOD_VALUES.values(), ids=METHOD_VALUES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(family, values):
    model, (ids, weight) = made(family, values, torch.bfloat16), batch()
    (theirs, their_gradients), (ours, our_gradients) = (ran(model, ids, on, weight) for on in (False, True))
    model = model.float()
    model.config.dtype = modules.inner(model).config.dtype = torch.float32
    exact, right = ran(model, ids, False, weight)
    assert ours.dtype == theirs.dtype or values["name"] != "lora"
    assert apart(ours, exact) < 1.3 * apart(theirs, exact) + 1e-3
    assert our_gradients.keys() == right.keys()
    for name, gradient in our_gradients.items():
        assert apart(gradient, right[name]) < 1.5 * apart(their_gradients[name], right[name]) + 0.01, name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_as_frozen_weights(monkeypatch, kind):
    monkeypatch.setattr(products, "multiplies_codes", lambda dtype: False)
    model, (ids, weight) = made("llama", LORA, quantize=kind), batch()
    (wanted, right), (hidden, gradients) = ran(model, ids, False, weight), ran(model, ids, True, weight)
    assert apart(hidden, wanted) < 1e-5
    assert all(apart(gradients[name], right[name]) < 1e-4 for name in right)


@pytest.mark.skipif(not products.multiplies_codes(torch.float32), reason="no products in eight bits here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", [LORA, METHOD_VALUES["some"], {"name": "freeze", "blocks": 1}], ids=str)
def test_products_in_eight_bits_are_those_of_their_twin_and_near_the_exact_ones(monkeypatch, values, dtype):
    """The twin rounds to the same codes, but for a few on an edge; how far codes are from numbers is bounded too."""
    trains = "layers.2" if values["name"] == "freeze" else "up_proj"  # what trains, and one beside LoRAs, is no codes
    model, (ids, weight) = made("qwen2", values, dtype, "int8", trains), batch()
    exact, slopes = ran(model, ids, False, weight)
    count, run = [], kernels.run
    monkeypatch.setattr(kernels, "run", lambda name, *rest: count.append(name) or run(name, *rest))
    hidden, gradients = ran(model, ids, True, weight)
    assert "coded" in count
    monkeypatch.setattr(products, "_coded", products._coded_twin)
    twin, right = ran(model, ids, True, weight)
    edge = 0.02 if dtype == torch.float32 else 0.1  # bfloat16 is itself as far from the exact numbers
    assert apart(hidden, twin) < edge and apart(hidden, exact) < 0.1
    assert gradients.keys() == right.keys() == slopes.keys()
    for name, gradient in gradients.items():
        assert apart(gradient, right[name]) < 3 * edge and apart(gradient, slopes[name]) < 0.3, name


def test_computing_activations_again_changes_nothing(monkeypatch):
    model, (ids, weight) = made("qwen3", LORA | {"dropout": 0.3}), batch()
    torch.manual_seed(7)
    _, straight = ran(model, ids, True, weight)
    modules.inner(model).activation_checkpointing_enable({"use_reentrant": False})
    count, run = [], whole.run
    monkeypatch.setattr(whole, "run", lambda *arguments, **named: count.append(1) or run(*arguments, **named))
    torch.manual_seed(7)
    _, again = ran(model, ids, True, weight)
    assert len(count) == 6  # three blocks, and again
    assert straight.keys() == again.keys() and all(torch.equal(straight[name], again[name]) for name in straight)


def test_dropout_has_the_gradient_of_what_it_let_pass():
    model, (ids, weight) = made("llama", LORA | {"dropout": 0.4}), batch()
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    directions = {name: torch.randn_like(model.get_parameter(name)) for name in names}

    def loss(by: float) -> float:
        torch.manual_seed(3)  # the same places
        with torch.no_grad(), fused(model):
            for name in names:
                model.get_parameter(name).add_(by * directions[name])
            hidden = modules.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
            for name in names:
                model.get_parameter(name).sub_(by * directions[name])
        return (hidden.double() * weight).sum().item()

    torch.manual_seed(3)
    _, gradients = ran(model, ids, True, weight)
    slope = sum((gradients[name] * directions[name]).sum().item() for name in names)
    near, far = (loss(by) - loss(-by) for by in (5e-4, 1e-3))
    assert (8 * near - far) / 6e-3 == pytest.approx(slope, rel=0.02, abs=1.0)  # without the cubic term
    assert loss(0.0) != pytest.approx(
        (ran(model.eval(), ids, True, weight)[0].double() * weight).sum().item(), rel=1e-6
    )


def steps(active: bool, dtype: torch.dtype, count: int = 50, quantize: str | None = None) -> list[float]:
    from weitiao.train.logps import token_logps

    torch.manual_seed(0)
    model = made("llama", LORA, dtype, quantize)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    draw, losses = torch.Generator().manual_seed(5), []
    for _ in range(count):
        ids = torch.randint(5, 60, (4, 40), generator=draw)
        ids[:, 20:] = ids[:, :20]  # something to learn
        with fused(model, active), computing(model):
            loss = -token_logps(model, ids, None, torch.ones_like(ids, dtype=torch.bool)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fifty_steps_have_the_losses_of_the_reference():
    reference = steps(False, torch.float32)
    exact, rounded = steps(True, torch.float32), steps(True, torch.bfloat16)
    assert reference[-1] < reference[0] - 0.3
    assert max(abs(a - b) for a, b in zip(reference, exact, strict=True)) < 1e-3
    assert sum(abs(a - b) for a, b in zip(reference, rounded, strict=True)) / len(reference) < 0.01
    codes = steps(True, torch.bfloat16, quantize="int8")
    assert sum(abs(a - b) for a, b in zip(reference, codes, strict=True)) / len(reference) < 0.02


def used(monkeypatch, model, **options) -> int:
    """How many blocks of a forward pass ran in one piece."""
    count, run = [], whole.run
    monkeypatch.setattr(whole, "run", lambda *arguments, **named: count.append(1) or run(*arguments, **named))
    with fused(model), computing(model):
        modules.backbone(model)(input_ids=torch.arange(5, 25)[None], **{"use_cache": False} | options)
    return len(count)


def test_it_runs_where_it_may(monkeypatch):
    assert used(monkeypatch, made("llama", LORA)) == 3


@pytest.mark.parametrize(
    "values",
    [{"name": "adapter"}, {"name": "adalora"}, LORA | {"dora": True}, {"name": "prefix_tuning"}],
    ids=lambda values: values["name"],
)
def test_what_a_method_made_of_a_block_is_left_alone(monkeypatch, values):
    model = made("llama", values)
    if values["name"] == "prefix_tuning":
        assert used(monkeypatch, model, past_key_values=DynamicCache()) == 0
    else:
        assert used(monkeypatch, model) == 0


def test_padding_caches_and_hooks_are_left_alone(monkeypatch):
    model = made("llama", LORA)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, :3] = 0
    assert used(monkeypatch, model, attention_mask=mask) == 0
    assert used(monkeypatch, model, use_cache=True) == 0
    hook = modules.blocks(model)[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    assert used(monkeypatch, model) == 2
    hook.remove()


def test_a_window_that_is_narrower_than_the_row_is_left_alone(monkeypatch):
    model = made("mistral", LORA)
    for layer in modules.blocks(model):
        layer.self_attn.sliding_window = 19
    assert used(monkeypatch, model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", METHOD_VALUES.values(), ids=METHOD_VALUES)
def test_padding_is_not_computed_and_changes_nothing(monkeypatch, values, dtype):
    model, (ids, weight) = made("qwen3", values, dtype), batch(4, 40)
    lengths = torch.randint(1, 40, (4,))
    lengths[random.randrange(4)] = 40
    weight *= (torch.arange(40) < lengths[:, None])[..., None]
    (exact, right), seen, run = ran(model, ids, True, weight), [], whole.run
    monkeypatch.setattr(whole, "run", lambda hidden, **rest: seen.append(len(hidden)) or run(hidden, **rest))
    hidden, gradients = ran(model, ids, True, weight, **{OPTION: Layout.of(ids, lengths)})
    packed = block.without_padding(dtype)
    assert seen == 3 * [int(lengths.sum()) if packed else ids.numel()]
    bound = 1e-5 if dtype == torch.float32 else 0.02
    real = weight.abs().amax(-1) > 0
    assert apart(hidden[real], exact[real]) < bound
    assert gradients.keys() == right.keys()
    assert all(apart(gradients[name], right[name]) < 3 * bound for name in right)


def alike(rows: int = 5, length: int = 90) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows of which two and three begin alike, their lengths, and how many tokens need not be computed."""
    ids, lengths = torch.randint(5, 300, (rows, length)), torch.randint(length // 2 + 1, length + 1, (rows,))
    ids[:, 0] = torch.arange(rows)
    first, second = (random.randrange(LEAST, length // 2) for _ in range(2))
    ids[2, :first] = ids[0, :first]
    ids[3:, :second] = ids[1, :second]
    ids[2, first], ids[3, second], ids[4, second] = ids[0, first] + 1, ids[1, second] + 1, ids[1, second] + 2
    return ids, lengths, first + 2 * second


@pytest.mark.parametrize("twin", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", METHOD_VALUES.values(), ids=METHOD_VALUES)
def test_what_rows_have_in_common_is_computed_once_and_changes_nothing(monkeypatch, values, dtype, twin):
    """Of every row its own tokens count and, in three rows, all of them: what is in common has gradients of several."""
    model, (ids, lengths, saved) = made("qwen3", values, dtype), alike()
    if twin:
        monkeypatch.setattr(kernels, "attend", lambda *arguments: False)
        monkeypatch.setattr(kernels, "attend_backward", lambda *arguments: False)
    weight = torch.randn(*ids.shape, SIZES["hidden_size"]) * (torch.arange(90) < lengths[:, None])[..., None]
    options = {OPTION: Layout.of(ids, lengths)}
    with monkeypatch.context() as apart_rows:
        apart_rows.setattr(Fronts, "of", lambda *arguments: None)
        exact, right = ran(model, ids, True, weight, **options)
    seen, run = [], whole.run
    monkeypatch.setattr(whole, "run", lambda hidden, **rest: seen.append(len(hidden)) or run(hidden, **rest))
    hidden, gradients = ran(model, ids, True, weight, **options)
    packed = block.without_padding(dtype)
    assert seen == 3 * [int(lengths.sum()) - saved if packed else ids.numel()]
    bound = 1e-5 if dtype == torch.float32 else 0.02
    real = weight.abs().amax(-1) > 0
    assert apart(hidden[real], exact[real]) < bound
    assert gradients.keys() == right.keys()
    assert all(apart(gradients[name], right[name]) < 3 * bound for name in right)


def test_what_is_drawn_for_every_row_is_not_shared_unless_asked_for(monkeypatch):
    model, (ids, lengths, saved) = made("llama", LORA | {"dropout": 0.2}), alike()
    seen, run = [], whole.run
    monkeypatch.setattr(whole, "run", lambda hidden, **rest: seen.append(len(hidden)) or run(hidden, **rest))
    for mode, sharing in (("train", "auto"), ("train", "on"), ("eval", "auto"), ("eval", "off")):
        getattr(model, mode)()
        with fused(model, sharing=sharing), computing(model):
            modules.backbone(model)(input_ids=ids, use_cache=False, **{OPTION: Layout.of(ids, lengths)})
    tokens = int(lengths.sum())
    assert seen[::3] == [tokens, tokens - saved, tokens - saved, tokens]


def test_rows_follow_the_one_they_share_most_with():
    ids = torch.arange(5)[:, None] * 1000 + torch.arange(60)
    ids[1, :30], ids[2, :20], ids[3], ids[4, : LEAST - 1] = ids[0, :30], ids[0, :20], ids[0], ids[0, : LEAST - 1]
    found = Layout.of(ids, torch.tensor([60, 60, 60, 40, 60]))
    assert found.leaders.tolist() == [0, 0, 0, 0, 4]
    assert found.many.tolist() == [39, 30, 20, 39, 0]  # of a row that is no more than another's beginning, all but one


def test_padding_is_computed_where_a_block_is_not_known():
    model, (ids, weight) = made("llama", LORA | {"target_modules": ["q_proj"]}), batch(2, 30)
    hook = modules.blocks(model)[1].mlp.register_forward_hook(lambda module, inputs, output: output)
    wanted, _ = ran(model, ids, False, weight)
    found, _ = ran(model, ids, True, weight, **{OPTION: Layout.of(ids, torch.tensor([30, 23]))})
    assert apart(found, wanted) < 1e-5 and not block.packs(model, torch.float32, 30)
    hook.remove()
    assert block.packs(model, torch.float32, 30) == (kernels.compiled() is not None)


def test_switched_off_adapters_leave_the_base(monkeypatch):
    model, (ids, weight) = made("llama", LORA), batch()
    with model.disable_adapter(), torch.no_grad():
        wanted = modules.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        with fused(model):
            found = modules.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    assert apart(found, wanted) < 1e-5
    assert apart(ran(model, ids, True, weight)[0], wanted) > 1e-3


def test_afterwards_everything_is_as_it_was():
    model = made("llama", LORA)
    before = [layer.forward for layer in modules.blocks(model)]
    with fused(model):
        assert "forward" in vars(modules.blocks(model)[0])
    assert [layer.forward for layer in modules.blocks(model)] == before
    assert "forward" not in vars(modules.blocks(model)[0])
