"""Dropout that a CPU draws quickly. torch's own takes a number for every element, one after another on one core, and
keeps what it drew: with LoRA on every linear of a small model that was two fifths of a step.

    with quick(model):
        ...                  # every nn.Dropout in it draws one seed, from which its places follow
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from weitiao.models import kernels


class Dropout(nn.Dropout):
    """``nn.Dropout``, its probability rounded to 1/65536 and its scale to match; other devices draw as ever."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., H] to the same shape and dtype."""
        plain = not self.training or not self.p or input.device.type != "cpu"
        if plain or not kernels.serves(input.dtype, input.dtype):
            return super().forward(input)
        out: Any = _Dropped.apply(input, self.p, kernels.drawn_seed())
        return out


class _Dropped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float, seed: int) -> Tensor:
        ctx.places = probability, seed
        return kernels.dropped(x.contiguous(), *ctx.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return kernels.dropped(gradients[0].contiguous(), *ctx.places), None, None


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
