"""The guard: a step whose loss or gradient is not a number, or leaps, changes nothing; what keeps happening is undone.

    if not guard.fault(step, loss, grad_norm):
        optimizer.step()
    if guard.repeated:
        ...                          # back to the last good checkpoint, on without the rows (see recovery)

A leap is judged by the last steps that passed. The loss may rise above the median of ``WINDOW`` of them by ``SPREAD``
times what it has risen above it already (or 1.4826 times the median distance from it, which for normal noise is the
standard deviation), and to ``LOSSES`` times the highest of the run in any case; the gradient's norm to ``NORMS`` times
the window's highest and twice the run's. Warm-up and the first ``SETTLED`` steps are too few to judge by: there only a
loss ``TIMES_AT_FIRST`` times the highest so far and ``NATS_AT_FIRST`` above it, or a norm ``NORMS_AT_FIRST`` times the
highest, counts.

``json_number`` writes such values into metrics.jsonl: JSON has no NaN, so they stand there as the strings "NaN",
"Infinity" and "-Infinity", which Python's and JavaScript's number conversions read back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from weitiao.errors import say

STREAK = 3  # bad steps in a row that are no accident
RETURNS = 3  # returns to one checkpoint that may be in vain
WINDOW, SETTLED = 64, 16
SPREAD, LOSSES, NORMS = 6.0, 1.5, 10.0
TIMES_AT_FIRST, NATS_AT_FIRST, NORMS_AT_FIRST = 5.0, 20.0, 100.0
NOT_A_NUMBER, LOSS_LEAPS, GRADIENT_LEAPS = "not a finite number", "loss spike", "gradient spike"


@dataclass
class Guard:
    """Plain JSON, as a checkpoint keeps it. ``skipped``: the steps left out, with their true values; ``streak``: how
    many of them came last, one right after another; ``losses`` and ``norms``: of the last steps that passed, and
    ``highest`` of all of them; ``rows``: what is left out of the data since; ``returned``: the checkpoint of the last
    return, and how many to it were in vain; ``returned_from``: the step that led to it."""

    warmup_steps: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    streak: int = 0
    passed: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    highest: list[float] = field(default_factory=lambda: [-math.inf, 0.0])
    rows: list[dict[str, Any]] = field(default_factory=list)
    returned: list[int] = field(default_factory=lambda: [-1, 0])
    returned_from: int = 0

    def fault(self, step: int, loss: float, grad_norm: float, again: bool = False) -> str:
        """What is wrong with a step, which is not applied then; empty if nothing is. ``again``: it was bad a moment ago
        and has been computed once more."""
        fault = self._fault(loss, grad_norm)
        if fault and again:
            return fault
        if fault:
            self.streak += 1
            values = {"loss": json_number(loss), "grad_norm": json_number(grad_norm)}
            self.skipped.append({"step": step, "fault": fault, **values})
            self._say(step, fault, loss, grad_norm)
            return fault
        self.streak, self.passed = 0, self.passed + 1
        self.losses, self.norms = [*self.losses[1 - WINDOW :], loss], [*self.norms[1 - WINDOW :], grad_norm]
        self.highest = [max(self.highest[0], loss), max(self.highest[1], grad_norm)]
        return ""

    def _fault(self, loss: float, grad_norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return NOT_A_NUMBER
        most, longest = self.limits()
        return LOSS_LEAPS if loss > most else GRADIENT_LEAPS if grad_norm > longest else ""

    def limits(self) -> tuple[float, float]:
        """The largest loss and the largest gradient norm that the next step may have."""
        highest, longest = self.highest
        if self.passed < 2:
            return math.inf, math.inf
        if self.passed < max(SETTLED, self.warmup_steps):
            return max(TIMES_AT_FIRST * highest, highest + NATS_AT_FIRST), NORMS_AT_FIRST * longest or math.inf
        middle = median(self.losses)
        distance = median(abs(loss - middle) for loss in self.losses)
        spread = max(max(self.losses) - middle, 1.4826 * distance)
        return max(middle + SPREAD * spread, LOSSES * highest, highest), max(
            NORMS * max(self.norms), 2.0 * longest
        ) or math.inf

    def _say(self, step: int, fault: str, loss: float, grad_norm: float) -> None:
        if fault == NOT_A_NUMBER:
            message = "step {step}: loss {loss}, gradient norm {norm}: the step is skipped, nothing has changed"
            say(message, step=step, loss=loss, norm=grad_norm)
            return
        most, longest = self.limits()
        message = (
            "step {step}: loss {loss}, gradient norm {norm}, where {most} and {longest} are the most to be expected: "
            "the step is skipped, nothing has changed"
        )
        shown = {"loss": loss, "norm": grad_norm, "most": most, "longest": longest}
        say(message, step=step, **{name: f"{value:.4g}" for name, value in shown.items()})

    @property
    def repeated(self) -> bool:
        """Whether the last steps were bad one after another, so that skipping them is no remedy."""
        return self.streak >= STREAK

    def went_back(self, step: int, to: int, former: Guard, helped: bool) -> bool:
        """Take over what the state from before the return from ``step`` knew; whether one is still worth while."""
        self.skipped, self.rows = former.skipped, former.rows
        vain = former.returned[1] if former.returned[0] == to else 0
        self.returned, self.returned_from, self.streak = [to, vain if helped else vain + 1], step, 0
        return self.returned[1] <= RETURNS

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self) | {"highest": [json_number(value) for value in self.highest]}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Guard:
        """The guard of a checkpoint."""
        values = dict(state)
        values["highest"] = [float(value) for value in values["highest"]]
        return cls(**values)


def json_number(value: float) -> float | str:
    """``value``, or the string that stands for it where JSON has no number."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
