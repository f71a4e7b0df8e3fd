"""A Llama-like block in one piece, forward and backward, for training on a CPU.

    with fused(model):
        ...                  # blocks that are known run here, all others as ever

transformers computes a block with some forty operations that autograd records, each of which writes its result to
memory. Here it is eleven matrix products and what lies between them (``kernels``), with the backward pass written out:
nothing is kept but what no product can do without, and the norms, the activation and attention's shares are computed
again. The mathematics is that of transformers' modules, rounded at fewer places.

Known are Llama, Mistral, Qwen2 and Qwen3, with frozen or trained weights, codes (``models.quantized``) and LoRA on any
of their linears. Whatever else a method does to a block leaves it to transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weitiao.models import kernels, modules
from weitiao.models.attention import attend, attend_backward, fold, unfold
from weitiao.models.quantized import QuantizedLinear

FAMILIES = {  # model_type: the class of its blocks
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
}
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


@contextmanager
def fused(model: nn.Module, active: bool = True) -> Iterator[None]:
    """While it is open, the blocks of ``model`` that are known, on a CPU and without a cache, run in one piece."""
    layers: list[Any] = list(modules.inner(model).modules()) if active else []
    known = [layer for layer in layers if type(layer).__name__ in FAMILIES.values()]
    turns = _Turns()
    for layer in known:
        layer.forward = partial(_forward, layer, turns)
    try:
        yield
    finally:
        for layer in known:
            del layer.forward


def _forward(layer: Any, turns: _Turns, hidden_states: Tensor, *positional: Any, **options: Any) -> Tensor:
    """In the place of a layer's ``forward``."""
    angles: tuple[Tensor, Tensor] | None = options.get("position_embeddings")
    others = any(options.get(name) is not None for name in ("attention_mask", "past_key_values"))
    window = getattr(layer.self_attn, "sliding_window", None)
    short = window is None or hidden_states.shape[1] <= window
    block = None
    if not positional and not others and short and angles is not None and hidden_states.device.type == "cpu":
        block = read(layer)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    if block is None or angles is None or not kernels.serves(dtype, hidden_states.dtype):
        return type(layer).forward(layer, hidden_states, *positional, **options)
    out: Any = _Fused.apply(hidden_states.contiguous(), *turns.of(angles), block, dtype, *block.trained())
    return out


class _Turns:
    """The rotary angles as the kernels take them, made once for all blocks of a pass."""

    last: Any = (None, None)

    def of(self, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B or 1, T, D] to float32 [B or 1, T, D / 2]: both halves of a head turn alike."""
        if self.last[0] is not angles[0]:
            half = angles[0].shape[-1] // 2
            self.last = angles[0], tuple(part[..., :half].float().contiguous() for part in angles)
        return self.last[1]


def read(layer: Any) -> Block | None:
    """What ``layer`` consists of; None where a method has made something else of it."""
    attention, mlp = layer.self_attn, layer.mlp
    if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules() if module is not layer):
        return None
    places = {name: getattr(attention, f"{name}_proj") for name in (*QKV, "o")}
    places |= {name: getattr(mlp, f"{name}_proj") for name in (*GATE_UP, "down")}
    linears = {name: _linear(module) for name, module in places.items()}
    silent = not attention.training or not getattr(attention, "attention_dropout", 0.0)
    if None in linears.values() or type(mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU") or not silent:
        return None
    norms: dict[str, Any] = {"input": layer.input_layernorm, "output": layer.post_attention_layernorm}
    norms |= {name: norm for name in ("q", "k") if (norm := getattr(attention, f"{name}_norm", None)) is not None}
    if any(not type(norm).__name__.endswith("RMSNorm") for norm in norms.values()):
        return None
    weights = {name: (norm.weight, float(norm.variance_epsilon)) for name, norm in norms.items()}
    return Block(linears, weights, attention.head_dim, float(attention.scaling))  # type: ignore[arg-type]


def _linear(module: Any) -> Linear | None:
    """A plain linear, codes, or PEFT's LoRA around one of them; None for anything else."""
    if type(module) is nn.Linear:
        return Linear(module.weight, module.bias)
    if type(module) is QuantizedLinear:
        return Linear(module, module.bias)
    if type(module).__name__ != "Linear" or not type(module).__module__.startswith("peft.tuners.lora"):
        return None
    base = _linear(module.base_layer)
    names = [name for name in module.active_adapters if name in module.lora_A]
    if base is None or (module.merged and module.disable_adapters):  # a pass would take the adapter out again
        return None
    if module.merged or module.disable_adapters or not names:
        return base
    if len(names) > 1 or names[0] in module.lora_variant:
        return None
    a, b, dropout = (layers[names[0]] for layers in (module.lora_A, module.lora_B, module.lora_dropout))
    if a.bias is not None or b.bias is not None:
        return None
    share = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
    return Linear(base.weight, base.bias, a.weight, b.weight, float(module.scaling[names[0]]), share)


class _Fused(torch.autograd.Function):
    """The whole block: hidden [B, T, H] to the same."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, cosine: Tensor, sine: Tensor, block: Block, dtype: torch.dtype, *trained: Tensor
    ) -> Tensor:
        batch, length, _width = hidden.shape
        run = _Forward(block, dtype)
        x = hidden.view(batch * length, -1)
        normed, inverse, _ = run.norm("input", x)
        states = {name: run.linear(name, normed) for name in QKV}
        heads = states["k"].shape[1] // block.width
        before = {name: states[name] for name in QKV if name in block.norms}
        inverses: dict[str, Tensor] = {}
        for name in before:
            states[name], inverses[name], _ = run.norm(name, states[name].view(-1, block.width))
        angles, still = (cosine, sine), (cosine[..., :0], sine[..., :0])
        states = {name: part.view(batch, length, -1, block.width) for name, part in states.items()}
        query = fold(states["q"], heads, angles, block.scale)
        key, value = fold(states["k"], heads, angles), fold(states["v"], heads, still)
        seen = attend(query, key, value, heads).view(batch * length, -1)
        normed, second, middle = run.norm("output", x, run.linear("o", seen))
        gate, up = (run.linear(name, normed) for name in GATE_UP)
        out = kernels.add(middle, run.linear("down", kernels.gated(gate, up)))
        ctx.save_for_backward(
            x, inverse, cosine, sine, query, key, value, seen, middle, second, gate, up,
            *before.values(), *inverses.values(), *run.small.values(), *run.casts.values(),
        )  # fmt: skip
        ctx.block, ctx.dtype, ctx.heads, ctx.shape, ctx.seeds = block, dtype, heads, hidden.shape, run.seeds
        ctx.names = [*before], [*before], [*run.small], [*run.casts]
        return out.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, cosine, sine, query, key, value, seen, middle, second, gate, up, *rest = ctx.saved_tensors
        block, heads, length = ctx.block, ctx.heads, ctx.shape[1]
        kept = iter(rest)
        before, inverses, small, casts = ({name: next(kept) for name in names} for names in ctx.names)
        run = _Backward(block, ctx.dtype, small, casts, ctx.seeds)
        gradient = gradients[0].contiguous().view(x.shape)
        narrow = gradient.to(ctx.dtype)

        at_product = run.linear("down", narrow, None)
        at_gate, at_up, product = kernels.gated_backward(at_product, gate, up, block.linears["down"].trains)
        run.at_weight("down", narrow, product)
        normed = run.normed("output", middle, second, GATE_UP)
        at_normed = run.linear("gate", at_gate, normed)
        at_normed = run.linear("up", at_up, normed, at_normed)
        at_middle, narrow = run.norm("output", at_normed, middle, second, gradient)

        at_seen = run.linear("o", narrow, seen).view(*ctx.shape[:2], -1, block.width)
        parts = attend_backward(at_seen, query, key, value, heads)
        angles, still = (cosine, sine), (cosine[..., :0], sine[..., :0])
        at = {
            "q": unfold(parts[0], heads, length, angles, block.scale),
            "k": unfold(parts[1], heads, length, angles),
            "v": unfold(parts[2], heads, length, still),
        }
        for name, states in before.items():
            split = states.view(-1, block.width)
            _, at[name] = run.norm(name, at[name].view(-1, block.width), split, inverses[name], None)
        at = {name: part.view(len(x), -1) for name, part in at.items()}
        normed = run.normed("input", x, inverse, QKV)
        wanted = ctx.needs_input_grad[0] or block.norms["input"][0].requires_grad
        total: Tensor | None = None
        for name in QKV:
            total = run.linear(name, at[name], normed, total, wanted)
        at_hidden = None
        if total is not None:
            at_hidden, _ = run.norm("input", total, x, inverse, at_middle)
            at_hidden = at_hidden.view(ctx.shape)
        found = (run.found.get(id(tensor)) for tensor in block.trained())
        return at_hidden, None, None, None, None, *found


def _weight(part: Linear, name: str, casts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A linear's weight for products; codes are spread out each time."""
    if isinstance(part.weight, QuantizedLinear):
        return part.weight.spread(dtype)
    return casts.get(name, part.weight.detach())


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

    def linear(self, name: str, x: Tensor) -> Tensor:
        part = self.block.linears[name]
        if isinstance(part.weight, Tensor) and part.weight.dtype != self.dtype:
            self.casts[name] = part.weight.to(self.dtype)
        weight = _weight(part, name, self.casts, self.dtype).t()
        out = torch.mm(x, weight) if part.bias is None else torch.addmm(part.bias.to(self.dtype), x, weight)
        if part.a is not None and part.b is not None:
            if part.dropout:
                self.seeds[name] = kernels.drawn_seed()
                x = kernels.dropped(x, part.dropout, self.seeds[name])
            self.small[name] = torch.mm(x, part.a.to(self.dtype).t())
            out.addmm_(self.small[name], part.b.to(self.dtype).t(), alpha=part.scale)
        return out


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

    def linear(
        self, name: str, gradient: Tensor, x: Tensor | None, onto: Tensor | None = None, wanted: bool = True
    ) -> Any:
        """The gradient at a linear's input, added to ``onto`` where that is given; at its parameters as well where its
        input ``x`` is given. None where it is not ``wanted``."""
        part = self.block.linears[name]
        if x is not None:
            self.at_weight(name, gradient, x)
        if not wanted:
            return None
        weight = _weight(part, name, self.casts, self.dtype)
        out = torch.mm(gradient, weight) if onto is None else onto.addmm_(gradient, weight)
        if part.a is not None and part.b is not None:
            inner, a = self.inner(name, gradient), part.a.to(self.dtype)
            if part.dropout:
                kernels.dropped(torch.mm(inner, a), part.dropout, self.seeds[name], onto=out)
            else:
                out.addmm_(inner, a)
        return out

    def inner(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient between the two matrices of a LoRA, made once."""
        if name not in self.inners:
            part: Any = self.block.linears[name]
            self.inners[name] = torch.mm(gradient, part.b.to(self.dtype)).mul_(part.scale)
        return self.inners[name]

    def at_weight(self, name: str, gradient: Tensor, x: Tensor | None) -> None:
        """The gradients at a linear's parameters."""
        part, found = self.block.linears[name], self.found
        if isinstance(part.weight, Tensor) and part.weight.requires_grad and x is not None:
            found[id(part.weight)] = torch.mm(gradient.t(), x).to(part.weight.dtype)
        if part.bias is not None and part.bias.requires_grad:
            found[id(part.bias)] = gradient.sum(0, dtype=torch.float32).to(part.bias.dtype)
        if part.a is not None and part.b is not None and x is not None:
            found[id(part.b)] = torch.mm(gradient.t(), self.small[name]).to(part.b.dtype).mul_(part.scale)
            inner = self.inner(name, gradient)
            if part.dropout:
                x = kernels.dropped(x, part.dropout, self.seeds[name])
            found[id(part.a)] = torch.mm(inner.t(), x).to(part.a.dtype)
