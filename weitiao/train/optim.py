"""The optimiser and the learning rate's course over the steps.

    optimizer = build("adamw", groups, learning_rate=2e-4, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0)
    optimizer_rate = 2e-4 * factor("cosine", step=10, steps=100, warmup_steps=5, minimum=0.0)

A group of parameters names its own ``lr`` and, where it differs, its own ``weight_decay``.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def build(
    name: str,
    groups: list[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser called ``name`` over ``groups``; each group remembers its full rate as ``base_lr``."""
    optimizer = OPTIMIZERS[name](groups, learning_rate, betas, epsilon, weight_decay)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def adamw(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) in torch's fused form: one pass over the memory per step."""
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True)


OPTIMIZERS = {"adamw": adamw}


def factor(schedule: str, step: int, steps: int, warmup_steps: int, minimum: float) -> float:
    """What the full learning rate is multiplied with in ``step`` (from 1) of ``steps``.

    It rises linearly over the first ``warmup_steps`` (never more than half of all steps), then stays (constant), or
    falls towards ``minimum`` of the full rate along a line (linear) or half a cosine (cosine). The minimum is where the
    step after the last would be, so that no step is spent at a rate of zero.
    """
    warmup_steps = min(warmup_steps, steps // 2)
    if step <= warmup_steps:
        return step / warmup_steps
    gone = (step - warmup_steps) / (steps - warmup_steps + 1)
    falls = {"constant": 1.0, "linear": 1.0 - gone, "cosine": 0.5 * (1.0 + math.cos(math.pi * gone))}
    return falls[schedule] if schedule == "constant" else minimum + (1.0 - minimum) * falls[schedule]


def set_rate(optimizer: torch.optim.Optimizer, by: float) -> float:
    """Set every group to ``by`` times its full rate; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * by
    return optimizer.param_groups[0]["lr"]
