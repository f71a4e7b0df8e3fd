"""Causal attention for bfloat16 on a CPU, in blocks of queries.

    name = register()                  # an attention implementation that transformers' models can be loaded with

torch's fused kernel multiplies bfloat16 without the processor's own instructions for it; oneDNN's batched product uses
them. So the scores of a block of queries are one product, as large as a cache can hold, and the blocks follow one
another: what lies right of the diagonal is never computed, no T x T matrix is kept, and the backward pass computes the
shares again. Whatever is not plain causal self-attention in bfloat16 goes to torch's kernel as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "weitiao_blocks"
OTHERS = ("position_bias", "softcap", "s_aux", "cache")  # options that make it another attention
ROWS = 128  # queries in a block: measured fastest from 128 to 2,048 tokens


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
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    out: Any = _Blocks.apply(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2), None


class _Blocks(torch.autograd.Function):
    """softmax(scale · Q Kᵀ, causal) V of [B, heads, T, D]."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (states.flatten(0, 1) for states in (query * scale, key, value))
        out = torch.empty_like(q)
        for start, end, shares, _ in _shares(q, k, buffers=1):
            out[:, start:end] = shares @ v[:, :end]
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return out.view_as(query)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        q, k, v, out = (states.flatten(0, 1) for states in (query * ctx.scale, key, value, gradients[0]))
        q_grad = torch.empty_like(q)
        # keys and values gather from all later blocks: added up in float32, rounded once
        k_grad, v_grad = (torch.zeros(states.shape, dtype=torch.float32) for states in (k, v))
        for start, end, shares, work in _shares(q, k, buffers=2):
            block = out[:, start:end]
            v_grad[:, :end] += shares.transpose(1, 2) @ block
            torch.bmm(block, v[:, :end].transpose(1, 2), out=work)
            torch.ops.aten._softmax_backward_data.out(work, shares, -1, shares.dtype, grad_input=work)
            q_grad[:, start:end] = work @ k[:, :end]
            k_grad[:, :end] += work.transpose(1, 2) @ q[:, start:end]
        grads = (q_grad.mul_(ctx.scale), k_grad.to(k.dtype), v_grad.to(v.dtype))
        return *(grad.view_as(query) for grad in grads), None  # type: ignore[return-value]


def _shares(query: Tensor, key: Tensor, buffers: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Block by block: its first query, the one after its last, the shares [N, block, end] of the keys up to there, and
    the last of ``buffers`` tensors of that size, which every block writes anew."""
    count, length, _ = query.shape
    rows = min(ROWS, length)
    later = torch.full((rows, rows), float("-inf"), dtype=query.dtype).triu(1)
    memory = [query.new_empty(count * rows * length) for _ in range(buffers)]
    for start in range(0, length, rows):
        end = min(start + rows, length)
        size = end - start
        shares, *_, work = [flat[: count * size * end].view(count, size, end) for flat in memory] * 2
        torch.bmm(query[:, start:end], key[:, :end].transpose(1, 2), out=shares)
        shares[:, :, start:] += later[:size, :size]
        torch.softmax(shares, -1, out=shares)
        yield start, end, shares, work
