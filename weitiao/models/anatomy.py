"""What a Llama-like block consists of, as ``models.block`` reads it and ``models.whole`` computes it.

block = Block(linears={"q": Linear(weight, None, a, b, scale=2.0), ...}, norms={"input": (weight, 1e-6), ...}, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from weitiao.models import kernels
from weitiao.models.quantized import QuantizedLinear

QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")
JOINED = "gate_up"  # one linear for both


class Linear(NamedTuple):
    """A linear as it is now: y = x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ."""

    weight: Tensor | QuantizedLinear
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def trains(self) -> bool:
        """Whether a gradient needs its input."""
        return self.a is not None or (isinstance(self.weight, Tensor) and self.weight.requires_grad)


@dataclass(frozen=True)
class Block:
    """What a block consists of. ``norms``: weight and epsilon of ``input`` and ``output``, in front of attention and of
    the MLP, and, where it has them, of ``q`` and ``k``, queries and keys, and of ``attended`` and ``fed``, behind
    attention and behind the MLP."""

    linears: dict[str, Linear]
    norms: dict[str, tuple[Tensor, float]]
    width: int  # of a head
    scale: float  # of attention's scores
    offset: float = 0.0  # to the norms' weights
    woven: bool = False  # a rotary angle turns two neighbours
    curve: tuple[float, float] = kernels.SILU  # of the gate

    @property
    def gates(self) -> tuple[str, ...]:
        """The linears that read what the MLP reads."""
        return (JOINED,) if JOINED in self.linears else GATE_UP

    @property
    def plain(self) -> bool:
        """Whether it is as Llama's are, but for biases and the norms of queries and keys."""
        known = {"input", "output", "q", "k"}
        alike = (self.offset, self.woven, self.curve, self.gates) == (0.0, False, kernels.SILU, GATE_UP)
        return alike and self.norms.keys() <= known

    @cached_property
    def gains(self) -> dict[str, Tensor]:
        """What each norm multiplies with, float32."""
        wide = {name: weight.detach().float() for name, (weight, _) in self.norms.items()}
        return {name: weight + self.offset for name, weight in wide.items()} if self.offset else wide

    def trained(self) -> list[Tensor]:
        """Its parameters that need gradients."""
        tensors = [tensor for linear in self.linears.values() for tensor in linear[:4] if isinstance(tensor, Tensor)]
        return [tensor for tensor in (*tensors, *(norm[0] for norm in self.norms.values())) if tensor.requires_grad]


class Rows(NamedTuple):
    """Where rows lie among N tokens. ``starts``: int64 [rows + 1]; ``cosine``, ``sine``: the rotary angles of every
    token, float32 [1, N, D / 2]; ``fronts``: what rows have in common in front (``prefixes.Fronts.table``)."""

    starts: Tensor
    cosine: Tensor
    sine: Tensor
    fronts: Tensor | None = None
