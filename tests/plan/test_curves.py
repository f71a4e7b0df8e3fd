"""The verdict on a run's curves: what they show, and which step to use."""

from __future__ import annotations

import math

import pytest

from weitiao.plan.curves import judged


def metrics(trained, tested=None, epochs=10, steps=10):
    """Lines of a run of ``epochs`` whose losses are functions of the epoch."""
    lines = []
    for step in range(1, epochs * steps + 1):
        epoch = step / steps
        lines.append({"step": step, "epoch": epoch, "loss": trained(epoch), "seconds": 1.0})
        if tested and step % steps == 0:
            lines.append({"step": step, "epoch": epoch, "validation": {"loss": tested(epoch)}})
    return lines


def falling(epoch):
    return 3 * math.exp(-epoch) + 0.5


CURVES = {
    "over-fitting": (falling, lambda epoch: 1 + 0.1 * abs(epoch - 3)),
    "diverging": (lambda epoch: 1 + 0.1 * abs(epoch - 3) + 0.1 * (epoch > 3), lambda epoch: 1 + 0.1 * abs(epoch - 3)),
    "under-fitting": (lambda epoch: 4 - 0.2 * epoch, lambda epoch: 4.2 - 0.2 * epoch),
    "plateau": (falling, lambda epoch: 3 * math.exp(-2 * epoch) + 0.6),
    "sound": (falling, lambda epoch: 3 * math.exp(-0.775 * epoch) + 0.6),
}


@pytest.mark.parametrize("kind", CURVES)
def test_each_shape_is_told(kind):
    verdict = judged(metrics(*CURVES[kind]))
    assert verdict is not None and verdict.kind == kind, verdict
    if kind in ("over-fitting", "diverging"):
        assert (verdict.step, verdict.epoch) == (30, 3.0) and "epoch 3" in verdict.text


def test_a_rate_that_teaches_nothing_is_under_fitting():
    verdict = judged(metrics(lambda epoch: 2.0, lambda epoch: 2.1))
    assert verdict is not None and verdict.kind == "under-fitting" and "hardly fallen" in verdict.text


def test_too_little_to_judge_is_said_to_be_so():
    assert judged([]) is None
    assert judged(metrics(falling)).kind == "unknown"  # type: ignore[union-attr]
    assert judged(metrics(falling, falling, epochs=1, steps=4)).kind == "unknown"  # type: ignore[union-attr]


def test_bad_steps_are_no_part_of_the_curves():
    lines = metrics(*CURVES["plateau"])
    lines.insert(50, {"step": 40, "epoch": 4.0, "loss": 1e9, "skipped": "loss spike"})
    lines.insert(60, {"step": 50, "epoch": 5.0, "loss": "NaN", "skipped": "not a finite number"})
    lines.insert(70, {"step": 60, "epoch": 6.0, "validation": {"loss": "NaN"}})
    assert judged(lines) == judged(metrics(*CURVES["plateau"]))
