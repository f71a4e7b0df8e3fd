"""Frozen linears in 4 or 8 bits, on any device: nf4 (QLoRA, Dettmers et al., arXiv 2305.14314) and int8.

    quantize(model, "nf4", double=True)       # every linear but the output head, and a mixture's experts, in place
    dequantize(model)                         # plain linears again

A quantised linear is an ``nn.Linear`` whose weight is codes. The codes are spread out for each product and forgotten
again, in the backward pass once more, so that only the codes stay in memory. nf4's codes and double-quantised scales
are those of bitsandbytes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weitiao import machine
from weitiao.errors import InputError, say, t
from weitiao.models import kernels, modules, products

Kind = Literal["nf4", "int8"]
BLOCK = 64  # weights that share a scale
FLOAT_BYTES = 4
RESERVE_BYTES = 1 << 30  # memory that is left free when weights are spread out
SCALES_BLOCK = 256  # scales that share a scale of their own
PIECE = 1 << 22  # weights coded at a time, whole blocks of them: what that takes beside them is a hundred MiB
# Quantiles of a normal distribution with an exact zero: table NF4 of the paper's appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def levels() -> Tensor:
    """The sixteen values of nf4, float32."""
    return torch.tensor(LEVELS)


@cache
def byte_pairs() -> Tensor:
    """The two values of every byte [256, 2], float32: the first weight is in the high half."""
    codes = torch.arange(256)
    return levels()[torch.stack((codes >> 4, codes & 15), 1)]


@cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type (Dettmers, arXiv 1511.04561), float32: the larger the exponent,
    the finer the fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        borders = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (borders[:-1] + borders[1:]) / 2.0
        values += (10 ** (exponent - 6) * means).tolist() + (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def encode_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n / 2] and scales float32 [n / 64] of a weight with n entries, an even number, row after row."""
    codes, scales = zip(*map(_encode_nf4, weight.reshape(-1).split(PIECE)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def _encode_nf4(flat: Tensor) -> tuple[Tensor, Tensor]:
    flat = flat.float()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / scales.clamp_min(1e-38))[:, None]).clamp(-1, 1).reshape(-1)[: len(flat)]
    table = levels().to(flat.device)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], scales


def encode_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [s] in 8 bits: codes uint8 [s], scales of blocks of them float32 [s / 256], and their mean."""
    mean = scales.mean()
    blocks = nn.functional.pad(scales - mean, (0, -len(scales) % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    tops = blocks.abs().amax(1)
    scaled = (blocks / tops.clamp_min(1e-38)[:, None]).reshape(-1)[: len(scales)]
    table = dynamic_map().to(scales.device)
    return torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8), tops, mean


def decode_scales(codes: Tensor, tops: Tensor, mean: Tensor) -> Tensor:
    """The reverse of :func:`encode_scales`: float32 [s]."""
    return dynamic_map().to(codes.device)[codes.long()] * tops.repeat_interleave(SCALES_BLOCK)[: len(codes)] + mean


class QuantizedLinear(nn.Linear):
    """A frozen linear that keeps codes. ``weight`` is what they stand for, computed anew whenever it is asked for, and
    no parameter; ``bias`` stays as it was."""

    plain: Tensor | None = None  # the weight spread out, while it is kept
    lean = False  # it may not be kept
    said = False  # that memory does not suffice to keep it
    codes: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, kind: Kind, double: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = modules.in_out(linear)
        self.bias = linear.bias
        self.weight_dtype = linear.weight.dtype
        self.transposed = isinstance(linear, Conv1D)  # how its family stores the weight
        self.kind = kind
        self.taken: tuple[Tensor, Tensor] | None = None  # factors [out, r] and [r, in] of a product that is subtracted
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        buffers: dict[str, Tensor] = {}
        with torch.no_grad():
            if kind == "int8":
                scales = weight.float().abs().amax(1).clamp_min(1e-38) / 127
                buffers["codes"] = (weight.float() / scales[:, None]).round().to(torch.int8)
                buffers["scales"] = scales
            else:
                buffers["codes"], buffers["scales"] = encode_nf4(weight)
                if double:
                    scales = buffers.pop("scales")
                    buffers["scale_codes"], buffers["tops"], buffers["mean"] = encode_scales(scales)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        if linear.weight.device.type == "cpu":
            machine.give_back(linear.weight.data_ptr(), linear.weight.nbytes)

    def spread(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the codes stand for, without what was ``taken`` from it."""
        if dtype == torch.bfloat16 and self.whole_blocks and kernels.spreads():
            return kernels.spread(self.codes, self.block_scales()).view(self.out_features, self.in_features)
        if self.taken is None:
            return self._spread().to(dtype)
        with torch.autocast(self.taken[0].device.type, enabled=False):
            return self._spread().addmm_(*self.taken, alpha=-1).to(dtype)

    def _spread(self) -> Tensor:
        """The codes as numbers [out, in], float32."""
        state: Any = self
        if self.kind == "int8":
            return state.codes * state.scales[:, None]
        values = byte_pairs().to(state.codes.device)[state.codes.int()].view(-1)
        missing = -len(values) % BLOCK
        blocks = nn.functional.pad(values, (0, missing)).view(-1, BLOCK) * self.block_scales()[:, None]
        return blocks.view(-1)[: len(values)].view(self.out_features, self.in_features)

    def codes_of(self, dtype: torch.dtype) -> products.Codes | None:
        """The codes, where this machine multiplies them as they are with inputs in ``dtype``."""
        state: Any = self
        fits = self.kind == "int8" and self.taken is None and products.multiplies_codes(dtype)
        return products.Codes(state.codes, state.scales) if fits and state.codes.device.type == "cpu" else None

    def block_scales(self) -> Tensor:
        """nf4's scales, float32 [blocks]."""
        state: Any = self
        double = hasattr(self, "scale_codes")
        return decode_scales(state.scale_codes, state.tops, state.mean) if double else state.scales

    @property
    def whole_blocks(self) -> bool:
        """Whether every row is whole blocks of nf4 on a CPU, as compiled functions read them."""
        aligned = self.kind == "nf4" and self.in_features % BLOCK == 0
        return aligned and self.taken is None and self.codes.device.type == "cpu"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] in the dtype that the weight had."""
        return self.spread(self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out], in the input's dtype or autocast's."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        plain = self.plain
        if plain is not None and plain.dtype == dtype and plain.device == input.device and not torch.is_grad_enabled():
            with torch.autocast(device, enabled=False):
                return nn.functional.linear(input.to(dtype), plain, None if self.bias is None else self.bias.to(dtype))
        # flat inside: torch's product of more dimensions with a bias is a view there, which no one may add to in place
        rows: Any = _Product.apply(input.to(dtype).reshape(-1, self.in_features), self)
        return rows.view(*input.shape[:-1], self.out_features)

    def train(self, mode: bool = True) -> QuantizedLinear:
        """Training needs the memory: codes alone."""
        self.plain = None if mode else self.plain
        return super().train(mode)

    def bytes(self) -> int:
        """What the codes and their scales take."""
        return sum(tensor.nbytes for tensor in self.buffers(recurse=False))


class _Product(torch.autograd.Function):
    """x Wᵀ + b of [N, in] that keeps nothing: the weight is spread out again for the gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.to(inputs.dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            return nn.functional.linear(inputs, linear.spread(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = outputs
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ ctx.linear.spread(grad.dtype), None


def linear_bytes(outputs: int, inputs: int, kind: Kind, double: bool = False) -> int:
    """What the codes of a linear and their scales take, bias apart."""
    weights = outputs * inputs
    if kind == "int8":
        return weights + FLOAT_BYTES * outputs
    scales = -(-weights // BLOCK)
    if not double:
        return weights // 2 + FLOAT_BYTES * scales
    return weights // 2 + scales + FLOAT_BYTES * (-(-scales // SCALES_BLOCK) + 1)


def quantize(model: nn.Module, kind: Kind, double: bool = False, training: Collection[str] = frozenset()) -> nn.Module:
    """Put codes in the place of every linear's weight, and of a mixture's experts, one after another; the output head
    stays, and so does what has a parameter among ``training``. InputError where that leaves no linear."""
    from weitiao.models import experts

    linears: dict[str, Any] = dict(modules.linears(model))
    chosen = {name: linear for name, linear in linears.items() if not {f"{name}.weight", f"{name}.bias"} & {*training}}
    if not chosen:
        raise InputError(
            t("model.quantize: every linear trains; codes cannot, so take quantize=none or another method")
        )
    for name, linear in chosen.items():
        if not isinstance(linear, QuantizedLinear):
            _replace(model, name, QuantizedLinear(linear, kind, double))
    experts.put_in_codes(model, kind, double, training)
    return model


def keep_plain(model: nn.Module, dtype: torch.dtype) -> None:
    """Spread the weights out once, for generating: token by token it would be done for every one of them. Not where
    memory does not suffice, which is said, and not inside :func:`codes_only`. ``train()`` forgets them."""
    layers = [layer for layer in quantized(model) if layer.plain is None]
    if not layers or layers[0].lean:
        return
    needed = sum(layer.in_features * layer.out_features for layer in layers) * dtype.itemsize
    device = next(layers[0].buffers()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.memory().available_bytes
    if needed + RESERVE_BYTES > free:
        if not layers[0].said:
            message = (
                "generating from codes, which are spread out anew for every token: {needed:.1f} GiB of memory would "
                "keep them, {free:.1f} are free; weitiao merge makes a model that is fast"
            )
            say(message, needed=needed / 2**30, free=free / 2**30)
        layers[0].said = True
        return
    with torch.no_grad():
        for layer in layers:
            layer.plain = layer.spread(dtype)


@contextmanager
def codes_only(model: nn.Module) -> Iterator[None]:
    """Inside, no weight is kept spread out: a run takes no more memory than its plan says."""
    layers = quantized(model)
    for layer in layers:
        layer.lean, layer.plain = True, None
    try:
        yield
    finally:
        for layer in layers:
            layer.lean = False


def quantized(model: nn.Module) -> list[QuantizedLinear]:
    """The linears that are codes."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def dequantize(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Put plain linears, and a mixture's plain experts, in the place of quantised ones."""
    from weitiao.models import experts

    experts.put_back(model, dtype)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, QuantizedLinear):
            _replace(model, name, _plain(linear, dtype))
    return model


def kind_of(model: nn.Module) -> dict[str, Any] | None:
    """How a model's linears are quantised, as the options of ``models.load`` say it; None where they are not."""
    found = next((module for module in model.modules() if isinstance(module, QuantizedLinear)), None)
    if found is None:
        return None
    return {"quantize": found.kind, "double_quantization": hasattr(found, "scale_codes")}


def plain_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state that a plain model of the same kind has, with the weights that the codes stand for."""
    from weitiao.models import experts

    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in found or name.endswith(".bias")
    }
    alone = {name: module for name, module in found.items() if not isinstance(module, experts.ExpertLinear)}
    state |= {f"{name}.weight": module.spread(dtype) for name, module in alone.items()}
    state |= experts.plain_state(model, dtype)
    for name, module in model.named_modules():
        if getattr(module, "transposed", False):
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    return state


def _plain(linear: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(linear.spread(dtype), requires_grad=False)
    plain.bias = linear.bias
    plain.transposed = linear.transposed  # type: ignore[assignment]
    return plain


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    above, _, last = name.rpartition(".")
    setattr(model.get_submodule(above), last, module)
