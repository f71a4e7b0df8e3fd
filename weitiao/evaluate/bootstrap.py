"""Intervals for measures that are functions of summed counts: whole dialogues are resampled, vectorised.

    resampling = Resampling(["d1", "d1", "d2"], samples=1000, seed=0)            # the dialogue of each turn
    resampling.ratio(right, counted)                                             # Figure(value, low, high, count)

Turns of one dialogue are not independent, so dialogues are drawn, not turns (percentile bootstrap, Efron 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

PERCENTILES = (2.5, 97.5)  # a 95 % interval


@dataclass(frozen=True)
class Figure:
    """A measure's value with its 95 % interval, and ``count``, the cases that it rests on."""

    value: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float]:
        """``{"value", "low", "high", "count"}``, for JSON."""
        return asdict(self)


class Resampling:
    """The same draws of dialogues for every measure, so that measures of one system can be compared draw by draw."""

    def __init__(self, groups: Sequence[str], samples: int = 1000, seed: int = 0):
        names, self.group = np.unique(np.array(groups, dtype=str), return_inverse=True)
        self.groups = len(names)
        draws = np.random.default_rng(seed)
        # [samples, groups]: how often each dialogue was drawn
        chances = np.full(self.groups, 1 / max(self.groups, 1))
        self.drawn = (
            draws.multinomial(self.groups, chances, size=samples) if self.groups else np.zeros((samples, 0), int)
        )

    def sums(self, counts: np.ndarray) -> np.ndarray:
        """Counts [cases, K] -> their sums over each draw [samples, K]."""
        of_group = np.zeros((self.groups, counts.shape[1]), dtype=np.int64)
        np.add.at(of_group, self.group, counts)
        return self.drawn @ of_group

    def ratio(self, part: np.ndarray, whole: np.ndarray) -> Figure:
        """sum(part) / sum(whole), both [cases]; 0 where the whole is 0. Draws that hold no case are left out."""
        total = int(whole.sum())
        if not total:
            return Figure(0.0, 0.0, 0.0, 0)
        sums = self.sums(np.stack([part, whole], axis=1))
        sums = sums[sums[:, 1] > 0]
        value = part.sum() / total  # few draws of few cases may hold none at all
        low, high = np.percentile(sums[:, 0] / sums[:, 1], PERCENTILES) if len(sums) else (value, value)
        return Figure(float(value), float(low), float(high), total)

    def figure(self, counts: np.ndarray, measure: Callable[[np.ndarray], float], cases: int) -> Figure:
        """``measure`` of summed counts [K], the value from all cases [cases, K] and the interval from the draws."""
        if not cases:
            return Figure(0.0, 0.0, 0.0, 0)
        low, high = np.percentile([measure(row) for row in self.sums(counts)], PERCENTILES)
        return Figure(float(measure(counts.sum(0))), float(low), float(high), cases)
