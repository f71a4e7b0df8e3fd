"""Dropout as training on a CPU draws it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weitiao.models import tiny
from weitiao.train.dropout import Dropout, quick


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(p: float, dtype: torch.dtype):
    torch.manual_seed(0)
    inputs = torch.ones(1001, 333, dtype=dtype, requires_grad=True)
    out = Dropout(p)(inputs)
    kept = out != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / out.numel()) ** 0.5)
    assert out[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=0.01 if dtype == torch.bfloat16 else 1e-3)
    out.sum().backward()
    assert torch.equal(inputs.grad, out.detach())
    # neighbours in a draw, in a row and across rows are dropped independently of one another
    centred = kept.float() - kept.float().mean()
    for shift in (1, 2, 3, 4, 333):
        flat = centred.flatten()
        assert abs((flat[shift:] * flat[:-shift]).mean().item()) < 5 * p * (1 - p) / out.numel() ** 0.5


def test_the_seed_decides_and_evaluation_drops_nothing():
    layer, inputs = Dropout(0.3), torch.ones(7, 5)
    torch.manual_seed(4)
    one, two = layer(inputs), layer(inputs)
    torch.manual_seed(4)
    assert torch.equal(layer(inputs), one)
    assert not torch.equal(one, two)
    assert torch.equal(layer.eval()(inputs), inputs)
    assert torch.equal(Dropout(0.0)(inputs), inputs)
    assert torch.equal(Dropout(1.0)(inputs), torch.zeros_like(inputs))


def test_a_model_has_it_while_it_trains_only():
    model = tiny.make("gpt2", resid_pdrop=0.1)
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    with quick(model):
        assert layers
        assert all(type(layer) is Dropout for layer in layers)
    assert all(type(layer) is nn.Dropout for layer in layers)
