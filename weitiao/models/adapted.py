"""A block whose own weights are frozen, in bfloat16, by one compiled call each way (``adapted.c``).

    hidden = run(hidden, rows, block) if serves(hidden, block, dtype) else whole.one_by_one(hidden, rows, block, dtype)

What that computes with some hundred operations, each started from Python, here in the same order by the
same kernels, so that the numbers are the same to the last bit. That is LoRA's case, whose operations are small: on two
cores starting them was a seventh of a small model's step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weitiao.models import kernels
from weitiao.models.anatomy import GATE_UP, QKV, Block, Linear, Rows

NAMES = (*QKV, "o", *GATE_UP, "down")
GROUPS = QKV, ("o",), GATE_UP, ("down",)  # linears that share an input
LINE = 32  # numbers to whose multiples tensors within one are filled up


def serves(hidden: Tensor, block: Block, dtype: torch.dtype) -> bool:
    """Whether :func:`run` is there for this block, and these states and products."""
    if not hidden.dtype == dtype == torch.bfloat16 or not hasattr(kernels.compiled(), "block_forward"):
        return False
    fits = block.norms.keys() == {"input", "output"} and block.gates == GATE_UP and block.width % 16 == 0
    quiet = not any(norm.requires_grad for norm, _ in block.norms.values())
    return fits and quiet and all(_fits(part) for part in block.linears.values())


def _fits(part: Linear) -> bool:
    weight, bias = part.weight, part.bias
    if not isinstance(weight, Tensor) or weight.dtype != torch.bfloat16 or weight.requires_grad or part.dropout:
        return False
    adapters = all(one is None or (one.dtype == torch.float32 and one.is_contiguous()) for one in (part.a, part.b))
    frozen = bias is None or not bias.requires_grad
    return adapters and frozen and weight.is_contiguous() and weight.shape[0] % 2 == weight.shape[1] % 2 == 0


def run(hidden: Tensor, rows: Rows, block: Block) -> Tensor:
    """Hidden states [N, H] to the same."""
    out: Any = _Adapted.apply(hidden.contiguous(), *rows, block, *_adapters(block))
    return out


def _adapters(block: Block) -> list[Tensor]:
    """A and B of every LoRA, in the order of their linears."""
    return [one for name in NAMES for one in block.linears[name][2:4] if one is not None]  # type: ignore[misc]


class _Adapted(torch.autograd.Function):
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
        *_: Tensor,
    ) -> Tensor:
        sizes = _Sizes(x, block)
        out, inverses = torch.empty_like(x), torch.empty(2, sizes.tokens)
        casts, kept, room = (x.new_empty(count) for count in (sizes.casts, sizes.kept, sizes.forward_room))
        tensors = (starts, cosine, sine, fronts, casts, kept, inverses)
        description = _described(block, sizes, tensors, room, None, [])
        epsilons = block.norms["input"][1], block.norms["output"][1]
        if kernels.run("block_forward", description[0], x, out, *epsilons, block.scale, *block.curve):
            raise MemoryError(f"block_forward: {list(x.shape)}")
        ctx.save_for_backward(x, *tensors)
        ctx.block, ctx.sizes = block, sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        block, sizes, fronts = ctx.block, ctx.sizes, tensors[3]
        shapes = [tuple(one.shape) for one in _adapters(block)]
        found = [part.view(shape) for part, shape in zip(_side_by_side(shapes), shapes, strict=True)]
        shared = None if fronts is None else torch.empty(sizes.heads * int(fronts[-1]), 2, block.width)
        at_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        room = x.new_empty(sizes.backward_room)
        description = _described(block, sizes, tensors, room, shared, found)
        gradient = gradients[0].contiguous()
        if kernels.run("block_backward", description[0], x, gradient, at_x, block.scale, *block.curve):
            raise MemoryError(f"block_backward: {list(x.shape)}")
        return at_x, *[None] * 5, *found


def _side_by_side(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """float32 of so many numbers each, the As before the Bs, in one piece of memory."""
    counts = [rows * columns for rows, columns in shapes]
    made = torch.empty(sum(counts)).split_with_sizes([*counts[::2], *counts[1::2]])
    half = len(counts) // 2
    return [one for pair in zip(made[:half], made[half:], strict=True) for one in pair]


class _Sizes:
    """How large a block is, and what it works in: numbers of bfloat16, as ``adapted.c`` lays them out."""

    def __init__(self, x: Tensor, block: Block):
        shapes = {
            name: tuple(part.weight.shape) for name, part in block.linears.items() if isinstance(part.weight, Tensor)
        }
        even = {name: _rank(part) + _rank(part) % 2 for name, part in block.linears.items()}
        self.tokens, self.hidden = x.shape
        (asked, _), (keys, _), (self.inner, _) = shapes["q"], shapes["k"], shapes["up"]
        self.heads, self.groups = keys // block.width, asked // keys
        ranks = [sum(even[name] for name in names) for names in GROUPS]
        alike = sum(_up(rank * shapes[names[0]][1]) for names, rank in zip(GROUPS, ranks, strict=True))
        self.casts = alike + sum(_up(shapes[name][0] * even[name]) for name in NAMES)
        parts = [*ranks, asked, keys, keys, asked, self.hidden, self.inner, self.inner]
        self.kept = sum(_up(self.tokens * part) for part in parts)
        narrow, stream = _up(self.tokens * max(ranks)), _up(self.tokens * self.hidden)
        self.forward_room = stream + self.tokens * max(asked + 2 * keys, self.hidden, self.inner)
        self.backward_room = narrow + 3 * stream + self.tokens * max(4 * self.inner, 3 * asked + 4 * keys)


def _rank(part: Linear) -> int:
    return 0 if part.a is None else part.a.shape[0]


def _up(count: int) -> int:
    return -(-count // LINE) * LINE


def _described(
    block: Block,
    sizes: _Sizes,
    tensors: Sequence[Tensor | None],
    room: Tensor,
    shared: Tensor | None,
    found: Sequence[Tensor],
) -> tuple[Any, list[Any]]:
    """A block as ``adapted.c`` reads it, and what must live as long. ``found``: where the adapters' gradients go."""
    starts, cosine, sine, fronts, casts, kept, inverses = tensors
    held: list[Any] = []
    gradients = iter(found)

    def pointer(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        held.append(tensor)
        return tensor.data_ptr()

    numbers: list[int] = []
    scales = (ctypes.c_float * len(NAMES))(*[block.linears[name].scale for name in NAMES])
    held.append(scales)
    for place, name in enumerate(NAMES):
        part: Any = block.linears[name]
        ours = [pointer(next(gradients)) for _ in range(2)] if found and part.a is not None else [0, 0]
        bias = None if part.bias is None else part.bias.detach().float()
        numbers += (part.weight.data_ptr(), pointer(bias), pointer(part.a), pointer(part.b))
        numbers += (ctypes.addressof(scales) + 4 * place, *ours, _rank(part), *part.weight.shape)
    gains = block.gains
    numbers += map(pointer, (gains["input"], gains["output"], cosine, sine, starts, fronts))
    numbers += (sizes.tokens, starts.shape[0] - 1, sizes.hidden, sizes.inner, sizes.heads, sizes.groups)  # type: ignore[union-attr]
    numbers += (block.width, cosine.shape[-1], block.woven)  # type: ignore[union-attr]
    numbers += map(pointer, (casts, kept, room, inverses, shared))
    return (ctypes.c_int64 * len(numbers))(*numbers), held
