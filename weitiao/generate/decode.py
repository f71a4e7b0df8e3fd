"""Known blocks over a cache of their own: for each new token one call of a compiled function, and no padding.

    decoder = Decoder.of(model, rows=2, tokens=99)  # None where the model, its adapters or this machine are others
    logits = decoder.prefill([[1, 5, 9], [1, 7]])   # [B, V]
    logits = decoder.step(torch.tensor([4, 8]))

transformers takes some thirty operations a block and token, each started from Python; for one row that is most of the
time. Here it is reading every weight once, nf4 as the codes that it is. The mathematics is that of ``models.whole``;
weights that are not bfloat16 are rounded to it when a decoder is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from weitiao import machine
from weitiao.methods.base import compute_dtype
from weitiao.methods.virtual import leading
from weitiao.models import kernels, modules, products
from weitiao.models.block import known_blocks
from weitiao.models.quantized import QuantizedLinear
from weitiao.models.whole import GATE_UP, QKV, Block, Linear, Rows, extend

PREFILL_TOKENS = 2048  # of prompts that are read at once: more are no faster, and take more memory
SPARE_TOKENS = 128  # room that the cache has ahead
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long a text is
DTYPE = torch.bfloat16


class Decoder:
    """Rows that are decoded together. Legend: B rows, V vocabulary, D width of a head."""

    def __init__(self, model: Any, blocks: list[Block], rows: int):
        body: Any = modules.backbone(model)
        self.blocks = [_rounded(block) for block in blocks]
        weights = [part.weight for block in self.blocks for part in block.linears.values()]
        self.scales = {id(one): one.block_scales() for one in weights if isinstance(one, QuantizedLinear)}
        self.embedding, self.rotary = body.embed_tokens.weight, body.rotary_emb
        self.norm = body.norm.weight.float(), float(body.norm.variance_epsilon)
        self.head: Tensor = modules.head(model).weight.to(DTYPE)  # type: ignore[operator]
        first, self.width = blocks[0].linears, blocks[0].width
        self.heads = _rows(first["k"]) // self.width
        self.groups = _rows(first["q"]) // _rows(first["k"])
        self.last = (modules.positions(model) or 1 << 30) - 1
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.angles = torch.empty(0, 0), torch.empty(0, 0)
        self.held: list[Tensor] = []  # what the description points to
        self.described = torch.empty(0, 62, dtype=torch.int64)

    @classmethod
    def of(cls, model: Any, rows: int, tokens: int) -> Decoder | None:
        """A decoder for so many rows of at most so many ``tokens``; None where transformers is to do it."""
        inner: Any = modules.inner(model)
        blocks = known_blocks(model)
        if not blocks or model.device.type != "cpu" or compute_dtype(model) != DTYPE or leading(model):
            return None
        parts = [part for block in blocks for part in block.linears.values()]
        weights = [_weight(part) for part in parts if not part.dropout]
        rounded = sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and weight.dtype != DTYPE)
        unknown = len(weights) < len(parts) or any(weight is None for weight in weights)
        if unknown or rounded * DTYPE.itemsize > machine.memory().available_bytes // 2:
            return None
        head, embedding = modules.head(model), inner.get_input_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and type(embedding) is nn.Embedding
        called = (*modules.blocks(model), embedding, modules.backbone(model), head)
        plain &= not any(module._forward_hooks or module._forward_pre_hooks for module in called)
        plain &= tokens <= (getattr(inner.config, "sliding_window", None) or tokens)
        rope = (getattr(inner.config, "rope_parameters", None) or {}).get("rope_type", "default")
        groups = _rows(blocks[0].linears["q"]) // _rows(blocks[0].linears["k"])
        plain &= all(block.plain for block in blocks)
        alike = len({(block.width, block.scale, block.norms["input"][1]) for block in blocks}) == 1
        there = products.decodes(blocks[0].width, groups, rows)
        return cls(model, blocks, rows) if plain and alike and there and rope in ROPE_TYPES else None

    def prefill(self, prompts: Sequence[Sequence[int]], shared: int = 0) -> Tensor:
        """Logits [B, V] after prompts, whose first ``shared`` tokens are the same and computed once."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self._room(int(lengths.max()) + SPARE_TOKENS)
        if shared:
            self._extend(0, [prompts[0][:shared]], 0, torch.tensor([shared]))
            for cache in (*self.keys, *self.values):
                cache[1:, :, :shared] = cache[:1, :, :shared]
        parts = [prompt[shared:] for prompt in prompts]
        states = [
            self._extend(first, parts[first:last], shared, lengths[first:last])
            for first, last in pairwise(cuts([*map(len, parts)]))
        ]
        self.lengths = lengths
        return self._logits(torch.cat(states))

    def _extend(self, first: int, parts: Sequence[Sequence[int]], before: int, lengths: Tensor) -> Tensor:
        """Run the ends of rows from row ``first`` on through the blocks, behind ``before`` tokens; the last hidden
        states [B, H]."""
        ids = torch.tensor([token for part in parts for token in part])
        starts = torch.tensor([0, *map(len, parts)]).cumsum(0)
        places = torch.cat([torch.arange(before, before + len(part)) for part in parts])
        rows = Rows(starts, *(angle[places][None] for angle in self.angles))
        states = self.embedding[ids].to(DTYPE)
        own = slice(first, first + len(parts))
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            states = extend(states, rows, block, keys[own], values[own], lengths, DTYPE)
        return states[starts[1:] - 1]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one more token of every row: int64 [B]."""
        if int(self.lengths.max()) >= self.keys[0].shape[2]:
            self._room(self.keys[0].shape[2] + SPARE_TOKENS)
        states = self.embedding[tokens].to(DTYPE)
        cosine, sine = (angle[self.lengths.clamp_max(self.last)] for angle in self.angles)
        shape = (self.heads, self.groups, self.width, self.keys[0].shape[2])
        first = self.blocks[0]
        products.decode(self.described, states, cosine, sine, self.lengths, first.norms["input"][1], first.scale, shape)
        self.lengths = self.lengths + 1
        return self._logits(states)

    def keep(self, index: Tensor) -> None:
        """Go on with these rows only."""
        self.lengths = self.lengths[index]
        self.keys = [cache[index] for cache in self.keys]
        self.values = [cache[index] for cache in self.values]
        self._describe()

    def _logits(self, states: Tensor) -> Tensor:
        normed, _, _ = kernels.norm(states, *self.norm, DTYPE)
        return products.few(normed, self.head)

    def _room(self, capacity: int) -> None:
        """Make place for rows of so many tokens."""
        shape = (len(self.lengths), self.heads, capacity, self.width)
        kept, place = [self.keys, self.values], slice(0, self.keys[0].shape[2] if self.keys else 0)
        made = [[torch.empty(shape, dtype=DTYPE) for _ in self.blocks] for _ in kept]
        for new, old in zip(made, kept, strict=True):
            for target, source in zip(new, old, strict=False):
                target[:, :, place] = source
        self.keys, self.values = made
        places = torch.arange(capacity).clamp_max(self.last)[None]
        turned = self.rotary(torch.empty(0, dtype=torch.float32), places)
        self.angles = tuple(part[0, :, : part.shape[-1] // 2].float().contiguous() for part in turned)  # type: ignore
        self._describe()

    def _describe(self) -> None:
        """The blocks as ``decode.c`` reads them."""
        self.held, lines = [], []
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            parts = [block.linears[name] for name in (*QKV, "o", *GATE_UP, "down")]
            linears = [number for part in parts for number in self._linear(part)]
            norms = [block.norms.get(name) for name in ("input", "output", "q", "k")]
            own = [self._pointer(None if norm is None else norm[0]) for norm in norms]
            lines.append([*linears, *own, self._pointer(keys), self._pointer(values)])
        self.described = torch.tensor(lines, dtype=torch.int64)

    def _linear(self, part: Linear) -> list[int]:
        weight: Any = part.weight
        scales = self.scales.get(id(weight))
        tensors = (weight if scales is None else weight.codes, part.bias, part.a, part.b)
        rank = 0 if part.a is None else len(part.a)
        return [*map(self._pointer, tensors), rank, _rows(part), _columns(part), self._pointer(scales)]

    def _pointer(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        assert tensor.is_contiguous()
        self.held.append(tensor)
        return tensor.data_ptr()


def cuts(lengths: Sequence[int]) -> list[int]:
    """Where rows are cut into parts of at most PREFILL_TOKENS, or of one row; 0 first and their number last."""
    found, tokens = [0], 0
    for row, length in enumerate(lengths):
        if row > found[-1] and tokens + length > PREFILL_TOKENS:
            found.append(row)
            tokens = 0
        tokens += length
    return [*found, len(lengths)]


def _weight(part: Linear) -> Tensor | QuantizedLinear | None:
    """What a linear is read as: its weight, or codes, as they are or spread out where that is kept; else None."""
    weight = part.weight
    if isinstance(weight, Tensor) or weight.whole_blocks:
        return weight
    return weight.plain if weight.plain is not None and weight.plain.dtype == DTYPE else None


def _rounded(block: Block) -> Block:
    """The block with tensors as ``decode.c`` reads them: norms and biases in float32, all else in bfloat16, and every B
    times its scale. Codes stay what they are."""
    linears = {
        name: Linear(
            weight.detach().to(DTYPE).contiguous() if isinstance(weight := _weight(part), Tensor) else part.weight,
            None if part.bias is None else part.bias.detach().float(),
            None if part.a is None else part.a.detach().to(DTYPE).contiguous(),
            None if part.b is None else (part.b.detach() * part.scale).to(DTYPE).contiguous(),
        )
        for name, part in block.linears.items()
    }
    norms = {name: (weight.detach().float(), epsilon) for name, (weight, epsilon) in block.norms.items()}
    return Block(linears, norms, block.width, block.scale)


def _rows(part: Linear) -> int:
    return part.weight.shape[0] if isinstance(part.weight, Tensor) else part.weight.out_features


def _columns(part: Linear) -> int:
    return part.weight.shape[1] if isinstance(part.weight, Tensor) else part.weight.in_features
