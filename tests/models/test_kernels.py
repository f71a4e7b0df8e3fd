"""The compiled kernels against their twins in plain torch, and what happens where they cannot be compiled."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from weitiao.models import kernels, products

PAIRS = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
IDS = ["bfloat16", "bfloat16-float32", "float32"]
CLOSE = {torch.bfloat16: 0.01, torch.float32: 1e-5}  # of the largest number

with_products = pytest.mark.skipif(not products.available(torch.bfloat16), reason="no compiled products here")
with_codes = pytest.mark.skipif(not products.multiplies_codes(torch.float32), reason="no products in eight bits here")
with_compiler = pytest.mark.skipif(kernels.compiled() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def drawn():
    """Other numbers in every run; what they were is in the report of a failure."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    torch.manual_seed(seed)


@pytest.fixture
def both(monkeypatch):
    """Call a function as compiled and as its twin."""

    def call(function, *arguments, **options):
        found = function(*arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "compiled", lambda: None)
            return found, function(*arguments, **options)

    return call


def same(found, wanted):
    found, wanted = ((value,) if isinstance(value, torch.Tensor) else value for value in (found, wanted))
    assert len(found) == len(wanted)
    for ours, right in zip(found, wanted, strict=True):
        assert (ours is None) == (right is None)
        if ours is not None:
            assert ours.dtype == right.dtype and ours.shape == right.shape and ours.isfinite().all()
            assert (ours.double() - right.double()).abs().max() <= CLOSE[ours.dtype] * right.double().abs().max() + 1e-7


@with_compiler
@pytest.mark.parametrize(("products", "stream"), PAIRS, ids=IDS)
@pytest.mark.parametrize("width", [8, 33, 576, 1030])
def test_norms(both, products, stream, width):
    x, delta = torch.randn(7, width, dtype=stream), torch.randn(7, width, dtype=products)
    weight, gradient = torch.randn(width), torch.randn(7, width, dtype=products)
    same(*both(kernels.norm, x, weight, 1e-5, products, delta))
    found, wanted = both(kernels.norm, x, weight, 1e-5, products)
    same(found, wanted)
    inverse = found[1]
    same(*both(kernels.normed, x, weight, inverse, products))
    same(*both(kernels.norm_backward, gradient, x, weight, inverse, x, True))
    same(*both(kernels.norm_backward, gradient, x, weight, inverse, None, False))
    same(*both(kernels.add, x, delta))


@with_compiler
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("width", [3, 64, 577])
def test_rounding_to_eight_bits(both, dtype, width):
    x, scales = torch.randn(9, 700, dtype=dtype)[:, :width], torch.rand(width)
    x[1], x[2, 0] = 0.0, 1e30
    for given in (None, scales):
        found, wanted = both(products.rounded, x, given)
        assert (found.numbers.int() - wanted.numbers.int()).abs().max() <= 1  # where a number lies between two
        assert (found.numbers != wanted.numbers).float().mean() < 0.01
        assert torch.equal(found.numbers.sum(1, dtype=torch.int32), found.sums) and found.dtype == dtype
        assert torch.allclose(found.scales, wanted.scales, rtol=1e-6)
        assert found.numbers.abs().max() == 127 and not found.numbers[1].any() and not found.numbers[:, width:].any()
        exact = x.float() if given is None else x.float() * given
        steps = (found.numbers[:, :width] * found.scales[:, None] - exact).abs() / found.scales[:, None].clamp_min(
            1e-38
        )
        assert steps.max() < 0.501


@with_codes
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 4, 1), (7, 33, 65), (101, 70, 576), (50, 1000, 130)])
@pytest.mark.parametrize("across", [False, True], ids=["", "across"])
def test_products_in_eight_bits(both, dtype, rows, inputs, outputs, across):
    """Integers are exact, so nothing but the order of float32 sums differs; rows, steps and weights lie apart."""
    parts, narrow, wide = [], *((outputs, inputs) if across else (inputs, outputs))
    for _ in range(random.randint(1, 3)):
        weight = torch.randint(-127, 128, (outputs, inputs + 5), dtype=torch.int8)[:, :inputs]
        codes = products.Codes(weight, torch.rand(outputs))
        parts.append(
            (products.rounded(torch.randn(rows, narrow).to(dtype), codes.scales if across else None), codes, across)
        )
    small, b = torch.randn(rows, 6, dtype=dtype), torch.randn(*((6, wide) if across else (wide, 6)), dtype=dtype)
    bias, onto = torch.randn(wide), torch.randn(rows, wide, dtype=dtype)
    for options in ({}, {"bias": bias, "onto": onto}):
        same(*both(products.summed, parts, **options))
        same(*both(products.summed, [*parts, (small, b, across)], **options))


@with_codes
def test_a_nan_is_not_rounded_away():
    codes = products.Codes(torch.ones(8, 40, dtype=torch.int8), torch.ones(8))
    for wrong in (float("nan"), float("inf")):
        x = torch.randn(3, 40)
        x[1, 17] = wrong
        out = products.summed([(products.rounded(x), codes, False)])
        assert out[[0, 2]].isfinite().all() and not out[1].isfinite().any()


@with_compiler
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("curve", [kernels.SILU, kernels.GELU_TANH], ids=["silu", "gelu"])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_gates(both, dtype, curve, joined):
    gate, up, gradient = (torch.randn(5, 700, dtype=dtype) * 6 for _ in range(3))
    gate[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -90.0])
    if joined:
        gate, up = torch.cat([gate, up], 1).chunk(2, 1)
    found, wanted = both(kernels.gated, gate, up, curve)
    same(found, wanted)
    x, functional = gate.float(), torch.nn.functional
    exact = functional.silu(x) if curve == kernels.SILU else functional.gelu(x, approximate="tanh")
    same(found, (exact * up).to(dtype))
    same(*both(kernels.gated_backward, gradient, gate, up, True, curve))
    same(*both(kernels.gated_backward, gradient, gate, up, False, curve))


@with_compiler
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("half", [0, 5, 16])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("woven", [False, True])
def test_turned_heads(both, dtype, half, back, woven):
    source = torch.randn(2, 9, 3, 2, 32, dtype=dtype)
    angles = torch.randn(2, 9, half)
    cosine, sine = angles.cos(), angles.sin()

    def turned(apart):
        target = torch.zeros(2, 3, 9, 2, 32, dtype=dtype)
        kernels.turned(source, target.transpose(1, 2), cosine[:apart], sine[:apart], 0.3, back, woven)
        return target

    same(*both(turned, 2))
    same(*both(turned, 1))
    there = kernels.turned(source, torch.empty_like(source), cosine, sine)
    again = kernels.turned(there, torch.empty_like(source), cosine, sine, back=True)
    assert (again - source).abs().max() <= 4 * CLOSE[dtype] * source.abs().max()


@with_compiler
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("queries", "groups", "start"), [(1, 1, 0), (20, 3, 0), (40, 1, 700)])
def test_shares(both, dtype, queries, groups, start):
    keys = start + queries
    scores = 5 * torch.randn(4, queries * groups, keys, dtype=dtype)
    found, wanted = both(lambda: kernels.shares(scores.clone(), groups, start))
    same(found, wanted)
    assert not found.view(4, queries, groups, keys)[:, 0, :, start + 1 :].any()
    gradient = torch.randn_like(found)
    gradient[:, 0, -1] = float("nan") if keys > start + 1 else 1.0  # behind the first query
    same(*both(lambda: kernels.shares_backward(found, gradient.clone(), groups, start)))


@with_compiler
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("width", [1, 50, 5000])
def test_log_probabilities(both, dtype, width):
    logits, targets = 8 * torch.randn(6, width, dtype=dtype), torch.randint(width, (6,))

    def call(steep):
        used = logits.clone()
        return kernels.target_logps(used, targets, steep), used

    same(*both(call, True))
    found = call(True)[1]
    assert torch.equal(call(False)[1], logits)
    exact = torch.nn.functional.one_hot(targets, width) - logits.double().softmax(-1)
    assert (found - exact).abs().max() <= CLOSE[dtype]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=with_compiler), False])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_dropout_drops_its_share_in_the_same_places(monkeypatch, compiled, dtype):
    if not compiled:
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    x = torch.ones(400, 333, dtype=dtype)
    one, again, other = (kernels.dropped(x, 0.2, seed) for seed in (1 << 40, 1 << 40, 1 + (1 << 40)))
    assert torch.equal(one, again) and not torch.equal(one, other)
    share = (one == 0).double().mean().item()
    assert share == pytest.approx(0.2, abs=0.006)  # five standard deviations
    assert one.max().item() == pytest.approx(1.25, rel=0.01)
    columns, rows = (one == 0).double().mean(0), (one == 0).double().mean(1)
    assert columns.std() < 0.03 and rows.std() < 0.03  # 0.02 and 0.022 when independent
    both = ((one == 0) & (other == 0)).double().mean().item()
    assert both == pytest.approx(0.04, abs=0.004)
    summed = kernels.dropped(x, 0.2, 1 << 40, onto=torch.full_like(x, 2.0))
    assert torch.equal(summed, one + 2)


@with_compiler
@pytest.mark.parametrize("width", [16, 64, 80, 128])
@pytest.mark.parametrize(
    ("lengths", "groups"), [([1], 1), ([2, 2], 3), ([49], 1), ([300], 2), ([3, 1, 130, 64], 3), ([40, 40, 7], 2)]
)
def test_attention_whole(both, width, lengths, groups):
    from weitiao.models.attention import attend, attend_backward

    starts = torch.tensor([0, *lengths]).cumsum(0)
    query = (torch.randn(3, sum(lengths) * groups, width) / width**0.5).bfloat16()
    key, value = (torch.randn(3, sum(lengths), width).bfloat16() for _ in range(2))
    found, wanted = both(attend, query, key, value, starts)
    assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max()
    gradient = torch.randn_like(found)
    for ours, right in zip(*both(attend_backward, gradient, query, key, value, starts), strict=True):
        assert ours.shape == right.shape and (ours - right).abs().max() <= 0.02 * right.abs().max() + 1e-3


@with_compiler
def test_a_number_that_is_none_passes_through():
    logits = torch.randn(2, 40)
    logits[1, 3] = float("nan")
    logps = kernels.target_logps(logits, torch.tensor([1, 2]), False)
    assert logps[0].isfinite() and logps[1].isnan()
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    out, *_ = kernels.norm(x, torch.ones(64), 1e-5, torch.bfloat16)
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_without_a_compiler_it_goes_on_and_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kernels.compiled.__wrapped__() is None
    assert "no-such-compiler" in capsys.readouterr().err


def test_a_compiler_that_fails_is_named_by_its_last_word(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert kernels.compiled.__wrapped__() is None
    assert "it is broken" in capsys.readouterr().err


@with_compiler
def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run, commands = subprocess.run, []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: commands.append(command) or run(command, **options)
    )
    assert all(kernels.compiled.__wrapped__() is not None for _ in range(2))
    assert sum("-o" in command for command in commands) == 1
    assert [path.suffix for path in (tmp_path / "weitiao" / "kernels").iterdir()] == [".so"]


@with_compiler
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_attention_hides_no_nan(where):
    from weitiao.models.attention import attend

    states = {"query": torch.randn(2, 40, 64), "key": torch.randn(2, 40, 64), "value": torch.randn(2, 40, 64)}
    states[where][1, 20, 5] = float("nan")
    found = attend(*(part.bfloat16() for part in states.values()), torch.tensor([0, 40]))
    assert found[20].isnan().any()


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@with_products
@pytest.mark.parametrize("times", range(6))
def test_products_are_summed_up_in_float32(times):
    rows, columns, *depths = (random.randint(1, 500) for _ in range(5))
    parts, exact = [], torch.zeros(rows, columns)
    deep = 8192 + depths[2] // 2 * 2  # summed up in slices
    for depth in (depths[0] // 2 * 2 + 2, deep if times % 2 else depths[1] // 2 * 2 + 2, 8):
        across = random.random() < 0.5
        held = torch.randn(rows, depth + 6).bfloat16()[:, 2 : 2 + depth]
        weight = torch.randn((depth, columns) if across else (columns, depth)).bfloat16()
        parts.append((held, weight, across))
        exact += held.float() @ (weight if across else weight.t()).float()
    bias, onto = torch.randn(columns), torch.randn(rows, columns).bfloat16()
    found = products.summed(parts, bias, onto)
    assert apart(found, exact + bias + onto.float()) < 2.5e-3  # one rounding
    out = torch.zeros(rows, columns + 5, dtype=torch.bfloat16)
    products.summed(parts, out=out[:, 2 : 2 + columns])
    assert apart(out[:, 2 : 2 + columns], exact) < 2.5e-3
    assert not out[:, :2].any() and not out[:, 2 + columns :].any()


@with_products
@pytest.mark.parametrize("rank", [1, 8, 21])
@pytest.mark.parametrize("turned", [False, True])
def test_outer_products_are_summed_over_rows(rank, turned):
    rows, width = random.randint(1, 300), random.randint(1, 300)
    x, y = torch.randn(rows, rank + 3).bfloat16()[:, 1 : 1 + rank], torch.randn(rows, width).bfloat16()
    exact = 0.5 * x.double().t() @ y.double()
    assert apart(products.outer(x, y, 0.5, turned), exact.t() if turned else exact) < 1e-5


@with_products
@pytest.mark.parametrize("times", range(4))
def test_a_gradient_at_a_weight_is_summed_over_rows(times):
    rows, width, more = (random.randint(1, 400) for _ in range(3))
    width += 4096 * (times == 3)  # in parts
    gradient, x = torch.randn(rows, width + 4).bfloat16()[:, 3 : 3 + width], torch.randn(rows, more).bfloat16()
    exact = gradient.double().t() @ x.double()
    found = products.at_weight(gradient, x)
    assert apart(found, exact) < 1e-5
    assert products.at_weight(gradient, x, onto=found) is found and apart(found, 2 * exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_twins_of_products_in_torch(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    x, y, weight = torch.randn(7, 12).to(dtype), torch.randn(7, 5).to(dtype), torch.randn(12, 9).to(dtype)
    bias, onto, out = torch.randn(9), torch.randn(7, 9).to(dtype), torch.empty(7, 9, dtype=dtype)
    found = products.summed([(x, weight, True), (y, weight[:5].t().contiguous(), False)], bias, onto, out)
    exact = x.float() @ weight.float() + y.float() @ weight[:5].float() + bias + onto.float()
    assert found is out and apart(out, exact) < 0.02
    assert apart(products.at_weight(y, x, torch.zeros(5, 12)), y.float().t() @ x.float()) < 0.02
    assert apart(products.outer(x, y, 2.0), 2 * x.float().t() @ y.float()) < 0.02


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler here is a shell script")
def test_compiling_is_said_before_it_begins_and_a_slow_compiler_asked_again(monkeypatch, capsys, tmp_path):
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho asked >> "$0.log"\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(kernels, "SECONDS", 1)
    monkeypatch.setattr(kernels, "cache_folder", lambda: tmp_path)
    for times in (1, 2):
        assert kernels.compiled.__wrapped__() is None
        first, last = capsys.readouterr().err.splitlines()
        assert first.startswith("compiling kernels for this processor, once")
        assert "took more than 1 s, and is tried again next time" in last
        assert (tmp_path / "cc.log").read_text().count("asked") == times
        assert not list((tmp_path / "kernels").iterdir())
