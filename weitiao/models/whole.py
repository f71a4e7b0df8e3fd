"""The computation of a Llama-like block in one piece, forward and backward, from what ``models.block`` read of it.

    hidden = run(hidden, Rows(starts, cosine, sine), block, torch.bfloat16)

Nothing is kept but what no product can do without; the norms, the activation and attention's shares are computed again
in the backward pass. Tokens of several rows lie end to end; only attention and the rotary angles know where a row
begins. A linear and its LoRA are one product (``kernels.products``), and so are the gradients that meet at one input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weitiao.models import kernels
from weitiao.models.attention import attend, attend_backward, fold, unfold
from weitiao.models.quantized import QuantizedLinear

QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")


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
    """What a block consists of. ``norms``: weight and epsilon of input, attention's output, and of queries and keys
    where they have one."""

    linears: dict[str, Linear]
    norms: dict[str, tuple[Tensor, float]]
    width: int  # of a head
    scale: float  # of attention's scores

    def trained(self) -> list[Tensor]:
        """Its parameters that need gradients."""
        tensors = [tensor for linear in self.linears.values() for tensor in linear[:4] if isinstance(tensor, Tensor)]
        return [tensor for tensor in (*tensors, *(norm[0] for norm in self.norms.values())) if tensor.requires_grad]


class Rows(NamedTuple):
    """Where rows lie among N tokens. ``starts``: int64 [rows + 1]; ``cosine``, ``sine``: the rotary angles of every
    token, float32 [1, N, D / 2]."""

    starts: Tensor
    cosine: Tensor
    sine: Tensor


def run(hidden: Tensor, rows: Rows, block: Block, dtype: torch.dtype) -> Tensor:
    """Hidden states [N, H] to the same; products are computed in ``dtype``."""
    out: Any = _Fused.apply(hidden, *rows, block, dtype, *block.trained())
    return out


class _Fused(torch.autograd.Function):
    """The whole block."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, starts: Tensor, cosine: Tensor, sine: Tensor, block: Block, dtype: torch.dtype, *_: Tensor
    ) -> Tensor:
        run, angles, still = _Forward(block, dtype), (cosine, sine), (cosine[..., :0], sine[..., :0])
        normed, inverse, _total = run.norm("input", x)
        states = run.linears(QKV, normed)
        heads = states["k"].shape[1] // block.width
        before = {name: states[name] for name in QKV if name in block.norms}
        inverses: dict[str, Tensor] = {}
        for name in before:
            states[name], inverses[name], _total = run.norm(name, states[name].view(-1, block.width))
        states = {name: part.view(1, len(x), -1, block.width) for name, part in states.items()}
        query = fold(states["q"], heads, angles, block.scale)
        key, value = fold(states["k"], heads, angles), fold(states["v"], heads, still)
        seen = attend(query, key, value, starts)
        normed, second, middle = run.norm("output", x, run.linears(("o",), seen)["o"])
        gate, up = run.linears(GATE_UP, normed).values()
        out = run.linears(("down",), kernels.gated(gate, up), middle)["down"]
        ctx.save_for_backward(
            x, starts, inverse, cosine, sine, query, key, value, seen, middle, second, gate, up,
            *before.values(), *inverses.values(), *run.small.values(), *run.casts.values(),
        )  # fmt: skip
        ctx.block, ctx.dtype, ctx.heads, ctx.seeds = block, dtype, heads, run.seeds
        ctx.names = [*before], [*before], [*run.small], [*run.casts]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, starts, inverse, cosine, sine, query, key, value, seen, middle, second, gate, up, *rest = ctx.saved_tensors
        block, heads, shape = ctx.block, ctx.heads, (1, len(x))
        kept = iter(rest)
        before, inverses, small, casts = ({name: next(kept) for name in names} for names in ctx.names)
        run = _Backward(block, ctx.dtype, small, casts, ctx.seeds)
        gradient = gradients[0].contiguous()
        narrow = gradient.to(ctx.dtype)

        at_product = run.at_input({"down": narrow})
        at_gate, at_up, product = kernels.gated_backward(at_product, gate, up, block.linears["down"].trains)
        run.at_weights({"down": narrow}, product)
        at_linears = {"gate": at_gate, "up": at_up}
        at_normed = run.at_input(at_linears)
        run.at_weights(at_linears, run.normed("output", middle, second, GATE_UP))
        at_middle, narrow = run.norm("output", at_normed, middle, second, gradient)

        at_seen = run.at_input({"o": narrow})
        run.at_weights({"o": narrow}, seen)
        parts = attend_backward(at_seen, query, key, value, starts)
        angles, still = (cosine, sine), (cosine[..., :0], sine[..., :0])
        at_linears = {
            "q": unfold(parts[0], heads, shape, angles, block.scale),
            "k": unfold(parts[1], heads, shape, angles),
            "v": unfold(parts[2], heads, shape, still),
        }
        for name, states in before.items():
            split = states.view(-1, block.width)
            _, at_linears[name] = run.norm(name, at_linears[name].view(-1, block.width), split, inverses[name], None)
        at_linears = {name: part.view(len(x), -1) for name, part in at_linears.items()}
        run.at_weights(at_linears, run.normed("input", x, inverse, QKV))
        at_hidden = None
        if ctx.needs_input_grad[0] or block.norms["input"][0].requires_grad:
            at_hidden, _ = run.norm("input", run.at_input(at_linears), x, inverse, at_middle)
        found = (run.found.get(id(tensor)) for tensor in block.trained())
        return at_hidden, None, None, None, None, None, *found


def _weight(part: Linear, name: str, casts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A linear's weight for products; codes are spread out each time."""
    if isinstance(part.weight, QuantizedLinear):
        return part.weight.spread(dtype)
    return casts.get(name, part.weight.detach())


def _together(block: Block, names: Sequence[str]) -> list[list[str]]:
    """Those of ``names``, linears of one input, that have a LoRA, in groups whose LoRAs read the same numbers."""
    adapted = [name for name in names if block.linears[name].a is not None]
    alike = len({block.linears[name].dropout for name in adapted} | {0.0}) == 1
    return [adapted] if adapted and alike else [[name] for name in adapted]


class _Forward:
    """The products of a forward pass; keeps x Aᵀ of every LoRA and the seed of its dropout, and weights that had to be
    rounded to ``dtype``."""

    def __init__(self, block: Block, dtype: torch.dtype):
        self.block, self.dtype = block, dtype
        self.small: dict[str, Tensor] = {}
        self.casts: dict[str, Tensor] = {}
        self.seeds: dict[str, int] = {}

    def norm(self, name: str, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        weight, epsilon = self.block.norms[name]
        return kernels.norm(x, weight.float(), epsilon, self.dtype, delta)

    def linears(self, names: Sequence[str], x: Tensor, onto: Tensor | None = None) -> dict[str, Tensor]:
        """What the linears of these names make of ``x``, added to ``onto`` where that is given."""
        for group in _together(self.block, names):
            self.narrow(group, x)
        return {name: self.linear(name, x, onto) for name in names}

    def narrow(self, group: Sequence[str], x: Tensor) -> None:
        """x Aᵀ of a group of LoRAs, in one product."""
        parts: list[Any] = [self.block.linears[name] for name in group]
        if parts[0].dropout:
            self.seeds[group[0]] = kernels.drawn_seed()
            x = kernels.dropped(x, parts[0].dropout, self.seeds[group[0]])
        small = kernels.products([(x, torch.cat([part.a for part in parts]).to(self.dtype), False)])
        self.small |= dict(zip(group, small.split([len(part.a) for part in parts], 1), strict=True))

    def linear(self, name: str, x: Tensor, onto: Tensor | None) -> Tensor:
        part = self.block.linears[name]
        if isinstance(part.weight, Tensor) and part.weight.dtype != self.dtype:
            self.casts[name] = part.weight.to(self.dtype)
        parts = [(x, _weight(part, name, self.casts, self.dtype), False)]
        if part.b is not None:
            parts.append((self.small[name], (part.b * part.scale).to(self.dtype), False))
        bias = None if part.bias is None else part.bias.detach().float()
        if onto is None or onto.dtype == self.dtype:
            return kernels.products(parts, bias, onto)
        return kernels.add(onto, kernels.products(parts, bias))


class _Backward:
    """The products of a backward pass; ``found`` gathers the gradients at parameters, by their ids."""

    def __init__(
        self,
        block: Block,
        dtype: torch.dtype,
        small: dict[str, Tensor],
        casts: dict[str, Tensor],
        seeds: dict[str, int],
    ):
        self.block, self.dtype, self.small, self.casts, self.seeds = block, dtype, small, casts, seeds
        self.inners: dict[str, Tensor] = {}
        self.found: dict[int, Tensor] = {}

    def normed(self, name: str, x: Tensor, inverse: Tensor, readers: Sequence[str]) -> Tensor | None:
        """A norm's output again, where a gradient of one of its readers needs it."""
        if not any(self.block.linears[reader].trains for reader in readers):
            return None
        return kernels.normed(x, self.block.norms[name][0].float(), inverse, self.dtype)

    def norm(
        self, name: str, gradient: Tensor, x: Tensor, inverse: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradient at a norm's input, twice: in the residual stream's dtype and for products."""
        weight, _ = self.block.norms[name]
        wide, narrow, at_weight = kernels.norm_backward(
            gradient, x, weight.float(), inverse, residual, weight.requires_grad
        )
        if at_weight is not None:
            self.found[id(weight)] = at_weight.to(weight.dtype)
        return wide, narrow

    def at_input(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradient at the input that linears share, given those at their outputs."""
        linears = self.block.linears
        parts = [(at, _weight(linears[name], name, self.casts, self.dtype), True) for name, at in gradients.items()]
        dropping: list[tuple[str, Tensor, Tensor]] = []
        for group in _together(self.block, [*gradients]):
            inner, a = self.inner(group, gradients), self.stacked(group)
            if linears[group[0]].dropout:
                dropping.append((group[0], inner, a))
            else:
                parts.append((inner, a, True))
        out = kernels.products(parts)
        for name, inner, a in dropping:
            kernels.dropped(kernels.products([(inner, a, True)]), linears[name].dropout, self.seeds[name], onto=out)
        return out

    def stacked(self, group: Sequence[str]) -> Tensor:
        """The matrices A of a group of LoRAs, [ranks, K]."""
        return torch.cat([self.block.linears[name].a for name in group]).to(self.dtype)  # type: ignore[misc]

    def inner(self, group: Sequence[str], gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradients between the two matrices of a group of LoRAs, [N, ranks], made once."""
        if group[0] not in self.inners:
            parts: list[Any] = [self.block.linears[name] for name in group]
            ranks = [part.b.shape[1] for part in parts]
            inner = gradients[group[0]].new_empty(len(gradients[group[0]]), sum(ranks))
            for name, part, out in zip(group, parts, inner.split(ranks, 1), strict=True):
                kernels.products([(gradients[name], (part.b * part.scale).to(self.dtype), True)], out=out)
            self.inners[group[0]] = inner
        return self.inners[group[0]]

    def at_weights(self, gradients: Mapping[str, Tensor], x: Tensor | None) -> None:
        """The gradients at the parameters of linears whose input is ``x``, which is None where none is needed."""
        linears, found = self.block.linears, self.found
        for name, gradient in gradients.items():
            weight, bias = linears[name].weight, linears[name].bias
            if isinstance(weight, Tensor) and weight.requires_grad and x is not None:
                found[id(weight)] = torch.mm(gradient.t(), x).to(weight.dtype)
            if bias is not None and bias.requires_grad:
                found[id(bias)] = gradient.sum(0, dtype=torch.float32).to(bias.dtype)
        for group in _together(self.block, [*gradients]) if x is not None else ():
            parts: list[Any] = [linears[name] for name in group]
            read = kernels.dropped(x, parts[0].dropout, self.seeds[group[0]]) if parts[0].dropout else x
            at_a = kernels.outer(self.inner(group, gradients), read).split([len(part.a) for part in parts])
            for name, part, rows in zip(group, parts, at_a, strict=True):
                at_b = kernels.outer(self.small[name], gradients[name], part.scale, turned=True)
                found[id(part.a)], found[id(part.b)] = rows.to(part.a.dtype), at_b.to(part.b.dtype)
