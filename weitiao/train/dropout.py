"""Dropout that a CPU draws quickly. torch's own takes a number for every element, one after another on one core: with
LoRA on every linear of a small model that was two fifths of a step.

    with quick(model):
        ...                  # every nn.Dropout in it draws sixteen bits an element
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LEVELS, LOWEST = 1 << 16, -(1 << 63)  # of sixteen bits; of the 64 that are drawn at once


class Dropout(nn.Dropout):
    """``nn.Dropout``, its probability rounded to 1/65536 and its scale to match; other devices draw as ever."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] to the same shape and dtype."""
        dropped = round(self.p * LEVELS)
        if not self.training or input.device.type != "cpu" or dropped in (0, LEVELS):
            return super().forward(input)
        return input * noise(input.shape, dropped, input.dtype)


def noise(shape: torch.Size, dropped: int, dtype: torch.dtype) -> Tensor:
    """Zeros with probability ``dropped`` / 65536, and elsewhere what keeps the mean at one."""
    count = math.prod(shape)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(LOWEST, None)
    kept = drawn.view(torch.int16)[:count] >= dropped - LEVELS // 2
    # as bytes, which are turned into numbers ten times as fast as bools are
    return kept.view(torch.uint8).to(dtype).mul_(LEVELS / (LEVELS - dropped)).view(shape)


@contextmanager
def quick(model: nn.Module) -> Iterator[None]:
    """While it is open, plain ``nn.Dropout`` of ``model`` is :class:`Dropout`."""
    plain = [module for module in model.modules() if type(module) is nn.Dropout]
    for module in plain:
        module.__class__ = Dropout
    try:
        yield
    finally:
        for module in plain:
            module.__class__ = nn.Dropout
