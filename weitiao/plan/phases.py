"""Peak memory, disk and time of every phase of a run, from the model's shape, the method and the rows' lengths.

    found = plan(shape, method, task, options, examples, dtype="float32", facts=facts("float32", "runs/x"))
    found.fits, found.host_peak_bytes, found.to_dict()

Weights, gradients, the optimiser's moments and checkpoints are exact. Activations are what autograd keeps for the
backward pass of the worst micro-batch that the data and the seed will really produce (``plan.activations``). Time is
matrix products at the machine's measured rate, plus memory traffic and the cost of starting each operation
(``plan.speed``). Nothing is loaded, and no weight is read.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from weitiao import machine
from weitiao.data.batch import Example, padded_length, plan_epoch
from weitiao.errors import InputError, t
from weitiao.methods.base import Method
from weitiao.methods.expand import Expand
from weitiao.models import kernels
from weitiao.models.shape import Shape
from weitiao.plan import activations, speed, trace
from weitiao.plan.activations import Tape
from weitiao.plan.speed import trained_linears
from weitiao.train.checkpoint import SHARD_BYTES
from weitiao.train.course import Course, shares
from weitiao.train.memory import size_bytes
from weitiao.train.optim import state_bytes, step_bytes
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import Task
from weitiao.train.trunk import SHARE

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LATER_BYTES = 36 << 20  # libraries' code and tables that are touched first in training: measured resident size
GPU_CONTEXT_BYTES = 600 << 20  # CUDA's context and libraries, which torch does not count
GPU_HOST_BYTES = 1500 << 20  # what they take in the host's memory
BESIDE_BYTES = 1 << 20  # what a checkpoint holds beside tensors


@dataclass(frozen=True)
class Facts:
    """What the plan must know of the machine."""

    base_bytes: int  # resident size before a weight is loaded
    available_bytes: int  # what this process may still take, beside what it holds
    free_disk_bytes: int
    gflops: float  # of the processor
    bytes_per_second: float
    device: str = "cpu"
    gpu_available_bytes: int = 0


@dataclass(frozen=True)
class Phase:
    """One phase's peaks; ``disk_bytes`` is what it writes."""

    name: str
    host_peak_bytes: int
    gpu_peak_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run will need. ``parts`` splits the peak of a training step; ``worst_step`` counts from 1."""

    phases: tuple[Phase, ...]
    steps: int
    step_seconds: float | None  # None on a GPU, whose speed is not measured
    total_seconds: float | None
    parameters: int
    trainable_parameters: int
    tokens: int  # read in all steps
    worst_step: int
    worst_tokens: int
    dtype: str
    device: str
    available_bytes: int
    free_disk_bytes: int
    fits: bool
    recomputed_blocks: int = 0  # that compute their activations twice
    paged_bytes: int = 0  # optimiser state in a file while it trains; on a GPU, in the host's memory
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def host_peak_bytes(self) -> int:
        """The highest of all phases."""
        return max(phase.host_peak_bytes for phase in self.phases)

    @property
    def gpu_peak_bytes(self) -> int:
        """The highest of all phases; 0 where no GPU is used."""
        return max(phase.gpu_peak_bytes for phase in self.phases)

    @property
    def disk_bytes(self) -> int:
        """Everything that the run writes, the file of paged state with it."""
        return sum(phase.disk_bytes for phase in self.phases)

    @property
    def peak_phase(self) -> str:
        """The phase with the highest peak, on the GPU where one is used."""
        return max(self.phases, key=lambda phase: (phase.gpu_peak_bytes, phase.host_peak_bytes)).name

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_dict` wrote."""
        known: dict[str, Any] = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        known["phases"] = tuple(Phase(**phase) for phase in values["phases"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as plan.json and ``weitiao plan --json`` have it."""
        derived = {
            name: getattr(self, name) for name in ("peak_phase", "host_peak_bytes", "gpu_peak_bytes", "disk_bytes")
        }
        return asdict(self) | derived


def facts(dtype: str, folder: str | Path = ".") -> Facts:
    """The machine as it is now; the run will write below ``folder``."""
    device = machine.device()
    held = resident_bytes()
    return Facts(
        base_bytes=held + LATER_BYTES,
        available_bytes=machine.memory().available_bytes + held,
        free_disk_bytes=machine.disk(folder).free_bytes,
        gflops=machine.gemm_gflops(dtype),
        bytes_per_second=machine.bandwidth(),
        device=device,
        gpu_available_bytes=sum(card.free_bytes for card in machine.gpus()[:1]),
    )


def resident_bytes() -> int:
    """What this process holds in memory now."""
    import psutil

    return psutil.Process().memory_info().rss


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


def plan(
    shape: Shape,
    method: Method,
    task: Task,
    options: TrainOptions,
    train: Sequence[Example],
    *,
    facts: Facts,
    dtype: str = "float32",
    validation: Sequence[Example] = (),
    file_bytes: int = 0,
    saved_bytes: int = 0,
    quantize: str = "none",
) -> Plan:
    """What the run of ``options`` over ``train`` will need; the steps are those that the training loop will take.

    ``dtype`` is what frozen weights are held and computed in; ``file_bytes`` the size of the weights' files (0 for a
    new model), which are mapped while they are loaded; ``saved_bytes`` what quantisation (``quantize``) takes off the
    weights.
    """
    on_cpu = facts.device == "cpu"
    fused = on_cpu and options.engine == "auto" and kernels.compiled() is not None
    tape = activations.tape(shape, method, dtype, fused, options.memory)
    course = Course(train, task, options, tape.padded, shares(options, method, frozen_blocks(shape, method, tape)))
    held = Held.of(shape, method, dtype, options, saved_bytes)
    disk = disk_bytes(shape, method, options, held, dtype)
    trunk = trunk_blocks(shape, method, options, course, facts.free_disk_bytes - disk, tape)

    gone_through = trace.Worst(shape, method, task, options, course, dtype, quantize, tape)

    def walked(again: int) -> tuple[speed.Cost, Steps, dict[str, int]]:
        """All steps where so many blocks compute their activations twice, and what is held beside these."""
        cost = speed.Cost.of(shape, method, tape, facts, again / max(tape.blocks, 1), options.optimizer)
        steps = walk(course, tape, held, cost, again, trunk / shape.layers)
        if on_cpu and (lives := gone_through.peak_bytes(steps.worst, again)) is not None:
            paged = held.gradients + held.window if held.paged else 0
            steps = replace(steps, peak_bytes=max(lives, paged))
        code = activations.kernel_bytes(shape, method, tape, steps.sizes, steps.batches) if on_cpu else 0
        return cost, steps, {"weights": held.weights, "optimizer": held.moments - held.paged, "kernels": code}

    def peak_bytes(again: int) -> int:
        _, steps, parts = walked(again)
        phase = placed("train", sum(parts.values()) + steps.peak_bytes, 0, facts, held.paged)
        return phase.host_peak_bytes if on_cpu else phase.gpu_peak_bytes

    if options.memory in ("auto", "low", "fast"):
        again = tape.blocks * recomputes(options, shape, course.micro_batch_tokens, dtype, facts)
    else:
        again = fewest(tape.blocks, peak_bytes, options.memory)
    cost, steps, parts = walked(again)
    kept = sum(parts.values())
    pass_bytes, pass_seconds = validation_pass(validation, course.micro_batch_tokens, tape, cost)
    needs = {
        "load": (loading_bytes(shape, dtype, file_bytes), 0),
        "train": (kept + steps.peak_bytes, (held.paged if on_cpu else 0) + states_bytes(course, tape, trunk)),
        "evaluate": (kept + pass_bytes, 0),
        "checkpoint": (kept + min(held.paged, max(held.window, SHARD_BYTES)), disk),
    }
    phases = tuple(placed(name, *need, facts, held.paged) for name, need in needs.items())
    evaluations = sum(course.due(options.evaluate_every, step) for step in range(1, course.total_steps + 1))
    return Plan(
        phases=phases,
        steps=course.total_steps,
        step_seconds=steps.seconds / course.total_steps if on_cpu else None,
        total_seconds=steps.seconds + evaluations * pass_seconds if on_cpu else None,
        parameters=shape.parameters,
        trainable_parameters=method.count(shape),
        tokens=steps.read,
        worst_step=steps.worst,
        worst_tokens=steps.tokens,
        recomputed_blocks=again,
        dtype=dtype,
        device=facts.device,
        available_bytes=facts.available_bytes if on_cpu else facts.gpu_available_bytes,
        free_disk_bytes=facts.free_disk_bytes,
        fits=fits(phases, facts),
        paged_bytes=held.paged,
        parts={"imports": facts.base_bytes, **parts, "gradients_and_activations": steps.peak_bytes},
    )


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
    return sum(map(len, course.train)) * tape.hidden_bytes if blocks else 0


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


def walk(course: Course, tape: Tape, held: Held, cost: speed.Cost, again: int, trunk_share: float = 0.0) -> Steps:
    """Every step of the run: its peak over what is held, and its time; ``again``: blocks that compute their activations
    twice; ``trunk_share`` of the blocks run in the first epoch only."""
    read, worst, most, peak, seconds = 0, 1, 0, 0, 0.0
    sizes: set[int] = set()
    micro = 0
    for step in range(1, course.total_steps + 1):
        batches = course.micro_batches(step)
        seconds += cost.optimiser_seconds
        for number, batch in enumerate(batches):
            (tokens, length), trained = computed(lens := [*map(len, batch)], tape), sum(e.trained_tokens for e in batch)
            tokens -= course.saved_tokens(batch)
            kept_share = trunk_share if step > course.steps_per_epoch else 0.0
            seconds += cost.micro_batch_seconds(tokens, length, trained, kept_share)
            read += sum(lens)
            sizes.add(tokens)
            micro += 1
            kept = tape.kept_bytes(tokens, length, trained, again)
            # gradients take the place of activations as a backward pass goes; those of a former one are all there
            needed = held.gradients + kept if number else max(held.gradients, kept)
            needed = max(needed, held.gradients + held.window)
            if needed > peak:
                worst, most, peak = step, tokens, needed
    return Steps(read, worst, most, peak, seconds, len(sizes), micro)


def computed(lengths: Sequence[int], tape: Tape) -> tuple[int, int]:
    """The tokens of a micro-batch with rows of these lengths that are computed, and the length of a row whose tokens
    see as many others as theirs do on average."""
    if tape.padded:
        length = padded_length(max(lengths))
        return len(lengths) * length, length
    return sum(lengths), round(sum(length * length for length in lengths) / sum(lengths))


def validation_pass(rows: Sequence[Example], bound: int, tape: Tape, cost: speed.Cost) -> tuple[int, float]:
    """The peak of a pass over the validation rows, and its time."""
    lengths = [len(example) for example in rows]
    peak, seconds = tape.forward_bytes(0, 0, 0), 0.0
    for batches in plan_epoch(lengths, 64, bound, 0, 0, padded=tape.padded):
        for batch in batches:
            tokens, length = computed([lengths[row] for row in batch], tape)
            trained = sum(rows[row].trained_tokens for row in batch)
            peak = max(peak, tape.forward_bytes(tokens, length, trained))
            seconds += cost.forward_seconds(tokens, length, trained)
    return peak, seconds


def recomputes(options: TrainOptions, shape: Shape, tokens: int, dtype: str, facts: Facts) -> bool:
    """Whether the loop will forget activations and compute them again, by the loop's own rule."""
    if options.memory != "auto":
        return options.memory == "low"
    return 2 * shape.widths * tokens * ITEM_BYTES[dtype] > facts.available_bytes // 2


def loading_bytes(shape: Shape, dtype: str, file_bytes: int) -> int:
    """Weights in ``dtype``; where the files hold another one, their mapped pages as well until all are converted."""
    weights = shape.parameters * ITEM_BYTES[dtype]
    return weights if abs(file_bytes - weights) < weights // 4 else weights + file_bytes


def disk_bytes(shape: Shape, method: Method, options: TrainOptions, held: Held, dtype: str) -> int:
    """Checkpoints kept (the newest, the best, and one being written) and the result."""
    checkpoint = held.gradients + held.moments + BESIDE_BYTES
    number = options.keep + 1 + (options.best is not None)
    result = held.gradients if method.saves == "adapter" else shape.parameters * ITEM_BYTES[dtype]
    return number * checkpoint + result


def placed(name: str, needed: int, written: int, facts: Facts, paged: int) -> Phase:
    """A phase whose tensors take ``needed`` bytes where the model is: in memory, or on the GPU, whose ``paged`` bytes
    are in memory from the first step on."""
    if facts.device == "cpu":
        return Phase(name, facts.base_bytes + needed, 0, written)
    host = facts.base_bytes + GPU_HOST_BYTES + (paged if name != "load" else 0)
    return Phase(name, host, needed + GPU_CONTEXT_BYTES, written)


def fits(phases: Sequence[Phase], facts: Facts) -> bool:
    """Whether memory, GPU memory and disk suffice for every phase."""
    return (
        max(phase.host_peak_bytes for phase in phases) <= facts.available_bytes
        and (facts.device == "cpu" or max(phase.gpu_peak_bytes for phase in phases) <= facts.gpu_available_bytes)
        and sum(phase.disk_bytes for phase in phases) <= facts.free_disk_bytes
    )
