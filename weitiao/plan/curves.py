"""What the loss curves of a run say: too little training, too much, or enough; and which step to use.

verdict = judged(run.metrics())
print(verdict.text, verdict.step)       # over-fitting from epoch 2 on: … 120
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from weitiao.errors import t

RISES = 0.02  # of the lowest validation loss: what it may rise by chance
FALLS = 0.02  # in the last quarter of a run: what is still worth more training
FLAT = 0.01  # a curve within so much of its lowest point is flat
LEARNT = 0.03  # of the first training loss: if no more than this has gone, nothing was learnt
STEPS = 8  # fewer say nothing

Kind = Literal["over-fitting", "under-fitting", "diverging", "plateau", "sound", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """``step`` is the one to use: of the lowest validation loss, or the last where there are no validation rows."""

    kind: Kind
    step: int
    epoch: float
    text: str


@dataclass(frozen=True)
class Point:
    """A loss after ``step``."""

    step: int
    epoch: float
    loss: float


def judged(metrics: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """The verdict on a run's lines of metrics; None before the first step."""
    trained = [point for line in metrics if "skipped" not in line and (point := _point(line, line.get("loss")))]
    tested = [point for line in metrics if (point := _point(line, (line.get("validation") or {}).get("loss")))]
    if not trained:
        return None
    best = min(tested, key=lambda point: point.loss, default=trained[-1])
    kind, text = _kind(trained, tested, best)
    return Verdict(kind, best.step, best.epoch, text)


def _point(line: Mapping[str, Any], loss: object) -> Point | None:
    """A point where ``loss`` is a number; one that is not finite is a string."""
    return Point(line["step"], line["epoch"], float(loss)) if isinstance(loss, float | int) else None


def _kind(trained: Sequence[Point], tested: Sequence[Point], best: Point) -> tuple[Kind, str]:
    """What the curves show, the worst first, and a sentence for it."""
    if len(trained) < STEPS:
        return "unknown", t("too few steps to judge the curves")
    end, rate = trained[-1].epoch, abs(best.loss) or 1.0
    values = {"best": _shown(best.loss), "epoch": f"{best.epoch:.3g}"}
    if tested and (tested[-1].loss - best.loss) / rate > RISES:
        values["last"] = _shown(tested[-1].loss)
        if _mean(trained, best.epoch, end) < _mean(trained, 0.0, best.epoch):
            message = (
                "over-fitting from epoch {epoch} on: the validation loss rises from {best} to {last} while the "
                "training loss falls; fewer epochs, more rows or a lower rate help"
            )
            return "over-fitting", t(message, **values)
        message = "diverging from epoch {epoch} on: both losses rise (validation: {best} → {last}); a lower rate helps"
        return "diverging", t(message, **values)
    first, last = _mean(trained, 0.0, end / 10), _mean(trained, 0.9 * end, end)
    if first - last < LEARNT * abs(first):
        message = "under-fitting: the training loss has hardly fallen ({first} → {last}); a higher rate may help"
        return "under-fitting", t(message, first=_shown(first), last=_shown(last))
    if len(tested) < 2:
        return "unknown", t("without validations along the way over-fitting cannot be seen (data.validation=0.1)")
    fallen = (_at(tested, 0.75 * end) - tested[-1].loss) / rate
    if fallen > FALLS:
        message = "under-fitting: in the last quarter the validation loss still fell by {share}; more epochs may help"
        return "under-fitting", t(message, share=f"{fallen:.0%}")
    flat = _flat_from(tested, best)
    if flat.epoch < 0.75 * end:
        message = "plateau from epoch {epoch} on: the validation loss has stayed within {share} of its lowest, {best}"
        return "plateau", t(message, epoch=f"{flat.epoch:.3g}", share=f"{FLAT:.0%}", best=values["best"])
    return "sound", t("sound: the validation loss fell to the end, and hardly in the last quarter")


def _mean(points: Sequence[Point], start: float, end: float) -> float:
    """The mean loss of the epochs from ``start`` to ``end``, or the loss nearest to them."""
    inside = [point.loss for point in points if start <= point.epoch <= end]
    return fmean(inside) if inside else min(points, key=lambda point: abs(point.epoch - end)).loss


def _at(points: Sequence[Point], epoch: float) -> float:
    """The loss at ``epoch``, on a straight line between the points beside it."""
    before = max((point for point in points if point.epoch <= epoch), key=lambda p: p.epoch, default=points[0])
    after = min((point for point in points if point.epoch >= epoch), key=lambda p: p.epoch, default=points[-1])
    way = (epoch - before.epoch) / ((after.epoch - before.epoch) or 1.0)
    return before.loss + min(max(way, 0.0), 1.0) * (after.loss - before.loss)


def _flat_from(points: Sequence[Point], best: Point) -> Point:
    """The point from which on all are flat."""
    flat = points[-1]
    for point in reversed(points):
        if point.loss - best.loss > FLAT * abs(best.loss):
            break
        flat = point
    return flat


def _shown(loss: float) -> str:
    return f"{loss:.4f}"
