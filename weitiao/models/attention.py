"""Causal attention for bfloat16 on a CPU, in blocks of queries.

    name = register()                  # an attention implementation that transformers' models can be loaded with

torch's fused kernel multiplies bfloat16 without the processor's own instructions for it. Where the processor has them
and there is a compiler, attention is one function of ``kernels``; elsewhere the scores of a block of queries are one
product of oneDNN's, as large as a cache can hold. Either way the blocks follow one another: what lies right of the
diagonal is never computed, no T x T matrix is kept, and the backward pass computes the shares again. Whatever is not
plain causal self-attention in bfloat16 goes to torch's kernel as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from weitiao.models import kernels

NAME = "weitiao_blocks"
OTHERS = ("position_bias", "softcap", "s_aux", "cache")  # options that make it another attention
ROWS, LEAST = 128, 32  # rows of a product, queries in a block: measured fastest from 128 to 2,048 tokens
NO_ANGLES = torch.empty(1, 1, 0), torch.empty(1, 1, 0)


def register() -> str:
    """Make the implementation known to transformers; its name is returned."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' own: query [B, heads, T, D], key and value [B, key heads, T, D] to [B, T, heads, D]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    autocast = torch.is_autocast_enabled(query.device.type)
    dtype = torch.get_autocast_dtype(query.device.type) if autocast else query.dtype
    plain = attention_mask is None and causal and not dropout and all(options.get(name) is None for name in OTHERS)
    fits = query.device.type == "cpu" and dtype == torch.bfloat16 and 1 < query.shape[2] == key.shape[2]
    if not (plain and fits) or query.shape[-1] != value.shape[-1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)  # type: ignore[return-value]
    out: Any = _Blocks.apply(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out, None


class _Blocks(torch.autograd.Function):
    """softmax(scale · Q Kᵀ, causal) V: query [B, heads, T, D], key and value [B, key heads, T, D] to
    [B, T, heads, D]."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, length, width = key.shape
        ctx.scale, ctx.heads, ctx.shape = scale, heads, (batch, length)
        q = fold(query.transpose(1, 2), heads, scale=scale)
        k, v = (fold(states.transpose(1, 2), heads) for states in (key, value))
        starts = even(batch, length)
        ctx.save_for_backward(q, k, v, starts)
        return attend(q, k, v, starts).view(batch, length, -1, width)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, starts = ctx.saved_tensors
        at_q, at_k, at_v = attend_backward(gradients[0].contiguous(), q, k, v, starts)
        at_q = unfold(at_q, ctx.heads, ctx.shape, scale=ctx.scale)
        at_k, at_v = (unfold(states, ctx.heads, ctx.shape) for states in (at_k, at_v))
        return at_q.transpose(1, 2), at_k.transpose(1, 2), at_v.transpose(1, 2), None


def even(batch: int, length: int) -> Tensor:
    """Where rows of one length start among the tokens of all, and where the last ends: int64 [B + 1]."""
    return torch.arange(0, batch * length + 1, length)


def fold(
    states: Tensor, heads: int, angles: tuple[Tensor, Tensor] = NO_ANGLES, scale: float = 1.0, woven: bool = False
) -> Tensor:
    """[B, T, heads · groups, D] to [heads, B · T · groups, D], turned by ``angles`` as ``kernels.turned`` does and
    scaled: the query heads that share a key lie together, so that one product serves them all, and the rows end to
    end."""
    batch, length, _, width = states.shape
    split = states.unflatten(2, (heads, -1))
    folded = states.new_empty(heads, batch, length, split.shape[3], width)
    kernels.turned(split, folded.permute(1, 2, 0, 3, 4), *angles, scale, woven=woven)
    return folded.view(heads, -1, width)


def unfold(
    states: Tensor,
    heads: int,
    shape: tuple[int, int],
    angles: tuple[Tensor, Tensor] = NO_ANGLES,
    scale: float = 1.0,
    woven: bool = False,
) -> Tensor:
    """The way back, for gradients: [heads, B · T · groups, D] to [B, T, heads · groups, D]; ``shape``: B and T."""
    split = states.view(heads, *shape, -1, states.shape[2]).permute(1, 2, 0, 3, 4)
    target = states.new_empty(split.shape)
    return kernels.turned(split, target, *angles, scale, back=True, woven=woven).flatten(2, 3)


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, fronts: Tensor | None = None) -> Tensor:
    """Folded query [heads, N · groups, D], scaled, key and value [heads, N, D] to [N, heads · groups · D]. Row s of the
    N tokens is those from ``starts`` [s] (int64) up to the next start, and sees of the others only what it has in front
    in common with an earlier row (``fronts``: ``prefixes.Fronts.table``)."""
    heads, tokens, width = key.shape
    groups = query.shape[1] // tokens
    out = query.new_empty(tokens, heads, groups, width)
    if not kernels.attend(query, key, value, out, starts, fronts):
        for first, last, front, (q, k, v) in _even_rows(starts, fronts, query, key, value):
            k, v = _behind(key, front, k), _behind(value, front, v)
            target = out[first:last].view(len(q) // heads, -1, heads, groups, width)
            for rows, share, _ in _blocks(q, k, groups, buffers=1):
                block = torch.bmm(share, v[:, : share.shape[2]]).view(heads, len(target), -1, groups, width)
                target[:, rows.start // groups : rows.stop // groups] = block.permute(1, 2, 0, 3, 4)
    return out.flatten(1)


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, fronts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at the folded query, key and value, given the contiguous one at :func:`attend`'s output."""
    heads, tokens, width = key.shape
    gradient = gradient.view(tokens, heads, -1, width)
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if kernels.attend_backward(gradient, query, key, value, *found, starts, fronts):
        return found
    given, groups = fold(gradient.view(1, tokens, -1, width), heads), query.shape[1] // tokens
    sums = [torch.zeros(key.shape), torch.zeros(key.shape)]  # several rows give to what they have in common
    for _, _, front, (q, k, v, g, at_q, *at) in _even_rows(starts, fronts, query, key, value, given, found[0], *sums):
        totals = _attend_backward(g, q, _behind(key, front, k), _behind(value, front, v), at_q, groups)
        for own, total in zip(at, totals, strict=True):
            own += total[:, total.shape[1] - own.shape[1] :]
        if front is not None:
            for whole, total in zip(sums, totals, strict=True):
                whole[:, front] += total[:, : front.stop - front.start]
    return found[0], sums[0].to(key.dtype), sums[1].to(key.dtype)


def _attend_backward(
    given: Tensor, query: Tensor, key: Tensor, value: Tensor, at_query: Tensor, groups: int
) -> list[Tensor]:
    """For rows of one length: query, the gradient at it, which is written, and the one at the output
    [n, T · groups, D]; key and value [n, before + T, D], the gradients at which are returned."""
    totals: list[Tensor] = []  # gathered from all blocks in float32
    for rows, share, work in _blocks(query, key, groups, buffers=2):
        block, seen = given[:, rows], share.shape[2]
        more = torch.bmm(share.transpose(1, 2), block)
        torch.bmm(block, value[:, :seen].transpose(1, 2), out=work)
        kernels.shares_backward(share, work, groups, seen - share.shape[1] // groups)
        at_query[:, rows] = torch.bmm(work, key[:, :seen])
        steep = torch.bmm(work.transpose(1, 2), query[:, rows])
        if not totals:  # the last queries, which see all keys
            totals = [steep, more] if rows.start == 0 else [steep.float(), more.float()]
            continue
        totals[0][:, :seen] += steep
        totals[1][:, :seen] += more
    return totals


def _even_rows(
    starts: Tensor, fronts: Tensor | None, *folded: Tensor
) -> Iterator[tuple[int, int, slice | None, list[Tensor]]]:
    """The parts of tensors [heads, N · x, D] that belong to neighbouring rows of one length: their first token, the one
    after their last, the tokens of an earlier row that they have in front, and views [heads · rows, length · x, D] of
    each; of all at once where all are as long and none has any."""
    tokens, lengths = int(starts[-1]), starts.diff().tolist()
    if fronts is None and len(set(lengths)) == 1:
        yield 0, tokens, None, [part.view(len(part) * len(lengths), -1, part.shape[2]) for part in folded]
        return
    sizes = [part.shape[1] // tokens for part in folded]
    begun, counts = [[], []] if fronts is None else fronts[: 2 * len(lengths)].view(2, -1).tolist()
    for row, (first, last) in enumerate(zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True)):
        borrows = fronts is not None and begun[row] != first
        front = slice(begun[row], begun[row] + counts[row]) if borrows else None
        yield first, last, front, [part[:, first * x : last * x] for part, x in zip(folded, sizes, strict=True)]


def _behind(whole: Tensor, front: slice | None, own: Tensor) -> Tensor:
    """A row's tokens with those that lie in front of it, where there are any: [heads, before + T, D]."""
    return own if front is None else torch.cat([whole[:, front], own], 1)


def _blocks(query: Tensor, key: Tensor, groups: int, buffers: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Block by block of queries [n, T · groups, D], the last first: its queries, their shares [n, queries, keys] of all
    keys [n, before + T, D] up to the last of them, and the last of ``buffers`` tensors of that size, which every block
    writes anew."""
    count, keys, _ = key.shape
    length = query.shape[1] // groups
    size = min(max(ROWS // groups, LEAST), length)
    memory = [query.new_empty(count * size * groups * keys) for _ in range(buffers)]
    for start in range((length - 1) // size * size, -1, -size):
        end = min(start + size, length)
        rows, seen = slice(start * groups, end * groups), keys - length + end
        shape = (count, (end - start) * groups, seen)
        shares, *_, work = [flat[: math.prod(shape)].view(shape) for flat in memory] * 2
        torch.bmm(query[:, rows], key[:, :seen].transpose(1, 2), out=shares)
        kernels.shares(shares, groups, keys - length + start)
        yield rows, shares, work
