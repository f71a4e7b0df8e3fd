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
        ctx.scale, ctx.heads, ctx.length = scale, key.shape[1], key.shape[2]
        q = fold(query.transpose(1, 2), ctx.heads, scale=scale)
        k, v = (fold(states.transpose(1, 2), ctx.heads) for states in (key, value))
        ctx.save_for_backward(q, k, v)
        return attend(q, k, v, ctx.heads)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        at_q, at_k, at_v = attend_backward(gradients[0].contiguous(), q, k, v, ctx.heads)
        at_q = unfold(at_q, ctx.heads, ctx.length, scale=ctx.scale)
        at_k, at_v = (unfold(states, ctx.heads, ctx.length) for states in (at_k, at_v))
        return at_q.transpose(1, 2), at_k.transpose(1, 2), at_v.transpose(1, 2), None


def fold(states: Tensor, heads: int, angles: tuple[Tensor, Tensor] = NO_ANGLES, scale: float = 1.0) -> Tensor:
    """[B, T, heads · groups, D] to [B · heads, T · groups, D], turned by ``angles`` and scaled: the query heads that
    share a key lie together, so that one product serves them all."""
    batch, length, _, width = states.shape
    split = states.unflatten(2, (heads, -1))
    folded = states.new_empty(batch, heads, length, split.shape[3], width)
    kernels.turned(split, folded.transpose(1, 2), *angles, scale)
    return folded.view(batch * heads, -1, width)


def unfold(
    states: Tensor, heads: int, length: int, angles: tuple[Tensor, Tensor] = NO_ANGLES, scale: float = 1.0
) -> Tensor:
    """The way back, for gradients: [B · heads, T · groups, D] to [B, T, heads · groups, D]."""
    split = states.view(-1, heads, length, states.shape[1] // length, states.shape[2]).transpose(1, 2)
    target = states.new_empty(split.shape)
    return kernels.turned(split, target, *angles, scale, back=True).flatten(2, 3)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Folded query [N, T · groups, D], scaled, key and value [N, T, D] to [B, T, heads · groups, D]."""
    length, groups = key.shape[1], query.shape[1] // key.shape[1]
    out = query.new_empty(len(key) // heads, length, heads, groups, query.shape[2])
    if kernels.attend(query, key, value, out):
        return out.flatten(2, 3)
    for start, end, share, _ in _blocks(query, key, groups, buffers=1):
        block = torch.bmm(share, value[:, :end]).view(-1, heads, end - start, groups, query.shape[2])
        out[:, start:end] = block.transpose(1, 2)
    return out.flatten(2, 3)


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at the folded query, key and value, given the contiguous one at :func:`attend`'s output."""
    groups = query.shape[1] // key.shape[1]
    at_query = torch.empty_like(query)
    at_key, at_value = torch.empty_like(key), torch.empty_like(value)
    if kernels.attend_backward(gradient.unflatten(2, (heads, groups)), query, key, value, at_query, at_key, at_value):
        return at_query, at_key, at_value
    out = fold(gradient, heads)
    totals: list[Tensor] = []  # at key and value: gathered from all blocks in float32, rounded once
    for start, end, share, work in _blocks(query, key, groups, buffers=2):
        rows = slice(start * groups, end * groups)
        block = out[:, rows]
        at_value = torch.bmm(share.transpose(1, 2), block)
        torch.bmm(block, value[:, :end].transpose(1, 2), out=work)
        kernels.shares_backward(share, work, groups, start)
        at_query[:, rows] = torch.bmm(work, key[:, :end])
        at_key = torch.bmm(work.transpose(1, 2), query[:, rows])
        if not totals:  # the last queries, which see all keys
            totals = [at_key, at_value] if start == 0 else [at_key.float(), at_value.float()]
            continue
        totals[0][:, :end] += at_key
        totals[1][:, :end] += at_value
    return at_query, totals[0].to(key.dtype), totals[1].to(value.dtype)


def _blocks(query: Tensor, key: Tensor, groups: int, buffers: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Block by block, the last first: its first query, the one after its last, the shares [N, queries · groups, end] of
    the keys up to there, and the last of ``buffers`` tensors of that size, which every block writes anew."""
    count, length, _ = key.shape
    size = min(max(ROWS // groups, LEAST), length)
    memory = [query.new_empty(count * size * groups * length) for _ in range(buffers)]
    for start in range((length - 1) // size * size, -1, -size):
        end = min(start + size, length)
        rows = slice(start * groups, end * groups)
        shape = (count, (end - start) * groups, end)
        shares, *_, work = [flat[: math.prod(shape)].view(shape) for flat in memory] * 2
        torch.bmm(query[:, rows], key[:, :end].transpose(1, 2), out=shares)
        kernels.shares(shares, groups, start)
        yield start, end, shares, work
