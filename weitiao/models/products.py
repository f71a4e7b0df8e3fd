"""Matrix products in bfloat16 by the processor's own instructions for it (``products.c`` and ``decode.c``).

    out = summed([(x, weight, False), (small, b, False)], bias)     # a linear and its LoRA, rounded once
    out = summed([(rounded(x), Codes(codes, scales), False), (small, b, False)], bias)       # in eight bits (bytes.c)

oneDNN compiles a kernel for every number of rows that it meets; these take any. Where they are not there (float32, no
AVX-512 BF16, or AMX, which is faster still) the products are torch's. Rows of an input may lie apart, its columns not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from weitiao.models import kernels

FEW = 32  # rows that are multiplied without laying out the weight


class Codes(NamedTuple):
    """A weight in eight bits: int8 [M, K], and float32 [M], what a step of each output's codes is."""

    numbers: Tensor
    scales: Tensor


class Rounded(NamedTuple):
    """What such a weight is multiplied with: int8 [N, K], filled up with zeros to a multiple of four columns, what a
    step of each row is, float32 [N], the sum of its numbers, int32 [N], and the dtype that it had."""

    numbers: Tensor
    scales: Tensor
    sums: Tensor
    dtype: torch.dtype


Part = tuple[Tensor | Rounded, Tensor | Codes, bool]  # the input, the weight, and whether that lies across


def available(dtype: torch.dtype) -> bool:
    """Whether products in ``dtype`` are compiled here; elsewhere they are torch's."""
    return dtype == torch.bfloat16 and kernels.compiled() is not None and hasattr(kernels.compiled(), "products")


def summed(
    parts: Sequence[Part],
    bias: Tensor | None = None,
    onto: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``bias`` plus ``onto`` plus the sum of ``x`` Wᵀ, or of ``x`` W where a part says that W lies across; summed in
    float32 and rounded once.

    A part is ``x`` [N, K], the weight [M, K], or [K, M] across, both with rows in one piece, and that flag; ``bias``
    is float32 [M]; ``onto`` [N, M]. The result [N, M] is written to ``out`` where that is given, whose rows may lie
    apart. A weight of ``Codes`` is multiplied with what :func:`rounded` made of ``x``; the scales of one that lies
    across belong to ``x``, and it has been given them.
    """
    codes: Any = [part for part in parts if isinstance(part[1], Codes)]
    plain: list[tuple[Tensor, Tensor, bool]] = [part for part in parts if isinstance(part[1], Tensor)]  # type: ignore[misc]
    if codes:
        return _coded(codes, plain, bias, onto)
    first, weight, across = plain[0]
    shape = first.shape[0], weight.shape[int(across)]
    if not available(first.dtype) or any(x.shape[1] % 2 for x, _, _ in plain):
        weight = weight if across else weight.t()
        total = torch.mm(first, weight) if bias is None else torch.addmm(bias.to(first.dtype), first, weight)
        for x, weight, across in plain[1:]:
            total.addmm_(x, weight if across else weight.t())
        total = total if onto is None else total.add_(onto)
        return total if out is None else out.copy_(total)
    out = first.new_empty(shape) if out is None else out
    numbers: list[int] = []
    for x, weight, across in plain:
        (x_step, x_apart), (weight_step, weight_apart) = x.stride(), weight.stride()
        assert x_apart == weight_apart == 1 and x.dtype == weight.dtype == out.dtype
        numbers += (x.data_ptr(), x_step, x.shape[1], weight.data_ptr(), weight_step, across)
    assert onto is None or (onto.dtype == out.dtype and onto.stride() == out.stride())
    described = (ctypes.c_int64 * len(numbers))(*numbers)
    if kernels.run("products", described, len(parts), bias, onto, out, out.stride(0), *shape):
        raise MemoryError(f"products: {list(shape)}")
    return out


def multiplies_codes(dtype: torch.dtype) -> bool:
    """Whether products in eight bits, of inputs in ``dtype``, are compiled here (AVX-512 VNNI)."""
    there = kernels.compiled() is not None and hasattr(kernels.compiled(), "coded")
    return there and (dtype == torch.float32 or available(dtype))


def rounded(x: Tensor, scales: Tensor | None = None) -> Rounded:
    """``x`` [N, K], times ``scales`` [K] where they are given, rounded to 127 steps either way, row by row."""
    rows, width = x.shape
    step = -(-width // 4) * 4
    if kernels.compiled() is None:
        wide = x.float() if scales is None else x.float() * scales
        sizes = wide.abs().amax(1) / 127
        numbers = pad((wide / sizes.clamp_min(1e-38)[:, None]).round(), (0, step - width)).to(torch.int8)
        return Rounded(numbers, sizes, numbers.sum(1, dtype=torch.int32), x.dtype)
    found = torch.empty(rows, step, dtype=torch.int8), torch.empty(rows), torch.empty(rows, dtype=torch.int32)
    assert x.stride(1) == 1
    name = kernels.NAMES[x.dtype]
    kernels.run(f"rounded_{name}_{name}", x, x.stride(0), scales, found[0], step, *found[1:], rows, width)
    return Rounded(*found, x.dtype)


def _coded(
    parts: Sequence[tuple[Rounded, Codes, bool]],
    plain: Sequence[tuple[Tensor, Tensor, bool]],
    bias: Tensor | None,
    onto: Tensor | None,
) -> Tensor:
    """The sum where some weights are codes: exact integers until the scales come in, float32 from there on."""
    first, weight, across = parts[0]
    rows, columns, dtype = len(first.numbers), weight.numbers.shape[int(across)], first.dtype
    if not multiplies_codes(dtype):
        return _coded_twin(parts, plain, bias, onto)
    if plain and (dtype == torch.float32 or any(x.shape[1] % 2 for x, _, _ in plain)):
        onto, plain = summed(plain, None, onto), ()
    numbers: list[int] = []
    for x, weight, across in parts:
        codes, scales = weight.numbers, 0 if across else weight.scales.data_ptr()
        numbers += (x.numbers.data_ptr(), x.numbers.stride(0), codes.shape[int(not across)])
        numbers += (codes.data_ptr(), codes.stride(0), across, x.scales.data_ptr(), x.sums.data_ptr(), scales)
    for x, weight, across in plain:
        assert x.stride(1) == weight.stride(1) == 1 and x.dtype == weight.dtype == dtype
        numbers += (x.data_ptr(), x.stride(0), x.shape[1], weight.data_ptr(), weight.stride(0), across, 0, 0, 0)
    out = torch.empty(rows, columns, dtype=dtype)
    assert onto is None or (onto.dtype == out.dtype and onto.stride() == out.stride())
    described, count = (ctypes.c_int64 * len(numbers))(*numbers), len(parts) + len(plain)
    if kernels.run("coded", described, count, bias, onto, out, dtype == torch.float32, columns, rows, columns):
        raise MemoryError(f"coded: {[rows, columns]}")
    return out


def _coded_twin(
    parts: Sequence[tuple[Rounded, Codes, bool]],
    plain: Sequence[tuple[Tensor, Tensor, bool]],
    bias: Tensor | None,
    onto: Tensor | None,
) -> Tensor:
    """The same in plain torch."""
    found: list[Tensor] = [tensor.float() for tensor in (bias, onto) if tensor is not None]
    for x, weight, across in parts:
        codes = weight.numbers.double() if across else weight.numbers.double().t()
        exact = (x.numbers[:, : len(codes)].double() @ codes).float() * x.scales[:, None]
        found.append(exact if across else exact * weight.scales)
    found += [x.float() @ (weight if across else weight.t()).float() for x, weight, across in plain]
    return torch.stack(torch.broadcast_tensors(*found)).sum(0).to(parts[0][0].dtype)


def outer(x: Tensor, y: Tensor, scale: float = 1.0, turned: bool = False) -> Tensor:
    """``scale`` · xᵀ y in float32 [R, K], or its transpose [K, R] where it is ``turned``: ``x`` [N, R] is narrow, as a
    LoRA's rank is, and ``y`` [N, K]. Rows of either may lie apart."""
    if not available(x.dtype):
        return torch.mm(y.t(), x).float().mul_(scale) if turned else torch.mm(x.t(), y).float().mul_(scale)
    rank, width = x.shape[1], y.shape[1]
    out = torch.empty((width, rank) if turned else (rank, width), dtype=torch.float32)
    steps = (1, rank) if turned else (width, 1)
    if kernels.run("outer", x, x.stride(0), rank, y, y.stride(0), width, out, *steps, scale, x.shape[0]):
        raise MemoryError(f"outer: {list(out.shape)}")
    return out


def at_weight(gradient: Tensor, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """The gradient at a weight whose product with ``x`` [N, K] has this one [N, M]: float32 [M, K], added in place to
    ``onto`` where that is given."""
    plain = x.device.type != "cpu" or gradient.stride(1) != 1 or x.stride(1) != 1
    if plain or not available(x.dtype):
        found = torch.mm(gradient.t(), x)
        return found.float() if onto is None else onto.add_(found)
    out = torch.empty(gradient.shape[1], x.shape[1]) if onto is None else onto
    sizes = len(x), gradient.shape[1], x.shape[1]
    if kernels.run("at_weight", gradient, gradient.stride(0), x, x.stride(0), out, int(onto is not None), *sizes):
        raise MemoryError(f"at_weight: {list(out.shape)}")
    return out


def decodes(width: int, groups: int, batch: int) -> bool:
    """Whether :func:`decode` is there for heads of this width, so many queries to a key, and so many rows."""
    there = available(torch.bfloat16) and hasattr(kernels.compiled(), "decode")
    return there and width % 16 == 0 and width <= 256 and groups <= 16 and batch <= FEW


def decode(
    layers: Tensor,
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    lengths: Tensor,
    epsilon: float,
    scale: float,
    shape: tuple[int, int, int, int],
) -> None:
    """``x`` [B, H], a token of every row, becomes in place what blocks make of it. ``layers``: int64 [blocks, 62], each
    as ``decode.c`` lays it out; ``cosine``, ``sine``: float32 [B, D / 2]; ``lengths``: int64 [B], tokens before it;
    ``shape``: key heads, queries to each, width, capacity."""
    heads, groups, width, capacity = shape
    sizes = (*x.shape, heads, groups, width, cosine.shape[1], capacity)
    if kernels.run("decode", layers, len(layers), x, cosine, sine, lengths, epsilon, scale, *sizes):
        raise MemoryError(f"decode: {list(x.shape)}")


def few(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` Wᵀ in bfloat16 for up to FEW rows of ``x`` [B, K]; ``weight`` [M, K]."""
    out = x.new_empty(len(x), len(weight))
    kernels.run("few", x, weight, out, *out.shape, x.shape[1])
    return out
