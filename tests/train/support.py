"""A tiny model and a few rows, the same every time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weitiao.data.batch import Example
from weitiao.methods import METHODS
from weitiao.methods.base import Method, trainable
from weitiao.models import tiny
from weitiao.runs import Run
from weitiao.train.loop import Fit, fit
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import TaskOptions


def rows(count: int = 12, seed: int = 0, vocabulary: int = 300, lengths: tuple[int, int] = (4, 24)) -> list[Example]:
    """Random rows of mixed lengths; about half of each row's tokens are trained, the last always."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(draw.integers(*lengths))
        mask = draw.random(length) < 0.5
        mask[-1] = True
        found.append(Example(draw.integers(5, vocabulary, length).astype(np.int32), mask, f"row:{number}"))
    return found


def method_of(values: Mapping[str, Any]) -> Method:
    return METHODS[values["name"]].model_validate(values)


def model_with(values: Mapping[str, Any], family: str = "llama", dtype: str = "float32", seed: int = 0):
    """A tiny model with a method attached, and the method."""
    model = tiny.make(family, seed=seed).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    method = method_of(values)
    torch.manual_seed(seed)
    return method.attach(model), method


def train(
    folder: Path,
    examples: Sequence[Example],
    values: Mapping[str, Any] = {"name": "full"},
    *,
    model: Any = None,
    dtype: str = "float32",
    task: Mapping[str, Any] = {},
    options: Mapping[str, Any] = {},
    **more: Any,
) -> tuple[Fit, Any, Run]:
    """Train a fresh tiny model (or ``model``) in a fresh run folder (or, resuming, in the one that is there)."""
    wrapped, method = model or model_with(values, dtype=dtype)
    run = Run.open(folder) if more.get("resume") else Run.create(folder, {"method": dict(values)}, overwrite=True)
    defaults = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "seed": 1}
    chosen = TrainOptions.model_validate({**defaults, **options})
    done = fit(wrapped, method, TaskOptions.model_validate(task).build(), examples, chosen, run=run, **more)
    return done, wrapped, run


def weights_hash(model: torch.nn.Module) -> str:
    """One hash over every trainable parameter's bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(trainable(model).items()):
        digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def losses(run: Run) -> list[float]:
    return [record["loss"] for record in run.metrics() if "loss" in record]
