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
from weitiao.data.batch import Example, lengths_of, plan_epoch, trained_of
from weitiao.errors import InputError, t
from weitiao.methods.base import Method
from weitiao.methods.expand import Expand
from weitiao.models import kernels
from weitiao.models.shape import Shape
from weitiao.plan import activations, speed, trace
from weitiao.plan.activations import Tape
from weitiao.plan.speed import trained_linears
from weitiao.plan.steps import Steps, Walk, computed, walk
from weitiao.train.checkpoint import SHARD_BYTES
from weitiao.train.course import Course, shares
from weitiao.train.memory import size_bytes
from weitiao.train.optim import state_bytes, step_bytes
from weitiao.train.options import TrainOptions
from weitiao.train.room import Room
from weitiao.train.tasks import Task
from weitiao.train.trunk import SHARE

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LATER_BYTES = 36 << 20  # libraries' code and tables that are touched first in training: measured resident size
GPU_CONTEXT_BYTES = 600 << 20  # CUDA's context and libraries, which torch does not count
NOWHERE = Room(0, 0, 0, 0)  # of a plan that was written before it was known
GPU_HOST_BYTES = 1500 << 20  # what they take in the host's memory


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
    """One phase's peaks; ``disk_bytes`` is what it has on the disk."""

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
    room: Room = NOWHERE

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
        """The most that the run has on the disk at once, the file of paged state with it."""
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
        known["room"] = Room(**values["room"]) if "room" in values else NOWHERE
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


def plan(
    shape: Shape,
    method: Method,
    task: Task,
    options: TrainOptions,
    train: Sequence[Example],
    *,
    facts: Facts,
    dtype: str = "float32",
    result_dtype: str = "",
    validation: Sequence[Example] = (),
    file_bytes: int = 0,
    saved_bytes: int = 0,
    processes: int = 1,
    quantize: str = "none",
) -> Plan:
    """What the run of ``options`` over ``train`` will need; the steps are those that the training loop will take.
    ``dtype`` is what frozen weights are held and computed in, ``result_dtype`` (the same if not given) what a whole
    model is saved in; ``file_bytes`` the size of the weights' files (0 for a new model), mapped while they are loaded;
    ``saved_bytes`` what quantisation (``quantize``) takes off the weights. Of several ``processes`` it is what each
    needs that holds everything, and the time where all share one machine.
    """
    on_cpu = facts.device == "cpu"
    fused = on_cpu and options.engine == "auto" and kernels.compiled() is not None
    tape = activations.tape(shape, method, dtype, fused, options.memory)
    sharing = shares(options, method, frozen_blocks(shape, method, tape))
    course = Course(train, task, options, tape.padded, sharing, processes)
    held = Held.of(shape, method, dtype, options, saved_bytes)
    result = result_size(shape, method, result_dtype or dtype)
    room = Room.of(course, options, bool(validation), held.gradients, held.moments, result)
    trunk = trunk_blocks(shape, method, options, course, facts.free_disk_bytes - room.needed, tape)
    room = replace(room, beside=(held.paged if on_cpu else 0) + states_bytes(course, tape, trunk))
    worst = trace.Worst(shape, method, task, options, course, dtype, quantize, tape)
    setting = Setting(shape, method, options, facts, tape, held, walk(course, tape), trunk, worst)
    again = setting.again(course.micro_batch_tokens, dtype)
    cost, steps, parts = setting.at(again)
    pass_bytes, pass_seconds = validation_pass(validation, course.micro_batch_tokens, tape, cost)
    needs = {
        "load": (loading_bytes(shape, dtype, file_bytes), 0),
        "train": (sum(parts.values()) + steps.peak_bytes, room.beside),
        "evaluate": (sum(parts.values()) + pass_bytes, 0),
        "checkpoint": (sum(parts.values()) + min(held.paged, max(held.window, SHARD_BYTES)), room.needed - room.beside),
    }
    phases = tuple(placed(name, *need, facts, held.paged) for name, need in needs.items())
    return Plan(
        phases=phases,
        steps=course.total_steps,
        step_seconds=steps.seconds / course.total_steps if on_cpu else None,
        total_seconds=steps.seconds + course.times(options.evaluate_every) * pass_seconds if on_cpu else None,
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
        room=room,
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


def validation_pass(rows: Sequence[Example], bound: int, tape: Tape, cost: speed.Cost) -> tuple[int, float]:
    """The peak of a pass over the validation rows, and its time."""
    lengths, targets = lengths_of(rows), trained_of(rows)
    peak, seconds = tape.forward_bytes(0, 0, 0), 0.0
    for batches in plan_epoch(lengths, 64, bound, 0, 0, padded=tape.padded):
        for batch in batches:
            tokens, length = computed(lengths[batch].tolist(), tape)
            trained = int(targets[batch].sum())
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


def result_size(shape: Shape, method: Method, dtype: str) -> int:
    """The tensors that the run leaves: what trains in float32, or the whole model in ``dtype``."""
    trained = method.count(shape)
    if method.saves == "adapter":
        return 4 * trained
    return (shape.parameters + (trained if method.adds else 0)) * ITEM_BYTES[dtype]


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
