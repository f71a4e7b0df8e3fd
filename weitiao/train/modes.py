"""How a model is held for a while: evaluating, recomputing its activations, with every generator seeded.

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

from weitiao.methods.base import computing
from weitiao.models.quantized import codes_only
from weitiao.train import checkpoint


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
def recomputing(model: Any, active: bool) -> Iterator[None]:
    """Gradient checkpointing while it is open."""
    if active:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if active:
            model.activation_checkpointing_disable()


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
