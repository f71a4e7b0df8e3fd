"""The computation of a Llama-like block in one piece, forward and backward, from what ``models.block`` read of it.

    hidden = run(hidden, Rows(starts, cosine, sine), block, torch.bfloat16)

Nothing is kept but what no product can do without; the norms, the activation and attention's shares are computed again
in the backward pass. Tokens of several rows lie end to end; only attention and the rotary angles know where a row
begins. A linear and its LoRA are one product (``products.summed``), and so are the gradients that meet at one input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from weitiao.models import adapted, kernels, products
from weitiao.models.anatomy import GATE_UP, JOINED, QKV, Block, Linear, Rows
from weitiao.models.attention import attend, attend_backward, fold, unfold
from weitiao.models.products import Codes, Part, Rounded
from weitiao.models.quantized import QuantizedLinear


def run(hidden: Tensor, rows: Rows, block: Block, dtype: torch.dtype) -> Tensor:
    """Hidden states [N, H] to the same; products are computed in ``dtype``."""
    if adapted.serves(hidden, block, dtype):
        return adapted.run(hidden, rows, block)
    return one_by_one(hidden, rows, block, dtype)


def one_by_one(hidden: Tensor, rows: Rows, block: Block, dtype: torch.dtype) -> Tensor:
    """The same, each operation started from here, which serves every block."""
    out: Any = _Fused.apply(hidden, *rows, block, dtype, *block.trained())
    return out


def extend(
    x: Tensor, rows: Rows, block: Block, keys: Tensor, values: Tensor, lengths: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same without gradients, where ``rows`` are the ends of rows of ``lengths`` (int64 [B]) tokens: ``keys`` and
    ``values`` [B, heads, capacity, D] hold those of the tokens before, and get those of these."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        starts = rows.starts.tolist()
        for row, (start, end, length) in enumerate(zip(starts, starts[1:], lengths.tolist(), strict=False)):
            place = slice(length - (end - start), length)
            keys[row, :, place], values[row, :, place] = key[:, start:end], value[:, start:end]
        out = query.new_empty(len(x), len(key), query.shape[1] // len(x), block.width)
        if not kernels.attend(query, keys, values, out, rows.starts, None, lengths):
            raise RuntimeError("no compiled attention")
        return out.flatten(1)

    return _Forward(block, dtype).block_output(x, rows.cosine, rows.sine, attention)[0]


class _Fused(torch.autograd.Function):
    """The whole block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        starts: Tensor,
        cosine: Tensor,
        sine: Tensor,
        fronts: Tensor | None,
        block: Block,
        dtype: torch.dtype,
        *_: Tensor,
    ) -> Tensor:
        run = _Forward(block, dtype)
        out, kept = run.block_output(x, cosine, sine, lambda q, k, v: attend(q, k, v, starts, fronts))
        ctx.save_for_backward(
            x, starts, cosine, sine, fronts, *kept,
            *run.before.values(), *run.inverses.values(), *run.small.values(), *run.casts.values(),
        )  # fmt: skip
        ctx.block, ctx.dtype, ctx.groups, ctx.seeds = block, dtype, run.groups, run.seeds
        ctx.names = [*run.before], [*run.inverses], [*run.small], [*run.casts]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, starts, cosine, sine, fronts, inverse, query, key, value, seen, *rest = ctx.saved_tensors
        middle, second, gate, up, *rest = rest
        block, heads, shape = ctx.block, len(key), (1, len(x))
        kept = iter(rest)
        before, inverses, small, casts = ({name: next(kept) for name in names} for names in ctx.names)
        run = _Backward(block, ctx.dtype, ctx.groups, small, casts, ctx.seeds)
        gradient = gradients[0].contiguous()
        narrow = run.behind("fed", gradient.to(ctx.dtype), before, inverses)

        at_product = run.at_input({"down": narrow})
        both, product = kernels.gated_backward(at_product, gate, up, block.linears["down"].trains, block.curve)
        run.at_weights({"down": narrow}, product)
        at_linears = {JOINED: both} if JOINED in block.linears else dict(zip(GATE_UP, both.chunk(2, 1), strict=True))
        at_normed = run.at_input(at_linears)
        run.at_weights(at_linears, run.normed("output", middle, second, block.gates))
        at_middle, narrow = run.norm("output", at_normed, middle, second, gradient)
        narrow = run.behind("attended", narrow, before, inverses)

        at_seen = run.at_input({"o": narrow})
        run.at_weights({"o": narrow}, seen)
        parts = attend_backward(at_seen, query, key, value, starts, fronts)
        angles, still = (cosine, sine), (cosine[..., :0], sine[..., :0])
        at_linears = {
            "q": unfold(parts[0], heads, shape, angles, block.scale, block.woven),
            "k": unfold(parts[1], heads, shape, angles, woven=block.woven),
            "v": unfold(parts[2], heads, shape, still),
        }
        for name in ("q", "k"):
            at_linears[name] = run.behind(name, at_linears[name].view(-1, block.width), before, inverses)
        at_linears = {name: part.view(len(x), -1) for name, part in at_linears.items()}
        run.at_weights(at_linears, run.normed("input", x, inverse, QKV))
        at_hidden = None
        if ctx.needs_input_grad[0] or block.norms["input"][0].requires_grad:
            at_hidden, _ = run.norm("input", run.at_input(at_linears), x, inverse, at_middle)
        found = (run.found.get(id(tensor)) for tensor in block.trained())
        return at_hidden, *[None] * 6, *found


def _weight(part: Linear, name: str, casts: dict[str, Tensor], dtype: torch.dtype) -> Tensor | Codes:
    """A linear's weight for products; codes that cannot be multiplied as they are are spread out each time."""
    if isinstance(part.weight, QuantizedLinear):
        return part.weight.codes_of(dtype) or part.weight.spread(dtype)
    return casts.get(name, part.weight.detach())


class _Group(NamedTuple):
    """LoRAs of linears that share an input, and what of it dropout lets through: ``a`` [ranks, K], one below the other,
    and scale · B of each, in the dtype of products; ranks are made even, by zeros."""

    names: list[str]
    ranks: list[int]
    a: Tensor
    b: list[Tensor]
    dropout: float


def _groups(block: Block, names: Sequence[str], dtype: torch.dtype) -> list[_Group]:
    """The LoRAs of these linears, which share an input; one group where none has dropout, else one each."""
    adapted: list[tuple[str, Any]] = [(name, part) for name in names if (part := block.linears[name]).a is not None]
    alike = not any(part.dropout for _, part in adapted)
    return [
        _Group(
            [name for name, _ in group],
            [part.a.shape[0] + part.a.shape[0] % 2 for _, part in group],
            torch.cat([_evened(part.a, 0) for _, part in group]).to(dtype),
            [_evened(part.b * part.scale, 1).to(dtype) for _, part in group],
            group[0][1].dropout,
        )
        for group in ([adapted] if alike and adapted else [[one] for one in adapted])
    ]


def _evened(matrix: Tensor, dimension: int) -> Tensor:
    """With a zero more along ``dimension`` where the number there is odd."""
    if matrix.shape[dimension] % 2 == 0:
        return matrix
    return pad(matrix, (0, 0, 0, 1) if dimension == 0 else (0, 1))


class _Forward:
    """A forward pass; keeps the LoRAs in groups by the first linear of an input, x Aᵀ and the seed of the dropout of
    each group by its first linear, weights that had to be rounded to ``dtype``, and what norms behind a product read
    with 1 / rms of it."""

    def __init__(self, block: Block, dtype: torch.dtype):
        self.block, self.dtype = block, dtype
        self.groups: dict[str, list[_Group]] = {}
        self.small: dict[str, Tensor] = {}
        self.casts: dict[str, Tensor] = {}
        self.seeds: dict[str, int] = {}
        self.before: dict[str, Tensor] = {}
        self.inverses: dict[str, Tensor] = {}
        self.last: tuple[Tensor, Rounded] | None = None

    def rounded(self, x: Tensor) -> Rounded:
        """For weights of codes: once for all that share an input."""
        if self.last is None or self.last[0] is not x:
            self.last = x, products.rounded(x)
        return self.last[1]

    def block_output(
        self, x: Tensor, cosine: Tensor, sine: Tensor, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The block's output, and what a backward pass needs beside its input: 1 / rms of the first norm, folded
        queries, keys and values, what attention made of them, the sum behind it, 1 / rms of the second norm, gate, up.
        """
        block, angles, still = self.block, (cosine, sine), (cosine[..., :0], sine[..., :0])
        normed, inverse, _ = self.norm("input", x)
        states = self.linears(QKV, normed)
        heads = states["k"].shape[1] // block.width
        for name in ("q", "k"):
            states[name] = self.behind(name, states[name].view(-1, block.width))
        states = {name: part.view(1, len(x), -1, block.width) for name, part in states.items()}
        query = fold(states["q"], heads, angles, block.scale, block.woven)
        key, value = fold(states["k"], heads, angles, woven=block.woven), fold(states["v"], heads, still)
        seen = attention(query, key, value)
        attended = self.behind("attended", self.linears(("o",), seen)["o"])
        normed, second, middle = self.norm("output", x, attended)
        made = [*self.linears(block.gates, normed).values()]
        gate, up = made[0].chunk(2, 1) if JOINED in block.linears else made
        product = kernels.gated(gate, up, block.curve)
        if "fed" in block.norms:
            out = kernels.add(middle, self.behind("fed", self.linears(("down",), product)["down"]))
        else:
            out = self.linears(("down",), product, middle)["down"]
        return out, (inverse, query, key, value, seen, middle, second, gate, up)

    def norm(self, name: str, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.norm(x, self.block.gains[name], self.block.norms[name][1], self.dtype, delta)

    def behind(self, name: str, x: Tensor) -> Tensor:
        """What a norm behind a product makes of it, where there is one."""
        if name not in self.block.norms:
            return x
        self.before[name] = x
        out, self.inverses[name], _ = self.norm(name, x)
        return out

    def linears(self, names: Sequence[str], x: Tensor, onto: Tensor | None = None) -> dict[str, Tensor]:
        """What the linears of these names make of ``x``, added to ``onto`` where that is given."""
        self.groups[names[0]] = _groups(self.block, names, self.dtype)
        adapters: dict[str, Part] = {}
        for group in self.groups[names[0]]:
            first, read = group.names[0], x
            if group.dropout:
                self.seeds[first] = kernels.drawn_seed()
                read = kernels.dropped(x, group.dropout, self.seeds[first])
            self.small[first] = products.summed([(read, group.a, False)])
            parts = zip(group.names, self.small[first].split_with_sizes(group.ranks, 1), group.b, strict=True)
            adapters |= {name: (small, b, False) for name, small, b in parts}
        return {name: self.linear(name, x, onto, adapters.get(name)) for name in names}

    def linear(self, name: str, x: Tensor, onto: Tensor | None, adapter: Part | None) -> Tensor:
        part = self.block.linears[name]
        if isinstance(part.weight, Tensor) and part.weight.dtype != self.dtype:
            self.casts[name] = part.weight.to(self.dtype)
        weight = _weight(part, name, self.casts, self.dtype)
        parts: list[Part] = [(self.rounded(x) if isinstance(weight, Codes) else x, weight, False)]
        parts += [adapter] if adapter else []
        bias = None if part.bias is None else part.bias.detach().float()
        if onto is None or onto.dtype == self.dtype:
            return products.summed(parts, bias, onto)
        return kernels.add(onto, products.summed(parts, bias))


class _Backward:
    """The products of a backward pass; ``found`` gathers the gradients at parameters, by their ids."""

    def __init__(
        self,
        block: Block,
        dtype: torch.dtype,
        groups: dict[str, list[_Group]],
        small: dict[str, Tensor],
        casts: dict[str, Tensor],
        seeds: dict[str, int],
    ):
        self.block, self.dtype, self.groups, self.small = block, dtype, groups, small
        self.casts, self.seeds = casts, seeds
        self.inners: dict[str, Tensor] = {}
        self.found: dict[int, Tensor] = {}

    def normed(self, name: str, x: Tensor, inverse: Tensor, readers: Sequence[str]) -> Tensor | None:
        """A norm's output again, where a gradient of one of its readers needs it."""
        if not any(self.block.linears[reader].trains for reader in readers):
            return None
        return kernels.normed(x, self.block.gains[name], inverse, self.dtype)

    def norm(
        self, name: str, gradient: Tensor, x: Tensor, inverse: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradient at a norm's input, twice: in the residual stream's dtype and for products."""
        weight, gain = self.block.norms[name][0], self.block.gains[name]
        wide, narrow, at_weight = kernels.norm_backward(gradient, x, gain, inverse, residual, weight.requires_grad)
        if at_weight is not None:
            self.found[id(weight)] = at_weight.to(weight.dtype)
        return wide, narrow

    def behind(self, name: str, gradient: Tensor, before: dict[str, Tensor], inverses: dict[str, Tensor]) -> Tensor:
        """The gradient at the input of a norm behind a product, where there is one."""
        return self.norm(name, gradient, before[name], inverses[name], None)[1] if name in before else gradient

    def at_input(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradient at the input that linears share, given those at their outputs."""
        linears, groups = self.block.linears, self.groups[next(iter(gradients))]
        parts: list[Part] = []
        for name, at in gradients.items():
            weight = _weight(linears[name], name, self.casts, self.dtype)
            parts.append((products.rounded(at, weight.scales) if isinstance(weight, Codes) else at, weight, True))
        out = products.summed(
            parts + [(self.inner(group, gradients), group.a, True) for group in groups if not group.dropout]
        )
        for group in groups:
            if group.dropout:
                steep = products.summed([(self.inner(group, gradients), group.a, True)])
                kernels.dropped(steep, group.dropout, self.seeds[group.names[0]], onto=out)
        return out

    def inner(self, group: _Group, gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradients between the two matrices of a group of LoRAs, [N, ranks], made once."""
        first = group.names[0]
        if first not in self.inners:
            self.inners[first] = inner = gradients[first].new_empty(gradients[first].shape[0], group.a.shape[0])
            for name, b, out in zip(group.names, group.b, inner.split_with_sizes(group.ranks, 1), strict=True):
                products.summed([(gradients[name], b, True)], out=out)
        return self.inners[first]

    def at_weights(self, gradients: Mapping[str, Tensor], x: Tensor | None) -> None:
        """The gradients at the parameters of linears whose input is ``x``, which is None where none is needed."""
        linears, found = self.block.linears, self.found
        for name, gradient in gradients.items():
            weight, bias = linears[name].weight, linears[name].bias
            if isinstance(weight, Tensor) and weight.requires_grad and x is not None:
                found[id(weight)] = products.at_weight(gradient, x).to(weight.dtype)
            if bias is not None and bias.requires_grad:
                found[id(bias)] = gradient.sum(0, dtype=torch.float32).to(bias.dtype)
        for group in self.groups[next(iter(gradients))]:
            assert x is not None  # a LoRA trains
            first = group.names[0]
            read = kernels.dropped(x, group.dropout, self.seeds[first]) if group.dropout else x
            at_a = products.outer(self.inner(group, gradients), read).split_with_sizes(group.ranks)
            smalls = self.small[first].split_with_sizes(group.ranks, 1)
            for name, rows, small in zip(group.names, at_a, smalls, strict=True):
                part: Any = linears[name]
                at_b = products.outer(small, gradients[name], part.scale, turned=True)
                if (rank := part.a.shape[0]) % 2:
                    rows, at_b = rows[:rank], at_b[:, :rank]
                found[id(part.a)], found[id(part.b)] = rows.to(part.a.dtype), at_b.to(part.b.dtype)
