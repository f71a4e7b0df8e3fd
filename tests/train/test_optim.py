"""Schedules by hand."""

from __future__ import annotations

import pytest
import torch

from weitiao.train.optim import build, factor, set_rate


def test_warm_up_is_linear_and_reaches_the_full_rate():
    assert [factor("constant", step, 100, 4, 0.0) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falls_towards_the_minimum_and_never_reaches_it(schedule: str):
    course = [factor(schedule, step, 50, 10, 0.1) for step in range(1, 52)]
    assert max(course) == course[9] == 1.0
    assert course[9:] == sorted(course[9:], reverse=True)
    assert course[49] > course[50] == pytest.approx(0.1)


def test_cosine_and_linear_are_half_way_in_the_middle():
    assert factor("cosine", 30, 49, 10, 0.0) == pytest.approx(0.5)
    assert factor("linear", 30, 49, 10, 0.2) == pytest.approx(0.6)


def test_short_runs_learn_in_every_step():
    assert factor("cosine", 2, 4, 100, 0.0) == 1.0  # warm-up takes half of the steps at most
    assert all(factor("cosine", step, steps, 20, 0.0) > 0 for steps in (1, 2, 3) for step in range(1, steps + 1))


def test_groups_keep_their_own_rates():
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.01, "weight_decay": 0.0}]
    optimizer = build("adamw", groups, learning_rate=0.1, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.5)
    assert set_rate(optimizer, 0.5) == 0.05
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
