"""Attention in blocks against float64, forward and backward, and where it stands aside."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from weitiao.models.attention import ROWS, forward

MODULE: Any = SimpleNamespace(is_causal=True, training=True, num_key_value_groups=1)


def states(heads: int, key_heads: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(length)

    def drawn(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, length, 32, generator=draw).bfloat16().requires_grad_()

    return drawn(heads), drawn(key_heads), drawn(key_heads)


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """[B, T, heads, D] in float64, written out."""
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("length", [2, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 17])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients_are_those_of_float64(length, heads, key_heads, scale):
    ours = states(heads, key_heads, length)
    exact = (query, key, value) = [part.detach().double().requires_grad_() for part in ours]
    out, wanted = forward(MODULE, *ours, None, scaling=scale)[0], reference(query, key, value, scale)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (out * weight.bfloat16()).sum().backward()
    (wanted * weight.bfloat16()).sum().backward()
    for found, right in [(out, wanted), *((one.grad, other.grad) for one, other in zip(ours, exact, strict=True))]:
        assert found.dtype == torch.bfloat16 and found.shape == right.shape
        assert (found - right).abs().max() <= 0.02 * right.abs().max()


def test_a_gradient_may_lie_in_any_order():
    ours, again = states(6, 2, 33), states(6, 2, 33)
    weight = torch.randn(2, 33, 6, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    forward(MODULE, *ours, None)[0].backward(weight)
    forward(MODULE, *again, None)[0].transpose(1, 2).backward(weight.transpose(1, 2).contiguous())
    for one, other in zip(ours, again, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_no_token_sees_a_later_one():
    query, key, value = states(2, 2, 2 * ROWS + 5)
    before = forward(MODULE, query, key, value, None)[0]
    changed = value.detach().clone()
    changed[:, :, ROWS + 3 :] += 5
    after = forward(MODULE, query, key, changed, None)[0]
    assert torch.equal(before[:, : ROWS + 3], after[:, : ROWS + 3])
    assert not torch.equal(before[:, ROWS + 3 :], after[:, ROWS + 3 :])


def test_rows_of_a_batch_do_not_touch_each_other():
    query, key, value = states(3, 3, ROWS + 40)
    both = forward(MODULE, query, key, value, None)[0]
    alone = forward(MODULE, query[:1], key[:1], value[:1], None)[0]
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=0.02)


def test_autocast_takes_float32_states():
    parts = (query, key, value) = [part.detach().float().requires_grad_() for part in states(2, 2, 40)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = forward(MODULE, query, key, value, None)[0]
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in parts)


def test_an_option_that_changes_attention_is_not_passed_over():
    query, key, value = states(2, 2, 24)
    with pytest.raises(ValueError, match="softcap"):  # torch's kernel has none, and transformers says so
        forward(MODULE, query, key, value, None, softcap=30.0)
    bias = torch.randn(1, 2, 24, 24)
    ours, theirs = (
        run(MODULE, query, key, value, None, position_bias=bias.bfloat16())[0]
        for run in (forward, sdpa_attention_forward)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["mask", "float32", "one query", "not causal"])
def test_anything_else_is_torch_s_own(case):
    query, key, value = (part.detach() for part in states(2, 2, 24))
    mask: torch.Tensor | None = None
    module: Any = MODULE
    if case == "mask":
        mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    elif case == "float32":
        query, key, value = query.float(), key.float(), value.float()
    elif case == "one query":
        query = query[:, :, -1:]
    else:
        module = SimpleNamespace(is_causal=False, training=True, num_key_value_groups=1)
    ours, theirs = (run(module, query, key, value, mask)[0] for run in (forward, sdpa_attention_forward))
    assert torch.equal(ours, theirs)
    if case == "float32":
        assert torch.equal(ours.transpose(1, 2), scaled_dot_product_attention(query, key, value, is_causal=True))
