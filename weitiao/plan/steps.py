"""The steps of a run, walked before it: which of them needs most, and how long all of them take.

walked = walk(course, tape)                         # once
walked.steps(tape, held_bytes, window_bytes, cost)  # for every choice of what is computed twice
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from weitiao.data.batch import padded_length
from weitiao.errors import t
from weitiao.plan.activations import Tape
from weitiao.plan.speed import Cost
from weitiao.train.course import Course
from weitiao.train.progress import counting

WALKED = 160_000  # rows whose steps are looked at one by one, or the first epoch; what follows is taken to be like them


class MicroBatch(NamedTuple):
    """What is computed at once; ``first``: of its step; ``later``: not in the first epoch."""

    step: int
    tokens: int  # computed
    length: int
    trained: int
    first: bool
    later: bool


@dataclass(frozen=True)
class Steps:
    """Tokens read in all; the step that needs most (its number from 1, its tokens, what it adds to what is held); how
    long all take."""

    read: int
    worst: int
    tokens: int
    peak_bytes: int
    seconds: float
    sizes: int  # different numbers of tokens that are computed at once
    batches: int  # that are computed at once


@dataclass(frozen=True)
class Walk:
    """The first ``walked`` of ``total`` steps, micro-batch by micro-batch, and the tokens that they read."""

    batches: Sequence[MicroBatch]
    walked: int
    total: int
    read: int

    def steps(self, tape: Tape, gradients: int, window: int, cost: Cost, again: int, trunk_share: float = 0.0) -> Steps:
        """The peak of every step over what is held, and the time of all; ``gradients`` and ``window`` are those of
        ``Held``; ``again``: blocks that compute their activations twice; ``trunk_share`` of the blocks run in the first
        epoch only."""
        worst, peak, seconds, rest_seconds = MicroBatch(1, 0, 0, 0, True, False), 0, 0.0, 0.0
        for batch in self.batches:
            _, tokens, length, trained, first, later = batch
            seconds += cost.micro_batch_seconds(tokens, length, trained, trunk_share if later else 0.0)
            if self.walked < self.total:
                rest_seconds += cost.micro_batch_seconds(tokens, length, trained, trunk_share)
            kept = tape.kept_bytes(tokens, length, trained, again)
            # gradients take the place of activations as a backward pass goes; those of a former one are all there
            needed = max(max(gradients, kept) if first else gradients + kept, gradients + window)
            if needed > peak:
                worst, peak = batch, needed
        more = (self.total - self.walked) / self.walked
        seconds += more * rest_seconds + self.total * cost.optimiser_seconds
        sizes = len({batch.tokens for batch in self.batches})
        read, batches = (count + round(more * count) for count in (self.read, len(self.batches)))
        return Steps(read, worst.step, worst.tokens, peak, seconds, sizes, batches)


def walk(course: Course, tape: Tape) -> Walk:
    """The steps of ``course``: all, or as many whole epochs as WALKED holds. Every epoch has the same rows, cut in
    another way; the largest rows, on which the peak depends, are in each."""
    total, each = course.total_steps, course.steps_per_epoch
    walked = min(total, max(1, WALKED // len(course.examples)) * each)
    batches, read = [], 0
    with counting(t("planning the steps")) as progress:
        for step in range(1, walked + 1):
            for number, rows in enumerate(course.micro_batches(step)):
                if not rows:  # a process that has none
                    continue
                lengths = [*map(len, rows)]
                tokens, length = computed(lengths, tape)
                tokens, trained = tokens - course.saved_tokens(rows), sum(row.trained_tokens for row in rows)
                batches.append(MicroBatch(step, tokens, length, trained, number < course.processes, step > each))
                read += sum(lengths)
            progress(step, walked)
    return Walk(batches, walked, total, read)


def computed(lengths: Sequence[int], tape: Tape) -> tuple[int, int]:
    """The tokens of a micro-batch with rows of these lengths that are computed, and the length of a row whose tokens
    see as many others as theirs do on average."""
    if tape.padded:
        length = padded_length(max(lengths))
        return len(lengths) * length, length
    return sum(lengths), round(sum(length * length for length in lengths) / sum(lengths))
