"""How a step is cut to fit the memory; none of it changes a result beyond the last bits.

tokens = micro_batch_tokens("auto", longest=512)
recompute = recomputes("auto", model, tokens)
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from weitiao import machine
from weitiao.methods.base import compute_dtype
from weitiao.models import modules, shape

AUTO_TOKENS = 2048  # a CPU's matrix products run at full speed from about a thousand rows on


def micro_batch_tokens(wanted: int | Literal["auto"], longest: int) -> int:
    """Padded tokens computed at once; ``auto`` depends on the data alone, so that it is the same on every machine."""
    return max(longest, AUTO_TOKENS) if wanted == "auto" else wanted


def recomputes(wanted: Literal["auto", "low", "fast"], model: nn.Module, batch_tokens: int) -> bool:
    """Whether layers forget their activations and compute them again in the backward pass (arXiv 1604.06174)."""
    if wanted != "auto":
        return wanted == "low"
    return activation_bytes(model, batch_tokens) > machine.memory().available_bytes // 2


def activation_bytes(model: nn.Module, batch_tokens: int) -> int:
    """An estimate of what the layers keep for the backward pass: every product's input and output, twice over for the
    norms, activation functions and residual sums between them."""
    widths = shape.read(modules.inner(model).config).widths
    return 2 * widths * batch_tokens * max(compute_dtype(model).itemsize, 2)
