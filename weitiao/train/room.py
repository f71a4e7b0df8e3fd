"""What a run takes of the disk: one calculation, for the plan before it and for the refusal at its start.

room = Room.of(course, options, tested=True, weights=4 * trained, state=8 * trained, result=2 * all)
check(run, room)                      # RunError: what needs so much, and what would make it less
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

from weitiao.errors import RunError, t
from weitiao.runs import Run, existing, folder_bytes
from weitiao.train.course import Course
from weitiao.train.options import TrainOptions
from weitiao.weights.folders import ROOM_BYTES

FEWER = ("train.keep=1", "train.save_every=none", "train.best=null")  # checkpoints
SMALLER = ("train.optimizer=adamw8bit", "method.name=lora")


@dataclass(frozen=True)
class Room:
    """Bytes of a run on disk. ``weights`` and ``state`` (the optimiser's, and the method's own) make up a checkpoint,
    of which ``most`` are there at once, the one being written among them, and ``kept`` at the end; ``beside`` is there
    while it trains (paged state, what the lowest blocks make of the rows); ``result``: the weights it leaves."""

    weights: int
    state: int
    most: int
    kept: int
    result: int = 0
    beside: int = 0

    @classmethod
    def of(cls, course: Course, options: TrainOptions, tested: bool, weights: int, state: int, result: int) -> Room:
        """That of the run of ``course``; ``tested``: something is measured by which a checkpoint can be the best."""
        best = tested and options.best is not None and options.evaluate_every != "none"
        written, kept = saves(course, options, best), options.keep + best
        return cls(weights, state, min(written, kept + 1), min(written, kept), result)

    @property
    def each(self) -> int:
        """One checkpoint."""
        return self.weights + self.state + ROOM_BYTES

    @property
    def needed(self) -> int:
        """The most at once: while it trains, or with the result."""
        return max(self.most * self.each + self.beside, self.kept * self.each + self.result)


def less(room: Room) -> str:
    """Options that make it less."""
    return ", ".join((*(FEWER if room.most > 1 else ()), *SMALLER))


def saves(course: Course, options: TrainOptions, best: bool) -> int:
    """How many steps may be followed by a checkpoint: those that are saved, those measured where the ``best`` of them
    is kept, and the last."""
    last, measured = course.total_steps, course.period(options.evaluate_every) if best else None
    periods = [period for period in (course.period(options.save_every), measured) if period]
    both = last // math.lcm(*periods) if len(periods) == 2 else 0
    return sum(last // period for period in periods) - both + all(last % period for period in periods)


def check(run: Run, room: Room) -> int:
    """The bytes that ``room`` takes beside what the run's folder holds already; RunError if the disk has fewer."""
    there = sum(folder_bytes(folder) for folder in (run.checkpoints, run.adapter, run.model))
    needed, free = max(0, room.needed - there), shutil.disk_usage(existing(run.path)).free
    if needed <= free:
        return needed
    message = (
        "{path}: the disk has no room for this run: {needed} bytes needed, {free} bytes free: {count} checkpoints at "
        "once (each {weights} weights, {state} optimiser), the result {result}, what the training itself keeps {beside}"
    )
    parts = {name: f"{getattr(room, name) / 2**20:.1f} MiB" for name in ("weights", "state", "result", "beside")}
    said = t(message, path=run.path, needed=needed, free=free, count=room.most, **parts)
    raise RunError(
        [said, t("less is needed with {options}; or give output=FOLDER on another disk", options=less(room))]
    )
