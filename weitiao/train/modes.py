"""How a model is held for a while: evaluating, or training in the engine, with every generator seeded.

with evaluating(model):
    ...
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from weitiao.data.batch import padded_length
from weitiao.methods.base import Method, compute_dtype, computing
from weitiao.models import kernels
from weitiao.models.block import Kept, fused, packs
from weitiao.models.quantized import codes_only
from weitiao.train import checkpoint, memory
from weitiao.train.dropout import quick
from weitiao.train.options import TrainOptions


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
def engine(model: Any, options: TrainOptions, batch_tokens: int, trunk: Kept | None = None) -> Iterator[None]:
    """How a micro-batch of so many tokens is computed in training: with quick dropout, known blocks in one piece, freed
    memory at hand, and activations computed twice where they would not fit."""
    again = memory.recomputes(options.memory, model, batch_tokens)
    with memory.kept(), quick(model), fused(model, whole(options), trunk):
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            if again:
                model.activation_checkpointing_disable()


def whole(options: TrainOptions) -> bool:
    """Whether known blocks run in one piece: without compiled kernels they would be slower than modules."""
    return options.engine == "auto" and kernels.compiled() is not None


def padded(model: Any, method: Method, options: TrainOptions, longest: int) -> bool:
    """Whether padding is computed in training ``model``, to which ``method`` is attached, on rows of up to ``longest``
    tokens."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    known = on_cpu and method.fuses and whole(options)
    return not (known and packs(model, compute_dtype(model), padded_length(longest)))


def seed_everything(seed: int) -> None:
    """Seed every generator a run draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def machine_facts() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
