"""The optimiser and the learning rate's course over the steps.

    optimizer = build("adamw", groups, learning_rate=2e-4, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0)
    optimizer_rate = 2e-4 * factor("cosine", step=10, steps=100, warmup_steps=5, minimum=0.0)

A group of parameters names its own ``lr`` and, where it differs, its own ``weight_decay``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from weitiao.train.optimizers import BLOCK, NEWTON_STEPS, SMALL, AdamW8bit, Lion, Muon


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


def adamw8bit(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW with its moments in 8 bits."""
    return AdamW8bit(groups, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay)


def adafactor(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern, arXiv 1804.04235): the second moment of a matrix as a row and a column, no first."""
    return torch.optim.Adafactor(groups, lr=learning_rate, weight_decay=weight_decay)


def sgd(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with the first of ``betas`` as momentum."""
    return torch.optim.SGD(groups, lr=learning_rate, momentum=betas[0], weight_decay=weight_decay)


def lion(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Lion: the sign of an average."""
    return Lion(groups, lr=learning_rate, betas=betas, weight_decay=weight_decay)


def muon(
    groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Muon for the weights of linears, AdamW for the rest."""
    return Muon(groups, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay)


OPTIMIZERS = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "adafactor": adafactor,
    "sgd": sgd,
    "lion": lion,
    "muon": muon,
}
# bytes of state that each keeps per trained number; Adafactor's rows and columns are next to nothing
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256, "adafactor": 0.0, "sgd": 4.0, "lion": 4.0, "muon": 8.0}

# bytes that a step works in for each number of the parameter that it is at: measured
WORK_BYTES = {"adamw": 0, "adamw8bit": 29, "adafactor": 4, "sgd": 4, "lion": 4, "muon": 11}


def state_bytes(name: str, trained: int, linear: int) -> int:
    """What the optimiser ``name`` keeps for ``trained`` numbers, ``linear`` of them in the weights of linears."""
    return int(STATE_BYTES[name] * trained) - (4 * linear if name == "muon" else 0)


def kept_bytes(name: str, count: int, linear: bool) -> list[int]:
    """Of each tensor that the optimiser ``name`` keeps for a parameter of ``count`` numbers; ``linear``: the weight of
    a linear. Not for adafactor, whose tensors are not a parameter's size."""
    if name == "adamw8bit" and count >= SMALL:
        return 2 * [count, 4 * math.ceil(count / BLOCK)]
    return [4 * count] * (1 if name in ("sgd", "lion") or (name == "muon" and linear) else 2)


def step_bytes(name: str, count: int, linear: bool, paged: bool) -> int:
    """What a step holds beside weights, gradients and resting state while it is at a parameter of ``count`` numbers:
    what it works in and, if it is ``paged``, the parameter's state, in the first step one of its tensors twice."""
    work = WORK_BYTES["adamw" if name == "muon" and not linear else name]
    return sum(kept_bytes(name, count, linear)) + max(work, 4) * count if paged else work * count


def own_flops(name: str, sizes: Sequence[tuple[int, int]]) -> float:
    """Products that a step of the optimiser itself takes for linears of these ``sizes``."""
    if name != "muon":
        return 0.0
    return sum(NEWTON_STEPS * (4.0 * min(size) ** 2 * max(size) + 2.0 * min(size) ** 3) for size in sizes)


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
