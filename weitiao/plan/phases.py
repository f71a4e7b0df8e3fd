"""Peak memory, disk and time of every phase of a run, from the model's shape, the method and the rows' lengths.

    found = plan(shape, method, task, options, examples, dtype="float32", facts=facts("float32", "runs/x"))
    found.fits, found.host_peak_bytes, found.to_dict()

Weights, gradients, the optimiser's moments and checkpoints are exact. Activations are what autograd keeps for the
backward pass of the worst micro-batch that the data and the seed will really produce (``plan.activations``). Time is
matrix products at the machine's measured rate, plus memory traffic and the cost of starting each operation
(``plan.speed``). Nothing is loaded, and no weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from weitiao import machine
from weitiao.data.batch import Example, lengths_of, plan_epoch, trained_of
from weitiao.methods.base import Method
from weitiao.models import kernels
from weitiao.models.shape import Shape
from weitiao.plan import activations, need, speed, trace
from weitiao.plan.activations import Tape
from weitiao.plan.later import ANSWER_TOKENS, ONE, Answers, later
from weitiao.plan.need import ITEM_BYTES, Facts, Phase, Plan, fits, placed
from weitiao.plan.setting import Held, Setting, frozen_blocks, states_bytes, trunk_blocks
from weitiao.plan.steps import computed, walk
from weitiao.train.checkpoint import SHARD_BYTES
from weitiao.train.course import Course, shares
from weitiao.train.options import TrainOptions
from weitiao.train.room import Room
from weitiao.train.tasks import Task

LATER_BYTES = 36 << 20  # libraries' code and tables that are touched first in training: measured resident size


def facts(dtype: str, folder: str | Path = ".", tokenised_bytes: int = 0) -> Facts:
    """The machine as it is now; the run will write below ``folder``. ``tokenised_bytes``: of ``Facts``."""
    device = machine.device()
    held = need.resident_bytes()
    return Facts(
        base_bytes=held + LATER_BYTES,
        available_bytes=machine.memory().available_bytes + held,
        free_disk_bytes=machine.disk(folder).free_bytes,
        gflops=machine.gemm_gflops(dtype),
        bytes_per_second=machine.bandwidth(),
        device=device,
        gpu_available_bytes=sum(card.free_bytes for card in machine.gpus()[:1]),
        tokenised_bytes=tokenised_bytes or held,
    )


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
    coded_bytes: tuple[int, int] = (0, 0),
    processes: int = 1,
    quantize: str = "none",
    fetched_bytes: int = 0,
    answers: Answers = ONE,
) -> Plan:
    """What the run of ``options`` over ``train`` will need; the steps are those that the training loop will take.
    ``dtype`` is what frozen weights are held and computed in, ``result_dtype`` (the same if not given) what a whole
    model is saved in; ``file_bytes`` the size of the weights' files (0 for a new model), mapped while they are loaded,
    ``fetched_bytes`` if they came from a hub; ``coded_bytes`` those of the weights that ``quantize`` puts codes for,
    and of these. Of several ``processes`` it is what each needs that holds everything, and the time where all share one
    machine. ``answers``: how the result is to be used.
    """
    on_cpu = facts.device == "cpu"
    fused = on_cpu and options.engine == "auto" and kernels.compiled() is not None
    tape = activations.tape(shape, method, dtype, fused, options.memory)
    sharing = shares(options, method, frozen_blocks(shape, method, tape))
    course = Course(train, task, options, tape.padded, sharing, processes)
    whole, codes = coded_bytes
    mapped = on_cpu and as_stored(shape, dtype, file_bytes)  # what is coded lets go of its part of the file
    held = Held.of(shape, method, dtype, options, whole - codes)
    result = result_size(shape, method, result_dtype or dtype)
    room = Room.of(course, options, bool(validation), held.gradients, held.moments, result)
    trunk = trunk_blocks(shape, method, options, course, facts.free_disk_bytes - room.needed, tape)
    room = replace(room, beside=(held.paged if on_cpu else 0) + states_bytes(course, tape, trunk))
    worst = trace.Worst(shape, method, task, options, course, dtype, quantize, tape)
    setting = Setting(shape, method, options, facts, tape, held, walk(course, tape), trunk, worst)
    ahead = first(shape, held, facts, dtype, file_bytes, fetched_bytes, codes > 0, 0 if mapped else whole)
    if not answers.context:
        answers = replace(answers, context=int(lengths_of(train).max()) + ANSWER_TOKENS)
    behind = later(shape, method, dtype, facts, held.weights, file_bytes, answers)
    return settled(setting, course, room, validation, dtype, ahead, behind)


def first(
    shape: Shape, held: Held, facts: Facts, dtype: str, file_bytes: int, fetched_bytes: int, coded: bool, spare: int
) -> list[Phase]:
    """The phases before anything trains; ``spare``: bytes of weights that codes will stand for and that go then, none
    where they are mapped, since loading does not read those."""
    before = facts.tokenised_bytes or facts.base_bytes
    loading = held.weights if coded and not spare else loading_bytes(shape, dtype, file_bytes)
    found = [Phase("fetch", before, 0, fetched_bytes), Phase("tokenise", before), placed("load", loading, 0, facts, 0)]
    return [*found, *([placed("quantise", held.weights + spare, 0, facts, 0)] if coded else [])]


def settled(
    setting: Setting,
    course: Course,
    room: Room,
    validation: Sequence[Example],
    dtype: str,
    ahead: Sequence[Phase],
    behind: Sequence[Phase],
) -> Plan:
    """The plan of a setting, for as many blocks as have to compute their activations twice, with the phases before and
    behind the training."""
    shape, method, options, facts, held = setting.shape, setting.method, setting.options, setting.facts, setting.held
    again = setting.again(course.micro_batch_tokens, dtype)
    cost, steps, parts = setting.at(again)
    pass_bytes, pass_seconds = validation_pass(validation, course.micro_batch_tokens, setting.tape, cost)
    stays, on_cpu = sum(parts.values()), facts.device == "cpu"
    window = max(held.window, SHARD_BYTES)  # of paged state
    needs = {
        "train": (stays + steps.peak_bytes, room.beside),
        "evaluate": (stays + pass_bytes, 0),
        "checkpoint": (stays + min(held.paged, window), room.needed - room.beside),
        "resume": (stays + held.gradients + (min(held.paged, window) or held.moments), 0),
    }
    middle = [placed(name, *given, facts, held.paged) for name, given in needs.items()]
    phases = (*ahead, *middle, *behind)
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


def loading_bytes(shape: Shape, dtype: str, file_bytes: int) -> int:
    """Weights in ``dtype``; where the files hold another one, their mapped pages as well until all are converted."""
    weights = shape.parameters * ITEM_BYTES[dtype]
    return weights if as_stored(shape, dtype, file_bytes) else weights + file_bytes


def as_stored(shape: Shape, dtype: str, file_bytes: int) -> bool:
    """Whether the files hold the weights in ``dtype``, so that they are mapped and not read."""
    weights = shape.parameters * ITEM_BYTES[dtype]
    return abs(file_bytes - weights) < weights // 4


def result_size(shape: Shape, method: Method, dtype: str) -> int:
    """The tensors that the run leaves: what trains in float32, or the whole model in ``dtype``."""
    trained = method.count(shape)
    if method.saves == "adapter":
        return 4 * trained
    return (shape.parameters + (trained if method.adds else 0)) * ITEM_BYTES[dtype]
