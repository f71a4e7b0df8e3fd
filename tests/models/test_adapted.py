"""A frozen block with adapters in one call each way, against the same operations one by one: equal to the last bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from weitiao.models import adapted, kernels, whole
from weitiao.models.anatomy import GATE_UP, QKV, Block, Linear, Rows

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not hasattr(kernels.compiled(), "block_forward"), reason="no compiled blocks here")


@pytest.fixture(autouse=True)
def drawn():
    seed = random.randrange(1 << 30)
    print("seed", seed)
    torch.manual_seed(seed)
    random.seed(seed)


def made(ranks: dict[str, int], bias: bool = False, **more) -> Block:
    """A block of 6 heads over 2 of width 16 with random weights, and adapters of these ranks."""
    hidden, inner, keys, width = 96, 200, 2, 16
    wide = {
        "q": 6 * width,
        "k": keys * width,
        "v": keys * width,
        "o": hidden,
        "gate": inner,
        "up": inner,
        "down": hidden,
    }
    read = dict.fromkeys((*QKV, *GATE_UP), hidden) | {"o": 6 * width, "down": inner}
    linears = {}
    for name, rows in wide.items():
        own = torch.randn(rows).to(BF16) if bias and name in QKV else None
        a = b = None
        if rank := ranks.get(name, 0):
            a, b = torch.randn(rank, read[name]) / read[name] ** 0.5, torch.randn(rows, rank) / 4
            a, b = a.requires_grad_(), b.requires_grad_()
        weight = (torch.randn(rows, read[name]) / read[name] ** 0.5).to(BF16)
        linears[name] = Linear(weight, own, a, b, random.uniform(0.5, 3))
    norms = {name: ((1 + 0.1 * torch.randn(hidden)).to(BF16), 1e-5) for name in ("input", "output")}
    return Block(linears, norms, width, width**-0.5, **more)


def rows(lengths: list[int], fronts: Tensor | None = None, half: int = 8) -> Rows:
    angles = torch.rand(1, sum(lengths), half)
    return Rows(torch.tensor([0, *lengths]).cumsum(0), angles.cos(), angles.sin(), fronts)


def results(run, block: Block, x: Tensor, needed: bool) -> list[Tensor]:
    x = x.clone().requires_grad_(needed)
    out = run(x)
    torch.manual_seed(0)
    wanted = [*block.trained(), *([x] if needed else [])]
    return [out, *(torch.autograd.grad(out, wanted, torch.randn(out.shape).to(BF16)) if wanted else ())]


ALL = (*QKV, "o", *GATE_UP, "down")
CASES = {
    "lora": {"ranks": dict.fromkeys(ALL, 8)},
    "odd ranks": {"ranks": dict.fromkeys(ALL, 3)},
    "some": {"ranks": {"k": 4, "v": 2, "up": 6}},
    "ranks that differ": {"ranks": dict(zip(ALL, (1, 2, 5, 4, 7, 16, 3), strict=True))},
    "bias": {"ranks": dict.fromkeys(ALL, 8), "bias": True},
    "gemma": {"ranks": dict.fromkeys(ALL, 4), "offset": 1.0, "curve": kernels.GELU_TANH},
    "woven": {"ranks": dict.fromkeys(ALL, 4), "woven": True},
    "frozen": {"ranks": {}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("needed", [True, False], ids=["inner", "lowest"])
def test_it_is_the_same_to_the_last_bit(case: str, needed: bool):
    block = made(**CASES[case])
    at = rows([random.randint(1, 90) for _ in range(4)], half=random.choice([4, 8]))
    x = torch.randn(int(at.starts[-1]), 96).to(BF16)
    assert adapted.serves(x, block, BF16)
    found = results(lambda x: adapted.run(x, at, block), block, x, needed)
    expected = results(lambda x: whole.one_by_one(x, at, block, BF16), block, x, needed)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_rows_have_in_common_is_shared():
    block = made(dict.fromkeys(ALL, 4))
    common, own = 20, [30, 11, 7]  # the first row holds what all begin with
    counts = [common] * 3
    before = [0, common, 2 * common]
    at = rows([common + own[0], *own[1:]], torch.tensor([0, 0, 0, *counts, *before, 3 * common]))
    x = torch.randn(int(at.starts[-1]), 96).to(BF16)
    found = results(lambda x: adapted.run(x, at, block), block, x, True)
    expected = results(lambda x: whole.one_by_one(x, at, block, BF16), block, x, True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_it_does_not_serve_goes_the_other_way():
    block, x = made(dict.fromkeys(ALL, 4)), torch.randn(5, 96).to(BF16)
    assert adapted.serves(x, block, BF16)
    assert not adapted.serves(x.float(), block, BF16)
    assert not adapted.serves(x, block, torch.float32)
    block.linears["up"] = block.linears["up"]._replace(dropout=0.1)
    assert not adapted.serves(x, block, BF16)
    block.linears["up"] = block.linears["gate"]._replace(weight=torch.randn(200, 96).to(BF16).requires_grad_())
    assert not adapted.serves(x, block, BF16)
