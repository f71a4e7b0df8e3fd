"""Intervals for measures that are functions of summed counts: whole dialogues are resampled, vectorised.

    resampling = Resampling(["d1", "d1", "d2"], samples=1000, seed=0)            # the dialogue of each turn
    resampling.ratio(right, counted)                                             # Figure(value, low, high, count)
    resampling.difference(tuned, base)                                           # of one Measure of two systems, paired

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


@dataclass(frozen=True)
class Measure:
    """What a figure is made of: ``counts`` [cases, K], whose sums ``of`` turns into the value (None: the first over the
    second), resting on ``cases`` cases (all by default). ``higher``: whether more is better."""

    counts: np.ndarray
    of: Callable[[np.ndarray], float] | None = None
    cases: int | None = None
    higher: bool = True

    @property
    def count(self) -> int:
        """The cases that the value rests on."""
        return len(self.counts) if self.cases is None else self.cases

    @property
    def value(self) -> float:
        """The value of all cases together; NaN where none counts."""
        return float(self.values(self.counts.sum(0, keepdims=True))[0]) if self.count else float("nan")

    def values(self, sums: np.ndarray) -> np.ndarray:
        """The value of each row of summed counts [rows, K]; NaN where nothing counts."""
        if self.of is not None:
            return np.array([self.of(row) for row in sums], dtype=float)
        return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)


def ratio(part: Sequence[float] | np.ndarray, whole: Sequence[float] | np.ndarray, *, higher: bool = True) -> Measure:
    """sum(part) / sum(whole), both [cases]; it rests on as many cases as the whole, if that counts some."""
    counts = np.stack([np.asarray(part), np.asarray(whole)], axis=1)
    return Measure(counts, None, int(counts[:, 1].sum()) if counts.dtype.kind in "iub" else None, higher)


def mean(values: Sequence[float] | np.ndarray, *, higher: bool = True) -> Measure:
    """The mean of one value a case; a case whose value is NaN does not count."""
    values = np.asarray(values, dtype=float)
    given = ~np.isnan(values)
    return Measure(np.stack([np.where(given, values, 0.0), given], axis=1), None, int(given.sum()), higher)


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
        of_group = np.zeros((self.groups, counts.shape[1]), dtype=np.result_type(counts.dtype, np.int64))
        np.add.at(of_group, self.group, counts)
        return self.drawn @ of_group

    def of(self, measure: Measure) -> Figure:
        """The figure of ``measure``; 0 where no case counts. Draws that hold no case are left out."""
        if not measure.count or np.isnan(value := measure.value):
            return Figure(0.0, 0.0, 0.0, 0)
        return _figure(value, measure.values(self.sums(measure.counts)), measure.count)

    def difference(self, ours: Measure, theirs: Measure) -> Figure:
        """``ours`` less ``theirs``, of the same cases in the same order: both are taken from the same draws, so that
        what makes a case hard for both does not widen the interval (the paired bootstrap; Koehn 2004)."""
        if not (ours.count and theirs.count) or np.isnan(value := ours.value - theirs.value):
            return Figure(0.0, 0.0, 0.0, 0)
        drawn = ours.values(self.sums(ours.counts)) - theirs.values(self.sums(theirs.counts))
        return _figure(value, drawn, min(ours.count, theirs.count))

    def ratio(self, part: np.ndarray, whole: np.ndarray) -> Figure:
        """sum(part) / sum(whole), both [cases]; 0 where the whole is 0. Draws that hold no case are left out."""
        return self.of(ratio(part, whole))

    def figure(self, counts: np.ndarray, measure: Callable[[np.ndarray], float], cases: int) -> Figure:
        """``measure`` of summed counts [K], the value from all cases [cases, K] and the interval from the draws."""
        return self.of(Measure(counts, measure, cases))


def _figure(value: float, drawn: np.ndarray, count: int) -> Figure:
    drawn = drawn[~np.isnan(drawn)]  # few draws of few cases may hold none at all
    low, high = np.percentile(drawn, PERCENTILES) if len(drawn) else (value, value)
    return Figure(float(value), float(low), float(high), count)
