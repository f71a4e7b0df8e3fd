"""What one block of a model keeps of a forward pass for its backward pass, in bytes per token.

    block_bytes(shape, method, item=2)       # item: bytes of a number in the compute dtype
    fused_bytes(shape, method, item=2)       # the same in the training block
    square_bytes(shape, item=2)              # more for every token of the row, where attention is not fused

Read off what autograd keeps of every tiny family; ``tests/plan/test_activations.py`` holds the two together.
"""

from __future__ import annotations

import json
import re
from functools import cached_property

from weitiao.methods.base import Method
from weitiao.methods.lora import LoRA
from weitiao.models.block import FAMILIES
from weitiao.models.shape import Linear, Shape

FLOAT_BYTES, INDEX_BYTES = 4, 8
NORM = re.compile(r"(norm\w*|ln_?\d)\.weight$", re.IGNORECASE)
COMPOSED = {"gelu_new": 4}  # activation functions written as several products, each keeping what it multiplies
STEP_TENSORS = 11  # of the hidden width, in float32, that one step of RWKV's recurrence keeps
ROUTER_TENSORS = 6  # of one number for each expert a token is sent to: weights, indices, their order


def block_bytes(shape: Shape, method: Method, item: int) -> float:
    """What the last block keeps per token, T x T matrices apart."""
    block = Block(shape, method, item)
    return block.norms + block.attention + block.inner + block.experts + block.recurrence + block.inputs


def square_bytes(shape: Shape, item: int) -> int:
    """What it keeps per token and token of its row: the softmax in float32, and again in the compute dtype."""
    return shape.heads * (FLOAT_BYTES + item % FLOAT_BYTES) if shape.attention == "eager" else 0


def fused_bytes(shape: Shape, method: Method, item: int) -> int | None:
    """The same where ``models.block`` computes it; None where that does not know the family, or what the method makes
    of a block."""
    other = isinstance(method, LoRA) and method.dora
    if shape.model_type not in FAMILIES or not method.fuses or other:
        return None
    block = Block(shape, method, item)
    heads = 2 * block.q + 2 * block.k  # queries, keys, values and what comes of them
    gates = sum(linear.outputs for linear in block.linears if re.search(r"\.(gate|up|gate_up)_proj$", linear.name))
    head_norms = [name for name, size in block.gains.items() if size != (shape.hidden,)]
    own = FLOAT_BYTES * (shape.heads + shape.kv_heads) + item * (block.q + block.k) if head_norms else 0
    behind = sum(size == (shape.hidden,) for size in block.gains.values()) - 2  # norms that read a product
    own += behind * (item * shape.hidden + FLOAT_BYTES)
    embedded = any(shape.tensors[name] == (shape.vocab, shape.hidden) for name in block.trained)
    stream = 2 * shape.hidden * (FLOAT_BYTES if embedded else item)
    return item * (heads + gates + block.ranks) + own + stream + 2 * FLOAT_BYTES  # and 1 / rms of two norms


class Block:
    """The parts of a sum, each a role (h hidden, q = heads x head size, k the same for the key heads)."""

    def __init__(self, shape: Shape, method: Method, item: int):
        prefix = shape.blocks[-1] + "."
        self.shape, self.method, self.item = shape, method, item
        self.sizes = {n.removeprefix(prefix): size for n, size in shape.tensors.items() if n.startswith(prefix)}
        self.linears = [linear for linear in shape.linears if linear.name.startswith(prefix)]
        self.stacks = [stack for stack in shape.experts if stack.name.startswith(prefix)]
        self.gains = {name: size for name, size in self.sizes.items() if NORM.search(name)}
        self.q, self.k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.values = json.loads(shape.configuration)
        self.trained = method.base_names(shape)

    @cached_property
    def norms(self) -> int:
        """Their inputs and, where gains train, what those multiply. The sum that runs through all blocks is float32 as
        soon as anything trains whole; what a norm behind a product reads is not."""
        wide = sum(size == (self.shape.hidden,) for size in self.gains.values())
        ahead = self.shape.hidden * min(2, wide)
        behind = self.shape.hidden * (wide - min(2, wide)) + (self.q + self.k) * (wide < len(self.gains))
        if any(name.replace(".weight", ".bias") in self.sizes for name in self.gains):
            kept = (ahead + behind) * (FLOAT_BYTES if self.trained else self.item)
        else:  # RMSNorm computes in float32 and keeps that
            kept = (ahead + behind) * FLOAT_BYTES
            kept += ahead * FLOAT_BYTES + behind * self.item if self.trained else 0
        return kept + 2 * FLOAT_BYTES * len(self.gains)

    @cached_property
    def attention(self) -> int:
        """Queries, keys, values and what comes of them, the next product's input. Of one product for all three, what is
        not turned stays behind; queries put together from a turned and a plain part make the output a copy."""
        rotary = self.values.get("rope_parameters") or {}
        numbers = 2 * self.q + 2 * self.k
        if rotary and any(linear.outputs == self.q + 2 * self.k for linear in self.linears):
            numbers += self.q + self.k
        if "partial_rotary_factor" in rotary:
            numbers += self.q
        return self.item * numbers + (FLOAT_BYTES * self.shape.heads if self.shape.attention == "fused" else 0)

    @cached_property
    def inner(self) -> int:
        """The activation function's input, and where it gates, both factors; a gate of one number keeps its factor."""
        later = [linear for linear in self.linears if self._part(linear.name) != self._part(self.linears[0].name)]
        width = next((linear.inputs for linear in reversed(later) if linear.outputs == self.shape.hidden), 0)
        gated = any("gate" in linear.name for linear in later)
        function = self.values.get("activation_function") or self.values.get("hidden_act")
        kept = width * (3 if gated else COMPOSED.get(function, 1))
        return self.item * (kept + self.shape.hidden * any(linear.outputs == 1 for linear in later))

    @cached_property
    def experts(self) -> int:
        """The same for each of the experts that a token is sent to, and what the router's share multiplies."""
        if not self.stacks:
            return 0
        first, last = self.stacks[0], self.stacks[-1]
        trained = last.name in self.trained
        item = FLOAT_BYTES if trained else self.item
        numbers = first.outputs + last.outputs + (last.inputs if first.outputs != last.inputs else 0)
        numbers += (first.inputs + last.inputs) if trained else 0
        kept = self.shape.experts_per_token * (item * numbers + ROUTER_TENSORS * INDEX_BYTES) + FLOAT_BYTES * last.count
        return kept

    @cached_property
    def recurrence(self) -> int:
        """What the steps of a recurrence keep, and what mixes a token with the one before it, where that trains."""
        if self.shape.attention != "recurrent":
            return 0
        mixed = 4 * FLOAT_BYTES if self.trained else 0
        cast = self.item * (3 if self.item < FLOAT_BYTES else 2)  # what passes between the products and the steps
        return self.shape.hidden * (STEP_TENSORS * FLOAT_BYTES + mixed + cast)

    @cached_property
    def inputs(self) -> int:
        """The inputs of every product whose weight or adapter trains, and what passes between an adapter's two."""
        linears = self.adapted if isinstance(self.method, LoRA) else self.linears
        kept = self.item * self.ranks
        if self.shape.attention != "recurrent":  # what attention says is counted there
            said = [linear for linear in self.linears if self._part(linear.name) == self._part(self.linears[0].name)]
            linears = [linear for linear in linears if linear != said[-1]]
        found = [(self._reads(linear.name, linear.inputs), linear.inputs) for linear in linears]
        if any(stack.name in self.trained for stack in self.stacks):  # their router trains too
            found.append((self._reads(self.stacks[0].name, self.shape.hidden), self.shape.hidden))
        # products of one input share it; computed in bfloat16, each casts the norm's float32 output
        shared = (self.item == FLOAT_BYTES or not self.trained) and self.shape.attention != "recurrent"
        found = list(dict.fromkeys(found)) if shared else found
        return kept + self.item * sum(size for _, size in found)

    @cached_property
    def adapted(self) -> list[Linear]:
        """The linears with a LoRA beside them."""
        if not isinstance(self.method, LoRA):
            return []
        targets = set(self.method.targets(self.shape)[0])
        return [linear for linear in self.linears if linear.name in targets]

    @property
    def ranks(self) -> int:
        """What passes between the two matrices of every LoRA."""
        return getattr(self.method, "rank", 0) * len(self.adapted)

    def _part(self, name: str) -> str:
        """The part of the block that holds a module: attention, MLP."""
        return name.split(".")[len(self.shape.blocks[-1].split("."))]

    def _reads(self, name: str, inputs: int) -> str:
        """What stands for a product's input: its part, or nothing where one norm feeds all of the block (Phi)."""
        return "" if len(self.gains) == 1 and inputs == self.shape.hidden else self._part(name)
