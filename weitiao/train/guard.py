"""The guard: a step whose loss or gradient is not a number changes nothing, and a run of such steps ends the run.

    if guard.passes(step, loss, grad_norm, ids):
        optimizer.step()

``json_number`` writes such values into metrics.jsonl: JSON has no NaN, so they stand there as the strings "NaN",
"Infinity" and "-Infinity", which Python's and JavaScript's number conversions read back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from weitiao.errors import RunError, say, t

STREAK = 3
SHOWN_ROWS = 20


@dataclass
class Guard:
    """``skipped``: steps left out so far; ``streak``: the rows of those that came last, one right after another."""

    skipped: list[int] = field(default_factory=list)
    streak: list[list[str]] = field(default_factory=list)

    def passes(self, step: int, loss: float, grad_norm: float, ids: Iterable[str]) -> bool:
        """Whether the step may be applied. RunError at the third in a row that may not."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.streak.clear()
            return True
        self.skipped.append(step)
        self.streak.append(list(ids))
        say(
            "step {step}: loss {loss}, gradient norm {norm}: the step is skipped, nothing has changed",
            step=step,
            loss=loss,
            norm=grad_norm,
        )
        if len(self.streak) < STREAK:
            return False
        rows = list(dict.fromkeys(row for ids in self.streak for row in ids))
        raise RunError(
            t(
                "{count} steps in a row (the last is {step}) had a loss or gradient that is not a finite number; their "
                "rows: {rows}. A lower train.learning_rate, or model.dtype=float32, may help",
                count=STREAK,
                step=step,
                rows=", ".join(rows[:SHOWN_ROWS]) + (" …" if len(rows) > SHOWN_ROWS else ""),
            )
        )

    def state(self) -> dict[str, list]:
        """What a checkpoint keeps."""
        return {"skipped": list(self.skipped), "streak": list(self.streak)}


def json_number(value: float) -> float | str:
    """``value``, or the string that stands for it where JSON has no number."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
