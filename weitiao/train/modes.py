"""How a model is held for a while: evaluating, or training in the engine, with every generator seeded.

with evaluating(model):
    ...
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from weitiao.data.batch import Example, lengths_of, padded_length
from weitiao.methods.base import Method, compute_dtype, computing
from weitiao.models import kernels, modules
from weitiao.models.block import Kept, fused, packs
from weitiao.models.quantized import codes_only
from weitiao.train import checkpoint, memory
from weitiao.train.course import Course, shares
from weitiao.train.dropout import quick
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import Task
from weitiao.train.trunk import frozen_blocks


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, in the compute dtype; mode and random numbers are put back."""
    training, before = model.training, checkpoint.random_state()
    model.eval()
    try:
        with torch.no_grad(), computing(model), codes_only(model):
            yield
    finally:
        model.train(training)
        checkpoint.set_random_state(before)


@contextmanager
def engine(
    model: Any, options: TrainOptions, course: Course, trunk: Kept | None = None, recomputed: int | None = None
) -> Iterator[None]:
    """How a micro-batch of ``course`` is computed in training: with quick dropout, known blocks in one piece, freed
    memory at hand or given back, and activations computed twice in the lowest ``recomputed`` of the blocks that keep
    any; None: in all or none of them, as ``train.memory`` says."""
    again = memory.recomputes(options.memory, model, course.micro_batch_tokens) if recomputed is None else recomputed
    sharing = options.shared_prefixes if course.sharing else "off"
    lean = memory.lean(options.memory, course.padded)
    with memory.held(lean), quick(model), fused(model, whole(options), trunk, sharing):
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
            kept: list[Any] = [] if recomputed is None else [*modules.blocks(model)][frozen_blocks(model) + again :]
            for part in (part for layer in kept for part in layer.modules() if hasattr(part, "gradient_checkpointing")):
                part.gradient_checkpointing = False
        try:
            yield
        finally:
            if again:
                model.activation_checkpointing_disable()


def whole(options: TrainOptions) -> bool:
    """Whether known blocks run in one piece: without compiled kernels they would be slower than modules."""
    return options.engine == "auto" and kernels.compiled() is not None


def course(
    model: Any, method: Method, task: Task, train: Sequence[Example], options: TrainOptions, processes: int = 1
) -> Course:
    """The steps of training ``model``, to which ``method`` is attached, by so many ``processes``: whether padding is
    computed in it, and whether every row computes what it has in common with others."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    known = on_cpu and method.fuses and whole(options)
    longest = padded_length(int(lengths_of(train).max()))
    padded = not (known and packs(model, compute_dtype(model), longest))
    return Course(train, task, options, padded, shares(options, method, frozen_blocks(model)), processes)


def seed_everything(seed: int) -> None:
    """Seed every generator a run draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def machine_facts(processes: int) -> dict[str, Any]:
    """What the last bits of a result of so many processes depend on."""
    return {
        "processes": processes,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
