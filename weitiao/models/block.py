"""Which blocks of a model can be computed in one piece (``whole``) in training on a CPU, and how they are then called.

    with fused(model):
        ...                  # blocks that are known run in one piece, all others as ever

transformers computes a block with some forty operations that autograd records, each of which writes its result to
memory. In one piece it is eleven matrix products and what lies between them. The mathematics is that of transformers'
modules, rounded at fewer places. Where all blocks of a model are known, padding is left out before the first and put
back behind the last.

What rows have in common in front is computed once.

Known are Llama, Mistral, Qwen2, Qwen3, Gemma (the first), GLM and GLM-4-0414, with frozen or trained weights, codes
(``models.quantized``) and LoRA on any of their linears. Whatever else a method does to a block leaves it to
transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from weitiao.models import kernels, modules, products, whole
from weitiao.models.attention import even
from weitiao.models.prefixes import OPTION, Fronts, Layout
from weitiao.models.quantized import QuantizedLinear
from weitiao.models.whole import GATE_UP, JOINED, QKV, Block, Linear, Rows


class Family(NamedTuple):
    """What is the family's own in a block: the class, what is added to its norms' weights, whether a rotary angle turns
    two neighbours, and the names of its norms behind attention and behind the MLP."""

    layer: str
    offset: float = 0.0
    woven: bool = False
    attended: str | None = None
    fed: str | None = None


FAMILIES = {  # by model_type
    "llama": Family("LlamaDecoderLayer"),
    "mistral": Family("MistralDecoderLayer"),
    "qwen2": Family("Qwen2DecoderLayer"),
    "qwen3": Family("Qwen3DecoderLayer"),
    "gemma": Family("GemmaDecoderLayer", offset=1.0),
    "glm": Family("GlmDecoderLayer", woven=True),
    "glm4": Family("Glm4DecoderLayer", woven=True, attended="post_self_attn_layernorm", fed="post_mlp_layernorm"),
}
BY_LAYER = {family.layer: family for family in FAMILIES.values()}
CURVES = {"SiLUActivation": kernels.SILU, "SiLU": kernels.SILU, "GELUTanh": kernels.GELU_TANH}
CALLS_ARE_WRAPPED = "__call__" in vars(GradientCheckpointingLayer)  # as they were before transformers wrapped forward
MARK = "_weitiao_pass"  # under which a pass hangs on the angles that transformers hands to all blocks


class Kept(Protocol):
    """What the lowest ``blocks`` blocks made of rows (``train.trunk``)."""

    blocks: int

    def read(self) -> Tensor | None:
        """The states [N, H] behind them of the rows of this pass; None where they have to be computed."""
        ...

    def write(self, states: Tensor) -> None:
        """Keep these."""
        ...


Sharing = Literal["auto", "on", "off"]  # of what rows have in common: auto where nothing is drawn anew for each of them


@contextmanager
def fused(
    model: nn.Module, active: bool = True, trunk: Kept | None = None, sharing: Sharing = "auto"
) -> Iterator[None]:
    """While it is open, the blocks of ``model`` that are known, on a CPU and without a cache, run in one piece; what
    those of the ``trunk`` make of rows without padding is taken from there, and what rows have in common in front is
    computed once, where there is no trunk."""
    layers, body = _known(model) if active else [], modules.inner(model)
    alone = not layers or len(layers) < len(modules.blocks(model))
    engine = _Engine([], None, "off") if alone else _Engine(layers, trunk, "off" if trunk else sharing)
    for layer in layers:
        layer.forward = partial(_forward, engine, layer)
    body.weitiao_fused = bool(layers)
    try:
        yield
    finally:
        del body.weitiao_fused
        for layer in layers:
            del layer.forward


def _known(model: nn.Module) -> list[Any]:
    layers: list[Any] = list(modules.inner(model).modules())
    return [layer for layer in layers if type(layer).__name__ in BY_LAYER]


def layout(model: nn.Module, ids: Tensor, lengths: Tensor) -> dict[str, Layout]:
    """The option that tells the model's forward where rows [B, T] of so many tokens end and what they have in common,
    if its blocks run in one piece just now; else none."""
    takes = ids.device.type == "cpu" and getattr(modules.inner(model), "weitiao_fused", False)
    return {OPTION: Layout.of(ids, lengths)} if takes else {}


def known_blocks(model: nn.Module) -> list[Block]:
    """All blocks of the model, if all are known; else none."""
    layers = _known(model)
    blocks = [block for layer in layers if (block := read(layer)) is not None]
    return blocks if blocks and len(blocks) == len(modules.blocks(model)) else []


def packs(model: nn.Module, dtype: torch.dtype, longest: int) -> bool:
    """Whether padding costs next to nothing in this model's training with products in ``dtype`` on rows of up to
    ``longest`` tokens."""
    window = getattr(modules.inner(model).config, "sliding_window", None)
    quiet = not any(getattr(layer.self_attn, "attention_dropout", 0.0) for layer in _known(model))
    fits = window is None or longest <= window
    return without_padding(dtype) and fits and quiet and bool(known_blocks(model))


def without_padding(dtype: torch.dtype) -> bool:
    """Whether a pass may have any number of tokens: oneDNN compiles a kernel for every number that it meets."""
    return kernels.compiled() is not None and (dtype == torch.float32 or products.available(dtype))


class _Engine(NamedTuple):
    """How blocks run: ``layers``, all that there are, if all are known."""

    layers: list[Any]
    trunk: Kept | None
    sharing: Sharing


@dataclass
class _Pass:
    """A pass through a model, as its first block found it. ``places``: int64 [N], which of the [B · T] tokens are
    computed (None where padding is, like any token), and ``blocks`` what these run through, by the modules' ids;
    ``fronts``: where some stand for several rows."""

    rows: Rows
    dtype: torch.dtype
    shape: torch.Size  # of the hidden states, [B, T, H]
    places: Tensor | None = None
    blocks: dict[int, Block] = field(default_factory=dict)
    kept: Tensor | None = None  # what the trunk has of these rows
    fronts: Fronts | None = None


def _forward(engine: _Engine, layer: Any, hidden_states: Tensor, *positional: Any, **options: Any) -> Tensor:
    """In the place of the ``forward`` of ``layer``."""
    layers, trunk, _ = engine
    layout, angles = options.pop(OPTION, None), options.get("position_embeddings")
    found: _Pass | None = None
    plain = not positional and options.get("past_key_values") is None
    if angles is not None and hidden_states.device.type == "cpu" and plain:
        found = getattr(angles[0], MARK, None) or _pass(engine, layer, hidden_states, angles, layout, options)
        setattr(angles[0], MARK, found)
    if found is None or found.places is None:
        block = None if found is None or _masked(layer, hidden_states, options) else read(layer)
        if found is None or block is None or not kernels.serves(found.dtype, hidden_states.dtype):
            return type(layer).forward(layer, hidden_states, *positional, **options)
        return _run(layer, hidden_states.flatten(0, 1), found, block).view(hidden_states.shape)
    number = layers.index(layer)
    packed = hidden_states.flatten(0, 1)
    if number == 0:
        packed = packed.index_select(0, found.places)
        found.kept = trunk.read() if trunk else None
    if found.kept is None or trunk is None or number >= trunk.blocks:
        packed = _run(layer, packed, found, found.blocks[id(layer)])
    if trunk and number == trunk.blocks - 1:
        if found.kept is None:
            trunk.write(packed)
        packed = packed if found.kept is None else found.kept
    if number == len(layers) - 1:
        tokens, places = packed.new_zeros(found.shape[0] * found.shape[1], found.shape[2]), found.places
        if found.fronts is not None:
            packed, places = packed.index_select(0, found.fronts.sources), found.fronts.real
        return tokens.index_copy(0, places, packed).view(found.shape)
    return packed[None]


def _run(layer: Any, tokens: Tensor, found: _Pass, block: Block) -> Tensor:
    """The block itself, without keeping anything for the backward pass where the model is told to compute it again."""
    run = partial(whole.run, rows=found.rows, block=block, dtype=found.dtype)
    if CALLS_ARE_WRAPPED or not (layer.training and layer.gradient_checkpointing and torch.is_grad_enabled()):
        return run(tokens)
    return layer._gradient_checkpointing_func(run, tokens)


def _pass(
    engine: _Engine,
    layer: Any,
    hidden: Tensor,
    angles: tuple[Tensor, Tensor],
    layout: Layout | None,
    options: dict[str, Any],
) -> _Pass:
    """What a pass that begins with these hidden states will be."""
    layers, (batch, length, _) = engine.layers, hidden.shape
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    turns = [part[..., : part.shape[-1] // 2].float().expand(batch, -1, -1).flatten(0, 1) for part in angles]
    fits = layers and layer is layers[0] and without_padding(dtype) and kernels.serves(dtype, hidden.dtype)
    blocks: dict[int, Block] = {}
    if layout is not None and fits:
        known = {id(layer): read(layer) for layer in layers if not _masked(layer, hidden, options)}
        blocks = {place: block for place, block in known.items() if block is not None}
    if layout is None or not fits or len(blocks) < len(layers):
        cosine, sine = (turn[None].contiguous() for turn in turns)  # both halves of a head turn alike
        return _Pass(Rows(even(batch, length), cosine, sine), dtype, hidden.shape)
    drawn = any(part.dropout for block in blocks.values() for part in block.linears.values())
    shares = engine.sharing == "on" or (engine.sharing == "auto" and not drawn)
    fronts = Fronts.of(layout, length) if shares else None
    if fronts is None:
        lengths = layout.lengths + (length - layout.width)  # virtual tokens are in front
        places = (torch.arange(length) < lengths[:, None]).flatten().nonzero()[:, 0]
        starts, table = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), None
    else:
        places, starts, table = fronts.computed, fronts.starts, fronts.table
    cosine, sine = (turn.index_select(0, places)[None] for turn in turns)
    return _Pass(Rows(starts, cosine, sine, table), dtype, hidden.shape, places, blocks, fronts=fronts)


def _masked(layer: Any, hidden: Tensor, options: dict[str, Any]) -> bool:
    """Whether a token does not see all tokens before it."""
    window = getattr(layer.self_attn, "sliding_window", None)
    return options.get("attention_mask") is not None or (window is not None and hidden.shape[1] > window)


def read(layer: Any) -> Block | None:
    """What ``layer`` consists of; None where a method has made something else of it."""
    attention, mlp, family = layer.self_attn, layer.mlp, BY_LAYER[type(layer).__name__]
    if any(module._forward_hooks or module._forward_pre_hooks for module in _inside(layer)):
        return None
    places = {name: getattr(attention, f"{name}_proj") for name in (*QKV, "o")}
    gates = (JOINED,) if hasattr(mlp, f"{JOINED}_proj") else GATE_UP
    places |= {name: getattr(mlp, f"{name}_proj") for name in (*gates, "down")}
    linears = {name: _linear(module) for name, module in places.items()}
    silent = not attention.training or not getattr(attention, "attention_dropout", 0.0)
    curve = CURVES.get(type(getattr(mlp, "act_fn", None) or mlp.activation_fn).__name__)
    if None in linears.values() or curve is None or not silent or not attention.is_causal:
        return None
    norms: dict[str, Any] = {"input": layer.input_layernorm, "output": layer.post_attention_layernorm}
    norms |= {name: norm for name in ("q", "k") if (norm := getattr(attention, f"{name}_norm", None)) is not None}
    norms |= {name: getattr(layer, own) for name in ("attended", "fed") if (own := getattr(family, name)) is not None}
    if any(not type(norm).__name__.endswith("RMSNorm") for norm in norms.values()):
        return None
    epsilon = "eps" if hasattr(norms["input"], "eps") else "variance_epsilon"
    weights = {name: (norm.weight, float(getattr(norm, epsilon))) for name, norm in norms.items()}
    scale = float(attention.scaling)
    return Block(linears, weights, attention.head_dim, scale, family.offset, family.woven, curve)  # type: ignore[arg-type]


def _inside(layer: Any) -> list[Any]:
    """The modules within a block; ``Module.modules`` takes ten times as long."""
    found = [layer]
    for module in found:
        found.extend(part for part in module._modules.values() if part is not None)
    return found[1:]


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
