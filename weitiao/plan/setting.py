"""What the steps of a run are reckoned from: what stays in memory, what comes and goes, what is computed twice.

setting = Setting(shape, method, options, facts, tape, Held.of(...), walk(course, tape), trunk, worst)
cost, steps, parts = setting.at(again=0)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from weitiao.data.batch import lengths_of
from weitiao.errors import InputError, t
from weitiao.methods.base import Method
from weitiao.methods.expand import Expand
from weitiao.models.shape import Shape
from weitiao.plan import activations, speed, trace
from weitiao.plan.activations import Tape
from weitiao.plan.need import ITEM_BYTES, Facts, placed
from weitiao.plan.speed import trained_linears
from weitiao.plan.steps import Steps, Walk
from weitiao.train.course import Course
from weitiao.train.memory import size_bytes
from weitiao.train.optim import state_bytes, step_bytes
from weitiao.train.options import TrainOptions
from weitiao.train.trunk import SHARE


@dataclass(frozen=True)
class Held:
    """Bytes that stay from step to step, exactly: ``paged`` are those of ``moments`` that lie elsewhere. ``window``
    is what the optimiser's step needs on top of them."""

    weights: int
    gradients: int
    moments: int
    paged: int
    window: int

    @classmethod
    def of(cls, shape: Shape, method: Method, dtype: str, options: TrainOptions, saved: int = 0) -> Held:
        """Frozen weights in ``dtype``, less the ``saved`` bytes of quantised ones; what trains in float32."""
        trained = method.count(shape)
        frozen = shape.parameters - (0 if method.adds else trained)
        linear = sum(rows * columns for rows, columns in trained_linears(shape, method))
        moments = state_bytes(options.optimizer, trained, linear)
        paged = options.paged_optimizer
        window = max(step_bytes(options.optimizer, *one, paged) for one in trained_tensors(shape, method))
        weights = frozen * ITEM_BYTES[dtype] - saved + 4 * trained
        return cls(weights, 4 * trained, moments, moments if paged else 0, window)


def trained_tensors(shape: Shape, method: Method) -> list[tuple[int, bool]]:
    """Numbers of each tensor that trains and whether it is the weight of a linear. Where a method adds tensors of its
    own it is one, at least as large as any of them."""
    linears = {f"{linear.name}.weight" for linear in shape.linears}
    if names := method.base_names(shape):
        return [(math.prod(shape.tensors[name]), name in linears) for name in names]
    most = min(method.count(shape), max(map(math.prod, shape.tensors.values())))
    ranks = [getattr(method, "rank", 0), *getattr(method, "rank_pattern", {}).values()]
    if any(ranks) and not getattr(method, "modules_to_save", ()):
        most = min(most, max(ranks) * max(max(linear.inputs, linear.outputs) for linear in shape.linears))
    return [(most, True)]


@dataclass(frozen=True)
class Setting:
    """What the steps of a run are reckoned from, however many blocks compute their activations twice. ``trunk``: blocks
    that run in the first epoch only."""

    shape: Shape
    method: Method
    options: TrainOptions
    facts: Facts
    tape: Tape
    held: Held
    walked: Walk
    trunk: int
    worst: trace.Worst

    def at(self, again: int) -> tuple[speed.Cost, Steps, dict[str, int]]:
        """All steps where ``again`` blocks compute their activations twice, and what is held beside these."""
        tape, held = self.tape, self.held
        twice, kept = again / max(tape.blocks, 1), self.trunk / self.shape.layers
        cost = speed.Cost.of(self.shape, self.method, tape, self.facts, twice, self.options.optimizer)
        steps = self.walked.steps(tape, held.gradients, held.window, cost, again, kept)
        on_cpu = self.facts.device == "cpu"
        if on_cpu and (lives := self.worst.peak_bytes(steps.worst, again)) is not None:
            steps = replace(steps, peak_bytes=max(lives, held.gradients + held.window if held.paged else 0))
        code = activations.kernel_bytes(self.shape, self.method, tape, steps.sizes, steps.batches) if on_cpu else 0
        return cost, steps, {"weights": held.weights, "optimizer": held.moments - held.paged, "kernels": code}

    def peak_bytes(self, again: int) -> int:
        """The peak of the training phase, where the model is."""
        _, steps, parts = self.at(again)
        phase = placed("train", sum(parts.values()) + steps.peak_bytes, 0, self.facts, self.held.paged)
        return phase.host_peak_bytes if self.facts.device == "cpu" else phase.gpu_peak_bytes

    def again(self, micro_batch_tokens: int, dtype: str) -> int:
        """How many blocks will compute their activations twice."""
        if self.options.memory in ("auto", "low", "fast"):
            return self.tape.blocks * recomputes(self.options, self.shape, micro_batch_tokens, dtype, self.facts)
        return fewest(self.tape.blocks, self.peak_bytes, self.options.memory)


def trunk_blocks(shape: Shape, method: Method, options: TrainOptions, course: Course, free: int, tape: Tape) -> int:
    """How many of the lowest blocks will run in the first epoch only (``train.trunk``), with so many ``free`` bytes of
    disk."""
    again = course.total_steps > course.steps_per_epoch and not course.pack_tokens
    if options.trunk == "off" or tape.padded or not again:
        return 0
    blocks = frozen_blocks(shape, method, tape)
    return blocks if states_bytes(course, tape, blocks) <= SHARE * free else 0


def frozen_blocks(shape: Shape, method: Method, tape: Tape) -> int:
    """How many of the lowest blocks see the same for a row in every epoch."""
    if any(shape.tensors[name] == (shape.vocab, shape.hidden) for name in method.base_names(shape)):
        return 0
    return 1 if isinstance(method, Expand) else shape.layers - tape.blocks  # new blocks stand behind old ones


def states_bytes(course: Course, tape: Tape, blocks: int) -> int:
    """What is kept of so many blocks on disk."""
    return int(lengths_of(course.train).sum()) * tape.hidden_bytes if blocks else 0


def fewest(blocks: int, peak_bytes: Callable[[int], int], limit: str) -> int:
    """How many of so many blocks have to compute their activations twice for the peak to stay below ``limit``
    (``4GiB``). InputError if all of them are not enough."""
    if (least := peak_bytes(blocks)) > size_bytes(limit):
        message = (
            "train.memory: {limit} will not do: with the activations of every block computed twice the peak is {peak}; "
            "give so much, or take fewer train.micro_batch_tokens, a smaller data.max_length or model.quantize=nf4"
        )
        raise InputError(t(message, limit=limit, peak=f"{-(-least // 2**20)}MiB"))
    if peak_bytes(0) <= size_bytes(limit):  # one alone takes its input more than none; from there on it falls
        return 0
    return bisect_left(range(blocks), True, lo=1, key=lambda number: peak_bytes(number) <= size_bytes(limit))


def recomputes(options: TrainOptions, shape: Shape, tokens: int, dtype: str, facts: Facts) -> bool:
    """Whether the loop will forget activations and compute them again, by the loop's own rule."""
    if options.memory != "auto":
        return options.memory == "low"
    return 2 * shape.widths * tokens * ITEM_BYTES[dtype] > facts.available_bytes // 2
