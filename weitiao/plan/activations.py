"""What autograd keeps of a forward pass, from the shape alone.

    found = tape(shape, method, "float32")
    found.kept_bytes(tokens=8 * 512, length=512, trained=700)

Counted per token of a micro-batch and block, by the roles of ``plan.blocks``. A block below the first one that trains
keeps nothing. Recomputation keeps each block's input and one whole block at a time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from weitiao.methods.base import Method
from weitiao.methods.lora import LoRA
from weitiao.models import kernels
from weitiao.models.block import without_padding
from weitiao.models.shape import Shape
from weitiao.plan.blocks import block_bytes, fused_bytes, square_bytes
from weitiao.train.logps import chunk_rows
from weitiao.train.memory import lean

FLOAT_BYTES = 4
HEAP_SHARE = 0.15  # where freed memory is kept: measured
NEW_SIZES = 0.4  # of an expert's numbers of tokens are not met before: measured
KERNELS, KERNEL_BYTES = 1024, 570_000  # oneDNN's cache and the size of one entry, measured


@dataclass(frozen=True)
class Tape:
    """Bytes that a forward pass keeps for the backward pass, per token (``_row_``: per trained token) or at once."""

    item_bytes: int  # one number in the compute dtype
    block_bytes: float  # one block, per token
    blocks: int  # how many blocks keep anything
    hidden_bytes: int  # one hidden state, per token
    square_bytes: int  # more of one block, per token and token of its row
    work_bytes: float  # gradients in flight while one block is worked on, per token
    heap_share: float  # what glibc's heap holds and cannot reuse, as a share of what all blocks keep
    weight_copies: int  # trained weights cast to the compute dtype, held until the backward pass
    sum_bytes: int  # experts with what an adapter adds, formed anew in every block
    head_row_bytes: int
    head_chunk_rows: int  # trained tokens whose logits are there at once
    head_chunk_row_bytes: int  # those of one token
    head_work_bytes: int  # the head's gradient, where it trains
    padded: bool = True  # padding is computed

    def kept_bytes(self, tokens: int, length: int, trained: int, recomputed: int = 0) -> int:
        """The peak over the weights and the optimiser of one micro-batch of ``tokens`` computed tokens in rows of
        ``length``, ``trained`` of them predicted, where so many blocks compute what they keep again."""
        recomputed = min(recomputed, self.blocks)
        squares = length * self.square_bytes
        block, every = self.block_bytes + squares, self.blocks * (self.block_bytes + squares)
        again = recomputed * self.hidden_bytes + block if recomputed else 0
        blocks = (self.blocks - recomputed) * block + again
        per_token = blocks + self.work_bytes + squares + 2 * self.hidden_bytes + self.heap_share * every
        sums = 1 + self.blocks - recomputed + bool(recomputed)  # and a gradient of one
        copies = self.weight_copies + self.sum_bytes * sums
        head = trained * self.head_row_bytes + self.logits_bytes(trained) + self.head_work_bytes
        return int(tokens * per_token + head + copies)

    def logits_bytes(self, trained: int) -> int:
        """The logits of one piece of so many trained tokens."""
        return min(trained, self.head_chunk_rows) * self.head_chunk_row_bytes

    def forward_bytes(self, tokens: int, length: int, trained: int) -> int:
        """The peak of the same pass when nothing is kept."""
        work = self.work_bytes + 2 * length * self.square_bytes
        return int(tokens * (work + 2 * self.hidden_bytes) + self.logits_bytes(trained) + self.sum_bytes)


def tape(shape: Shape, method: Method, dtype: str, fused: bool = False, memory: str = "auto") -> Tape:
    """What a step of ``method`` keeps of a model of this shape computed in ``dtype``; ``fused``: known blocks in one
    piece; ``memory``: as ``train.memory`` says."""
    item = 4 if dtype == "float32" else 2
    whole = fused_bytes(shape, method, item) if fused else None
    padded = whole is None or not without_padding(getattr(torch, dtype))
    names = method.base_names(shape)
    head = {name for name, size in shape.tensors.items() if size == (shape.vocab, shape.hidden)}
    trained_head = shape.vocab * shape.hidden if head & names else 0
    summed = method.chosen_experts(shape) if isinstance(method, LoRA) else []
    matrices = sum(linear.inputs * linear.outputs for linear in shape.linears if f"{linear.name}.weight" in names)
    piece_bytes = item if kernels.compiled() else item + 2 * FLOAT_BYTES  # a logit, and twice in float32
    return Tape(
        item_bytes=item,
        block_bytes=block_bytes(shape, method, item) if whole is None else whole,
        square_bytes=square_bytes(shape, item),
        blocks=kept_blocks(shape, method),
        hidden_bytes=shape.hidden * item,
        work_bytes=item * ((3 if whole is None else 4) * shape.intermediate + 2 * shape.hidden),
        heap_share=heap_share(lean(memory, padded)),
        weight_copies=0 if item == FLOAT_BYTES else item * matrices,
        sum_bytes=item * sum(stack.count * stack.inputs * stack.outputs for stack in summed) // shape.layers,
        head_row_bytes=2 * shape.hidden * item + 2 * FLOAT_BYTES,
        head_chunk_rows=chunk_rows(shape.vocab),
        head_chunk_row_bytes=piece_bytes * shape.vocab,
        head_work_bytes=2 * FLOAT_BYTES * trained_head,
        padded=padded,
    )


def heap_share(lean: bool) -> float:
    """Holes that glibc's heap is left with between the tensors that stay, as a share of all that blocks keep,
    recomputed or not; none where freed memory goes back at once (``train.memory.lean``)."""
    return 0.0 if lean or sys.platform != "linux" else HEAP_SHARE


def kernel_bytes(shape: Shape, method: Method, tape: Tape, lengths: int, batches: int) -> int:
    """What oneDNN keeps for bfloat16: it compiles a kernel for every product of a new size (``lengths`` of them) and
    keeps up to KERNELS. Each expert gets another number of tokens in every one of so many ``batches``. Where padding is
    not computed the products are our own."""
    if tape.item_bytes == FLOAT_BYTES or not tape.padded:
        return 0
    kinds = {(linear.inputs, linear.outputs) for linear in shape.linears}
    adapted = 3 * (len({inputs for inputs, _ in kinds}) + len({outputs for _, outputs in kinds}))
    products = 2 * len(kinds) + (adapted if getattr(method, "rank", 0) else len(kinds))
    stacks = {stack.name.rpartition(".")[2]: stack.count for stack in shape.experts}
    sent = batches * sum(stacks.values()) * (shape.layers + 2 * tape.blocks)
    return int(KERNEL_BYTES * min(KERNELS, products * lengths + NEW_SIZES * sent))


def kept_blocks(shape: Shape, method: Method) -> int:
    """Blocks from the first one with something to train to the last: what lies below needs no backward pass."""
    names = method.base_names(shape)
    for number, block in enumerate(shape.blocks):
        if not names or any(name.startswith(block + ".") for name in names):
            return shape.layers - number
    return 0
