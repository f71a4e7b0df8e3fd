"""Log-probabilities and losses against plain torch, for every family."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.train.support import model_with, rows
from weitiao.data.batch import collate
from weitiao.methods.base import computing
from weitiao.models import tiny
from weitiao.train import logps as module
from weitiao.train.logps import head_logps, token_logps
from weitiao.train.losses import nll

CAUSAL = [name for name in tiny.FAMILIES if "bert" not in name and name != "llama3"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch):
    """Several pieces even for a tiny vocabulary, the last one not full."""
    monkeypatch.setattr(module, "chunk_rows", lambda vocabulary: 7)


@pytest.mark.parametrize("family", CAUSAL)
def test_equal_to_full_logits_and_their_gradients(family: str):
    batch = collate(rows(5), 0)
    ours, theirs = tiny.make(family).float(), tiny.make(family).float()
    loss = nll(token_logps(ours, batch.ids, None, batch.mask), batch.mask)
    loss.backward()
    logits = theirs(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits[:, :-1]
    labels = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100)
    wanted = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_positions_and_order():
    batch = collate(rows(3), 0)
    model = tiny.make("llama").float()
    found = token_logps(model, batch.ids, None, batch.mask)
    full = model(input_ids=batch.ids).logits.log_softmax(-1)
    wanted = [
        full[row, place - 1, batch.ids[row, place]]
        for row in range(len(batch.ids))
        for place in range(1, batch.ids.shape[1])
        if batch.mask[row, place]
    ]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["matrix", "any head"])
def test_any_gradient_not_only_equal_ones(wrapped: bool, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = tiny.make("llama").float()
    head = module.modules.head(model)
    if wrapped:
        monkeypatch.setattr(module.modules, "head", lambda model: torch.nn.Sequential(head))
    hidden = torch.randn(23, head.weight.shape[1], requires_grad=True)
    targets, by = torch.randint(300, (23,)), torch.randn(23)
    (head_logps(model, hidden, targets) * by).sum().backward()
    ours = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    logp = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (logp * by).sum().backward()
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], head.weight.grad, rtol=1e-4, atol=1e-5)


def test_no_trained_token_gives_no_logps_and_a_graph():
    model = tiny.make("llama").float()
    ids = torch.randint(5, 300, (2, 6))
    found = token_logps(model, ids, None, torch.zeros_like(ids, dtype=torch.bool))
    assert found.shape == (0,)
    found.sum().backward()


def test_bfloat16_is_near_float32():
    batch = collate(rows(8), 0)
    exact, _ = model_with({"name": "full"})
    rounded, _ = model_with({"name": "full"}, dtype="bfloat16")
    with computing(rounded):
        near = token_logps(rounded, batch.ids, None, batch.mask)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, token_logps(exact, batch.ids, None, batch.mask), rtol=0.02, atol=0.02)
