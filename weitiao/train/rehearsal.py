"""The worst micro-batch first: a run that cannot hold its largest rows says so before step 1, not at step 840.

rehearse(model, method, task, examples, options, pad_id=0)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from weitiao.data.batch import Example, collate
from weitiao.errors import RunError, t
from weitiao.generate.engine import positions
from weitiao.methods.base import Method, computing
from weitiao.train import checkpoint, modes
from weitiao.train.course import Course
from weitiao.train.many import ALONE, Many, fitting
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import Task


def worst(course: Course) -> list[Example]:
    """The micro-batch of the first epoch with the most tokens that are computed."""
    steps = range(1, min(course.steps_per_epoch, course.total_steps) + 1)
    batches = (batch for step in steps for batch in course.micro_batches(step))
    return max(filter(None, batches), key=course.computed_tokens)


def rehearse(
    model: nn.Module,
    method: Method,
    task: Task,
    train: Sequence[Example],
    options: TrainOptions,
    pad_id: int,
    recomputed: int | None = None,
    processes: Many = ALONE,
) -> float:
    """Forward and backward of the worst micro-batch; returns its mean loss, and leaves no gradient and no random number
    used. RunError if memory does not suffice or the loss is not finite."""
    options = fitting(options, processes.engine)
    course = modes.course(model, method, task, train, options, processes.ranks.size)
    state = checkpoint.random_state()
    examples = worst(course)
    batch = collate(examples, pad_id, positions(model)).to(next(model.parameters()).device)
    training = model.training
    try:
        with modes.engine(model, options, course, recomputed=recomputed):
            model.train()
            with method.training(model):
                with computing(model):
                    loss = processes.total(task, model, batch)
                loss = loss / sum(example.trained_tokens for example in examples)
                loss.backward()
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        raise RunError(_too_large(examples, course.computed_tokens(examples))) from error
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        checkpoint.set_random_state(state)
    if not math.isfinite(loss.item()):
        rows = ", ".join(example.id for example in examples[:5])
        raise RunError(t("the loss is {loss} before the first step (rows {rows})", loss=loss.item(), rows=rows))
    return loss.item()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)


def _too_large(examples: Sequence[Example], tokens: int) -> str:
    longest = max(len(example) for example in examples)
    smaller = max(longest, tokens // 2)
    message = (
        "not enough memory for the largest micro-batch, {rows} rows of up to {longest} tokens; take "
        "train.memory=low, train.micro_batch_tokens={smaller} or a smaller data.max_length"
    )
    return t(message, rows=len(examples), longest=longest, smaller=smaller)
