"""From logits to tokens, by hand and in distribution."""

from __future__ import annotations

import pytest
import torch

from weitiao.config import build
from weitiao.errors import InputError
from weitiao.generate.sample import SampleOptions, Sampler, draw, penalize, restrict

LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (None, None, [0, 1, 2, 3]),
        (2, None, [0, 1]),
        (9, 1.0, [0, 1, 2, 3]),
        (None, 0.4, [0]),
        (None, 0.6, [0, 1]),
        (None, 0.8, [0, 1, 2]),
        (None, 1e-6, [0]),
        (3, 0.8, [0, 1]),  # 0.5 / 0.9 + 0.25 / 0.9 = 0.83 of what top_k leaves
    ],
)
def test_top_k_and_top_p(top_k, top_p, expected):
    assert kept(restrict(LOGITS, top_k, top_p)) == expected


def test_draw_inverts_the_cumulative_distribution():
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.89, 0.91, 0.9999999])
    assert draw(LOGITS.expand(8, -1), uniform).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    masked = restrict(LOGITS, 1, None).roll(1, 1)
    assert draw(masked.expand(2, -1), torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 1]


def test_penalty_lowers_positive_and_negative_logits():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_samples_follow_the_distribution():
    rows = 4000
    sampler = Sampler(SampleOptions(temperature=1, max_new_tokens=1), range(rows), [[0]] * rows, torch.device("cpu"))
    shares = torch.bincount(sampler(LOGITS.expand(rows, -1)), minlength=4) / rows
    assert torch.allclose(shares, LOGITS.exp()[0], atol=0.03)


def test_temperature_zero_is_the_likeliest():
    sampler = Sampler(SampleOptions(), [0], [[1]], torch.device("cpu"))
    assert sampler(LOGITS).tolist() == [0]


def test_options_out_of_range_are_all_named():
    with pytest.raises(InputError) as error:
        build(SampleOptions, {"temperature": -1, "top_p": 0, "top_k": 0, "max_new_tokens": 0, "topp": 1})
    assert len(error.value.problems) == 5
