"""Virtual tokens: vectors that train in front of every input, for prompt tuning, P-tuning and prefix tuning.

    attach(model, Vectors(torch.randn(20, 64)))            # k inputs [k, H] before the tokens' own
    attach(model, Vectors(torch.zeros(20, 512)), prefix=True)    # k keys and values for every layer [k, 2·L·K]
    leading(model)                                         # 20: slots of the cache that come before the first token

Hooks on the backbone put the vectors in front and cut their outputs off again, so that training, generation and
evaluation see a plain model. A cache holds the vectors' keys and values like those of any other token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from weitiao.errors import InputError, t
from weitiao.methods.adapters import WEIGHTS, read_config, task_of
from weitiao.methods.base import train_only
from weitiao.models import modules

MODULE = "virtual_tokens"
SAVED = "prompt_embeddings"  # PEFT's name of the vectors in the file
CACHE = "past_key_values"
BASE = "base_model."  # and what stands there before the names of a head's tensors


class Vectors(nn.Module):
    """``k`` vectors [k, width] that train as they are."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.weight = nn.Parameter(start.float())

    def forward(self) -> Tensor:
        """[k, width]"""
        return self.weight


class Encoded(nn.Module):
    """Vectors [k, inputs] that pass through ``network`` on their way; ``recurrent`` comes before it."""

    def __init__(self, count: int, inputs: int, network: nn.Module, recurrent: nn.LSTM | None = None):
        super().__init__()
        self.embedding = nn.Embedding(count, inputs)
        self.network, self.recurrent = network, recurrent

    def forward(self) -> Tensor:
        """[k, width]"""
        vectors = self.embedding.weight
        if self.recurrent is not None:
            vectors = self.recurrent(vectors[None])[0][0]
        return self.network(vectors)


def encoder(kind: str, count: int, width: int, inner: int, layers: int) -> nn.Module:
    """The prompt encoder of P-tuning, as PEFT has it: an MLP, or a bidirectional LSTM with two linears behind it."""
    if kind == "mlp":
        steps = (nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width))
        return Encoded(count, width, nn.Sequential(*steps))
    recurrent = nn.LSTM(width, inner, num_layers=layers, bidirectional=True, batch_first=True)
    network = nn.Sequential(nn.Linear(2 * inner, 2 * inner), nn.ReLU(), nn.Linear(2 * inner, width))
    return Encoded(count, width, network, recurrent)


def prefix(model: Any, count: int, inner: int) -> nn.Module:
    """The keys and values of prefix tuning: those of tokens drawn from the vocabulary, so that training starts from
    states the layers know, or a small network's output [count, 2·L·K]."""
    heads, width = kv_heads(model.config)
    states = 2 * len(modules.blocks(model)) * heads * width
    if inner:
        network = nn.Sequential(nn.Linear(heads * width, inner), nn.Tanh(), nn.Linear(inner, states))
        return Encoded(count, heads * width, network)
    weight = modules.embedding(model).weight
    ids = torch.randint(0, len(weight), (1, count), device=weight.device)
    cache = DynamicCache()
    with torch.no_grad():
        modules.backbone(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers[: len(modules.blocks(model))]  # what follows holds no keys and values
    pairs = [state[0] for layer in layers for state in (layer.keys, layer.values)]  # [heads, count, head_dim]
    return Vectors(torch.stack(pairs).permute(2, 0, 1, 3).reshape(count, states))


class Holder(nn.Module):
    """What :func:`attach` puts on a model: the vectors' source, their number, and where they go."""

    def __init__(self, source: nn.Module, count: int, prefix: bool, layers: int):
        super().__init__()
        self.source, self.count, self.prefix, self.layers = source, count, prefix, layers
        self.enabled = True
        self.pass_cache: Cache | None = None  # what the blocks read in the present pass


def attach(model: Any, source: nn.Module, prefix: bool = False) -> nn.Module:
    """Freeze ``model`` and put what ``source()`` returns before every input; only the source trains."""
    train_only(model, set())
    with torch.no_grad():
        count = source().shape[0]
    holder = Holder(source.to(model.device), count, prefix, len(modules.blocks(model)))
    model.add_module(MODULE, holder)
    body = modules.backbone(model)
    body.register_forward_pre_hook(_Before(holder, model), with_kwargs=True)
    body.register_forward_hook(_After(holder), with_kwargs=True)
    for block in modules.blocks(model) if prefix else ():
        # transformers takes caches from layers that are computed again, unless they only read them: ``Prefixed``
        block._can_checkpoint_with_cache = True  # type: ignore[assignment]
        block.register_forward_pre_hook(_GiveBack(holder), with_kwargs=True)
    return model


def held(model: Any) -> Holder | None:
    """The virtual tokens of a model, or None."""
    return getattr(modules.inner(model), MODULE, None)


def leading(model: Any) -> int:
    """How many virtual tokens stand before the first real one; 0 for a model without, or with them switched off."""
    holder = held(model)
    return holder.count if holder is not None and holder.enabled else 0


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """The base as it is, inside the block."""
    holder: Any = held(model)
    holder.enabled = False
    try:
        yield
    finally:
        holder.enabled = True


class _Before:
    """Puts the virtual tokens in front, where the cache does not hold them yet."""

    def __init__(self, holder: Holder, model: Any):
        self.holder, self.model = holder, model

    def __call__(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        holder, cache = self.holder, kwargs.get("past_key_values")
        if not holder.enabled or kwargs.get("state") is not None or (cache is not None and cache.get_seq_length()):
            return args, kwargs
        ids = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds")
        rows, length = (ids if inputs is None else inputs).shape[:2]  # type: ignore[union-attr]
        vectors, kwargs = holder.source(), dict(kwargs)
        self._mask(kwargs, rows, length, vectors.device)
        if holder.prefix:
            kwargs["past_key_values"] = self._filled(cache, vectors, rows)
            if cache is None:
                kwargs["use_cache"] = False
            return args, kwargs
        inputs = self.model.get_input_embeddings()(ids) if inputs is None else inputs
        front = vectors.to(inputs.dtype).expand(rows, -1, -1)
        kwargs |= {"input_ids": None, "inputs_embeds": torch.cat((front, inputs), dim=1)}
        if (place := kwargs.get("position_ids")) is not None:
            first = torch.arange(holder.count, device=place.device).expand(place.shape[0], -1)
            kwargs["position_ids"] = torch.cat((first, place), dim=1)
        return (), kwargs

    def _mask(self, kwargs: dict[str, Any], rows: int, length: int, device: torch.device) -> None:
        """Let every token see the virtual ones; a mask that already counts them is left as it is."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] == length:
            seen = torch.ones(rows, self.holder.count, dtype=mask.dtype, device=device)
            kwargs["attention_mask"] = torch.cat((seen, mask), dim=1)

    def _filled(self, cache: Cache | None, vectors: Tensor, rows: int) -> Cache:
        """``cache``, or one for this pass alone, with the prefix of every layer."""
        pairs = split(vectors.to(self._dtype()), self.holder.layers, self.model.config)
        if cache is None:
            cache = Prefixed([(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in pairs])
            self.holder.pass_cache = cache
            return cache
        for layer, (keys, values) in enumerate(pairs):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    def _dtype(self) -> torch.dtype:
        device = self.model.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.model.get_input_embeddings().weight.dtype


class _GiveBack:
    """Hands a block the cache that GPT-2 itself takes away from blocks that are computed again."""

    def __init__(self, holder: Holder):
        self.holder = holder

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [*inspect.signature(block.forward).parameters]
        place = names.index(CACHE) if CACHE in names else len(args)
        if self.holder.pass_cache is None or place >= len(args) or args[place] is not None:
            return None
        return (*args[:place], self.holder.pass_cache, *args[place + 1 :]), kwargs


class _After:
    """Cuts the outputs of the virtual tokens off."""

    def __init__(self, holder: Holder):
        self.holder = holder

    def __call__(self, body: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        given, self.holder.pass_cache = kwargs.get("inputs_embeds"), None
        if self.holder.prefix or not self.holder.enabled or given is None:
            return output
        output.last_hidden_state = output.last_hidden_state[:, self.holder.count :]
        return output


class Prefixed(DynamicCache):
    """A cache for one pass without a past: it lays its prefix before what a layer computes and keeps nothing, so that a
    layer that is computed again in the backward pass finds what it found the first time."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.layers = [_PrefixLayer(keys, values) for keys, values in pairs]


class _PrefixLayer(DynamicLayer):
    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.front = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The prefix and [B, heads, T, head_dim] after it."""
        keys, values = self.front
        return torch.cat((keys, key_states), dim=-2), torch.cat((values, value_states), dim=-2)


def split(vectors: Tensor, layers: int, config: Any) -> list[tuple[Tensor, Tensor]]:
    """[k, 2·L·K] -> for every layer keys and values [1, heads, k, head_dim], in PEFT's order: layer by layer, keys
    before values, K = heads · head_dim."""
    heads, width = kv_heads(config)
    parts = vectors.view(len(vectors), 2 * layers, heads, width).permute(1, 2, 0, 3)
    return [(parts[2 * layer][None], parts[2 * layer + 1][None]) for layer in range(layers)]


def kv_heads(config: Any) -> tuple[int, int]:
    """Number and width of the key-value heads that a cache of this model holds."""
    config = config.get_text_config(decoder=True)
    queries = getattr(config, "num_attention_heads", 1)  # a model with a state has none
    heads = getattr(config, "num_key_value_heads", None) or queries
    return heads, getattr(config, "head_dim", None) or config.hidden_size // queries


def save(model: Any, folder: Path, base: str, config: Any) -> None:
    """PEFT's two files, described by ``config``, one of PEFT's own; of what produced the vectors only they are kept."""
    from safetensors.torch import save_file

    holder: Any = held(model)
    heads, width = kv_heads(model.config)
    config.inference_mode, config.base_model_name_or_path = True, base
    for name, value in task_of(model).items():
        setattr(config, name, value)
    config.num_virtual_tokens, config.num_transformer_submodules = holder.count, 1
    config.num_layers, config.num_attention_heads = holder.layers, heads
    config.token_dim = heads * width if holder.prefix else modules.embedding(model).embedding_dim
    with torch.no_grad():
        head = {BASE + name: tensor for name, tensor in modules.head_tensors(model).items()}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in ({SAVED: holder.source()} | head).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load(model: Any, folder: Path, kind: str, prefix: bool = False) -> nn.Module:
    """``model`` with the vectors saved in ``folder``, ours or PEFT's; InputError unless they fit."""
    from safetensors.torch import load_file

    values = read_config(folder, kind)
    tensors = load_file(folder / WEIGHTS)
    if SAVED not in tensors:
        raise InputError(t("{path}: the tensor {name} is missing", path=folder / WEIGHTS, name=SAVED))
    vectors = tensors[SAVED]
    heads, width = kv_heads(model.config)
    blocks = len(modules.blocks(model))
    wanted = 2 * blocks * heads * width if prefix else modules.embedding(model).embedding_dim
    if vectors.ndim != 2 or vectors.shape[1] != wanted or len(vectors) != values["num_virtual_tokens"]:
        message = (
            "{path}: the adapter was made for {base} and does not fit {model}: {found} numbers a token, not {wanted}"
        )
        base, found = values.get("base_model_name_or_path"), vectors.shape[-1]
        raise InputError(t(message, path=folder, base=base, model=model.name_or_path, found=found, wanted=wanted))
    attached = attach(model, Vectors(vectors), prefix)
    for name, tensor in modules.head_tensors(model).items():
        if (found := tensors.get(BASE + name)) is None or found.shape != tensor.shape:
            raise InputError(
                t("{path}: the head's tensor {name} is missing or of another size", path=folder, name=name)
            )
        tensor.copy_(found)
    return attached
