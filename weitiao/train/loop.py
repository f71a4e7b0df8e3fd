"""The one training loop: every task and every method goes through ``fit``.

    fit(model, method, TaskOptions().build(), examples, TrainOptions(epochs=3), run=Run.create("runs/a", {}))

The loss of a step is the sum over all trained tokens of its rows divided by their count, however the rows are cut
into micro-batches. Evaluators are callables that are passed in, so the loop knows nothing of the rooms to its right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from weitiao.data.batch import Example, collate, lengths_of, plan_epoch, trained_of
from weitiao.errors import InputError, Interrupted, say, t
from weitiao.generate.engine import positions
from weitiao.machine import awake_seconds
from weitiao.methods.base import Method, compute_dtype, computing, trainable
from weitiao.models import heads, shape
from weitiao.runs import Run, command, folder_bytes
from weitiao.train import checkpoint, many, modes, optim, recovery
from weitiao.train.course import Course
from weitiao.train.guard import Guard, json_number
from weitiao.train.many import ALONE, Many
from weitiao.train.modes import evaluating, machine_facts
from weitiao.train.options import TrainOptions
from weitiao.train.paging import Paged
from weitiao.train.parts import Parts, norm
from weitiao.train.progress import counting
from weitiao.train.stopping import Stop
from weitiao.train.tasks import Task
from weitiao.train.trunk import Trunk
from weitiao.weights.folders import problems

Evaluator = Callable[[nn.Module], Mapping[str, float]]
Progress = Callable[[Mapping[str, Any], int], None]
Words = Callable[[Example], str]
SHOWN_ROWS = 20


@dataclass
class Fit:
    """What a run came to. ``history``: the lines that this process wrote to metrics.jsonl; ``paged_bytes``: the
    optimiser's state that lay outside the memory it was needed in; ``disk_bytes``: the most that the run's folder
    held at once."""

    steps: int
    best_step: int | None = None
    best_metric: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    paged_bytes: int = 0
    disk_bytes: int = 0


def fit(
    model: nn.Module,
    method: Method,
    task: Task,
    train: Sequence[Example],
    options: TrainOptions,
    *,
    run: Run,
    validation: Sequence[Example] | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
    pad_id: int = 0,
    resume: bool = False,
    allow_changes: bool = False,
    recomputed: int | None = None,
    progress: Progress | None = None,
    words: Words | None = None,
    processes: Many = ALONE,
) -> Fit:
    """Train ``model``, to which ``method`` is attached, on ``train``; on return it holds the best weights.

    ``evaluators`` are called with the model and return measures that join the validation loss. With ``resume`` the
    run goes on from its newest whole checkpoint, bit for bit, with what differs from then only if ``allow_changes``.
    ``progress(record, total_steps)`` is told every line; ``words(row)`` gives the text of a row that is left out;
    ``recomputed``: how many blocks compute their activations twice, where the plan has found it; ``processes``: those
    that compute a share of every step each, where there are several (``train.many``).
    InputError for rows without a trained token, before step 1; Interrupted after Ctrl-C or SIGTERM, with a checkpoint
    written; RunError for a disk without room, for another trainer in the run's folder, and for steps that stay bad.
    """
    check(model, train)
    options = many.fitting(options, processes.engine)
    course = modes.course(model, method, task, train, options, processes.ranks.size)
    state = Trainer(model, method, task, options, run, course, pad_id, progress, processes)
    state.validation, state.evaluators, state.words = validation or (), evaluators or {}, words
    was_training = model.training
    with (
        run.locked(),
        state.started(resume, allow_changes),
        Trunk.of(model, course, options, run, state.reserved_bytes) or nullcontext() as state.trunk,
        state.stop as stop,
        modes.engine(model, options, course, state.trunk, recomputed),
    ):
        model.train()
        try:
            if state.pending:
                state.evaluate(stop)
                if not stop.asked:
                    state.save()
            while state.step < course.total_steps and not stop.asked:
                if not state.advance():
                    continue
                improved = course.due(options.evaluate_every, state.step) and state.evaluate(stop)
                ended = state.step == course.total_steps
                if improved or ended or stop.asked or course.due(options.save_every, state.step):
                    state.save()
            if state.step < course.total_steps or state.pending:
                again = command("weitiao", "train", "--resume", run.path)
                message = "stopped after step {step}; go on with: {command}"
                raise Interrupted(t(message, step=state.step, command=again))
        finally:
            model.train(was_training)
    state.restore_best()
    best = state.best or {}
    paged_bytes = state.parts.paged.size if state.parts.paged else 0
    return Fit(state.step, best.get("step"), best.get("metric"), state.history, paged_bytes, state.disk_bytes)


def check(model: Any, train: Sequence[Example]) -> None:
    """InputError for what cannot be trained: no rows, rows without a target, a model that sees what follows."""
    if shape.kind_of(model.config) != "causal" and not heads.has_one(model.config):
        message = "{model} sees what follows a token, so it cannot learn to predict it; take a causal model"
        raise InputError(t(message, model=type(model).__name__))
    if compute_dtype(model) == torch.float16:
        raise InputError(t("model.dtype: float16 overflows in training; take bfloat16, float32 or auto"))
    if not train:
        raise InputError(t("there are no rows to train on"))
    if empty := [train[row].id for row in np.flatnonzero(trained_of(train) == 0).tolist()]:
        message = "{count} rows have no token to train on: {rows}"
        shown = ", ".join(empty[:SHOWN_ROWS]) + (" …" if len(empty) > SHOWN_ROWS else "")
        raise InputError(t(message, count=len(empty), rows=shown))
    context: Callable[..., int] | None = getattr(model.config, "context", None)
    if context and (seen := [example.id for example in train if example.mask[1 : context(example.ids)].any()]):
        message = (
            "{count} rows train on what this model reads before it writes ({rows}); data.train_on=assistant does not"
        )
        shown = ", ".join(seen[:SHOWN_ROWS]) + (" …" if len(seen) > SHOWN_ROWS else "")
        raise InputError(t(message, count=len(seen), rows=shown))
    if not trainable(model):
        raise InputError(t("nothing in the model is set to train; was the method attached?"))


class Trainer:
    """The moving parts of a run: step, optimiser, guard, best so far."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        task: Task,
        options: TrainOptions,
        run: Run,
        course: Course,
        pad_id: int,
        progress: Progress | None,
        processes: Many,
    ):
        self.many, self.stop = processes, Stop(processes.ranks.alone)
        self.model, self.method, self.task, self.options = model, method, task, options
        self.run, self.course, self.pad_id, self.progress = run, course, pad_id, progress
        self.validation: Sequence[Example] = ()
        self.evaluators: Mapping[str, Evaluator] = {}
        self.words: Words | None = None
        self.positions = positions(model)
        self.device = next(model.parameters()).device
        self.optimizer = optim.build(
            options.optimizer,
            method.parameter_groups(model, options.learning_rate),
            learning_rate=options.learning_rate,
            betas=options.betas,
            epsilon=options.epsilon,
            weight_decay=options.weight_decay,
        )
        paged = Paged.of(self.optimizer, options.optimizer, run.path) if options.paged_optimizer else None
        self.parts = Parts(model, method, self.optimizer, paged, processes)
        self.trunk: Trunk | None = None
        self.guard = Guard(min(options.warmup_steps, course.total_steps // 2))
        self.reserved_bytes = 0  # of the disk, for checkpoints and the result
        self.disk_bytes = 0
        self.weights_norm = torch.zeros((), device=self.device)  # after the last step: finite, or they are lost
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.pending = False  # an evaluation was due when the run was stopped
        self.history: list[dict[str, Any]] = []

    # ---- one step --------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """One optimiser step, logged; false if it led back to a checkpoint."""
        started = awake_seconds()
        self.step += 1
        options, course = self.options, self.course
        batches = course.micro_batches(self.step)
        rows = [example for batch in batches for example in batch]
        if not rows:  # all of them are left out
            return True
        by = optim.factor(options.schedule, self.step, course.total_steps, options.warmup_steps, options.minimum_rate)
        rate = optim.set_rate(self.optimizer, by)
        generators = self.parts.generators()
        loss, norm, weights_norm = self.gradient(batches)
        if not math.isfinite(weights_norm):
            return recovery.recover(self, self.step - 1, poisoned=True)
        fault = self.guard.fault(self.step, loss, norm)
        if fault:
            self.log(self.line(rows, loss, norm, rate, started) | {"skipped": fault})
            if recovery.lost(self):
                return recovery.recover(self, self.step, poisoned=True)
            fault, loss, norm, rows = self.once_more(rows, generators)
        if not fault:
            (self.parts.paged or self.optimizer).step()
            self.method.after_step(self.model, self.step)
            self.weights_norm = self.parts.norm()
            self.log(self.line(rows, loss, norm, rate, started))
        self.optimizer.zero_grad(set_to_none=True)
        return not self.guard.repeated or recovery.recover(self, self.step)

    def once_more(self, rows: Sequence[Example], generators: Sequence[torch.Tensor]) -> tuple[str, float, float, Any]:
        """Compute a bad step again: what came from outside does not come back, and rows that are bad by themselves can
        be left out. What is wrong with it still, its loss, its gradient's norm, its rows."""
        for _ in range(2):
            self.parts.set_generators(generators)
            batches = self.course.micro_batches(self.step)
            loss, norm, _ = self.gradient(batches)
            rows = [example for batch in batches for example in batch]
            if not (fault := self.guard.fault(self.step, loss, norm, again=True)):
                say("step {step}: computed once more it is sound (loss {loss})", step=self.step, loss=f"{loss:.4f}")
            if not fault or not recovery.drop(self, rows):
                return fault, loss, norm, rows
        return fault, loss, norm, rows

    def gradient(self, batches: Sequence[Sequence[Example]]) -> list[float]:
        """The step's gradient, shortened; its loss, its norm, and the norm of the weights that it was computed with."""
        self.optimizer.zero_grad(set_to_none=True)
        parameters = self.parts.parameters.values()
        loss = self.backward(batches, sum(example.trained_tokens for batch in batches for example in batch))
        facts = self.many.summed(torch.stack((loss, self.weights_norm)), parameters, self.stop)
        length = norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, self.options.max_grad_norm or math.inf, length)
        return torch.stack((facts[0], length, facts[1])).tolist()  # one process's only wait for the device

    def line(self, rows: Sequence[Example], loss: float, norm: float, rate: float, started: float) -> dict[str, Any]:
        """What is logged of a step."""
        return {
            "step": self.step,
            "epoch": self.step / self.course.steps_per_epoch,
            "loss": json_number(loss),
            "tokens": sum(len(example) for example in rows),
            "trained_tokens": sum(example.trained_tokens for example in rows),
            "seconds": awake_seconds() - started,
            "learning_rate": rate,
            "grad_norm": json_number(norm),
        }

    def backward(self, batches: Sequence[Sequence[Example]], trained_tokens: int) -> torch.Tensor:
        """Add the step's gradient, micro-batch by micro-batch; returns its loss."""
        total = torch.zeros((), device=self.device)
        with self.method.training(self.model):
            for examples in self.many.own(batches):
                if self.trunk:
                    self.trunk.rows = self.trunk.numbers(examples)
                loss = self.loss(examples or self.many.spare(batches)) / trained_tokens
                loss = loss if examples else 0.0 * loss
                loss.backward()
                total += loss.detach()
            if self.trunk:
                self.trunk.rows = []
        penalty = self.method.penalty(self.model)
        if isinstance(penalty, torch.Tensor) and self.many.ranks.first:
            penalty.backward()
            total += penalty.detach()
        return total

    def loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """The task's summed loss over one micro-batch."""
        batch = collate(examples, self.pad_id, self.positions).to(self.device)
        with computing(self.model):
            return self.many.total(self.task, self.model, batch)

    # ---- validation ------------------------------------------------------------------------------------------------

    def evaluate(self, stop: Stop) -> bool:
        """Measure the model on the validation rows and by the evaluators; whether it is the best so far.

        Random numbers and the model's mode are left as they were. A stop in between leaves the evaluation to the
        resumed run.
        """
        if not self.validation and not self.evaluators:
            return False
        started = awake_seconds()
        self.pending = True
        with evaluating(self.model), self.many.evaluating():
            measures = self.validation_loss(stop)
            for evaluator in self.evaluators.values():
                if not self.many.agree(stop):
                    measures.update(self.many.measured(partial(evaluator, self.model)))
        if self.many.agree(stop):
            return False
        self.pending = False
        seconds = awake_seconds() - started
        epoch = self.step / self.course.steps_per_epoch
        shown = {name: json_number(value) for name, value in measures.items()}
        self.log({"step": self.step, "epoch": epoch, "validation": shown, "seconds": seconds})
        return self.improves(measures)

    def validation_loss(self, stop: Stop) -> dict[str, float]:
        """Mean loss per trained token of the validation rows; empty without any."""
        if not self.validation:
            return {}
        total, bound = torch.zeros((), dtype=torch.float64), self.course.micro_batch_tokens
        lengths, size, done = lengths_of(self.validation), self.course.processes, 0
        with self.method.training(self.model), counting(t("validating")) as progress:
            for batches in plan_epoch(lengths, 64, bound, 0, 0, padded=self.course.padded, processes=size):
                for examples in self.many.own([[self.validation[row] for row in rows] for rows in batches]):
                    if stop.asked:
                        return {}
                    total += self.loss(examples or self.validation[:1]).cpu() * bool(examples)
                    progress(done := min(done + len(examples) * size, len(lengths)), len(lengths))
                self.many.agree(stop)
        loss = self.many.sum(total).item() / max(int(trained_of(self.validation).sum()), 1)
        return {"loss": loss}

    def improves(self, measures: Mapping[str, float]) -> bool:
        """Note the step as the best so far if it is."""
        name = self.options.best
        if name is None:
            return False
        if name not in measures:
            known = ", ".join(measures)
            raise InputError(t('train.best: the validation has no measure "{name}" ({known})', name=name, known=known))
        metric, sign = measures[name], -1.0 if name == "loss" else 1.0
        if not math.isfinite(metric) or (self.best and sign * metric <= sign * self.best["metric"]):
            return False
        self.best = {"step": self.step, "metric": metric, "name": name}
        return True

    def restore_best(self) -> None:
        """Put the best step's weights into the model."""
        if self.best is None or self.best["step"] == self.step:
            return
        path = self.run.checkpoints / f"{checkpoint.PREFIX}{self.best['step']:08d}"
        if wrong := self.many.ranks.told(lambda: problems(path)):
            message = "{path}, the best step, is damaged ({reason}); the last step's weights are the result"
            say(message, path=path, reason="; ".join(wrong))
            self.best = None
            return
        self.parts.put_weights(self.parts.load(path).parameters, str(path))

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self.run.log(record)
        self.history.append(record)
        if self.progress:
            self.progress(record, self.course.total_steps)

    def save(self) -> None:
        """Write a checkpoint and remove those that are no longer kept; from a state with a number that is not finite it
        is back to the one before instead."""
        epoch, in_epoch = divmod(self.step, self.course.steps_per_epoch)
        facts = {
            "epoch": epoch,
            "step_in_epoch": in_epoch,
            "best": self.best,
            "pending_evaluation": self.pending,
            "guard": self.guard.state(),
            "started_with": self.course.fingerprint(),
            "recipe": self.many.ranks.told(self.run.recipe),
            "machine": machine_facts(self.course.processes),
        }
        try:
            self.parts.save(self.run.checkpoints, self.step, facts)
        except checkpoint.Poisoned:
            recovery.recover(self, self.step, poisoned=True)
            return
        self.disk_bytes = max(self.disk_bytes, folder_bytes(self.run.path))
        best = self.best["step"] if self.best else None
        self.many.ranks.told(lambda: checkpoint.prune(self.run.checkpoints, self.options.keep, best))

    @contextmanager
    def started(self, resume: bool, allow_changes: bool) -> Iterator[None]:
        """Begin; at the end, whatever it is, the optimiser's state goes."""
        try:
            recovery.start(self, resume, allow_changes)
            self.reserved_bytes = recovery.check_room(self)
            yield
        finally:
            self.parts.close()
