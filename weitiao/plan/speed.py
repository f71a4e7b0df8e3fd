"""How long a micro-batch takes: matrix products at the machine's measured rate, memory traffic, operations started.

cost = Cost.of(shape, method, tape, facts, again=0.0)
cost.micro_batch_seconds(tokens=8 * 512, length=512, trained=700)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weitiao.methods.base import Method
from weitiao.models.shape import Shape
from weitiao.plan.activations import Tape
from weitiao.train.optim import own_flops

if TYPE_CHECKING:
    from weitiao.plan.need import Facts

START_SECONDS = 8e-6  # one operation of torch from Python, forward or backward, on a core of a few GHz: measured
BLOCK_OPERATIONS = 120  # of one block, forward and backward
STEP_OPERATIONS = 32  # what one step of a recurrence takes in a block, forward and backward: measured
ADAPTER_OPERATIONS = 20  # more for each adapted matrix product
THIN_WIDTH = 64  # a product with fewer inner numbers takes about as long as one with these: measured
ADAPTER_PASSES = (
    12  # times that what goes into and comes out of an adapted product moves through memory for the adapter
)
PASSES = 4  # times that what is kept moves through memory: written and read in both directions
ADAMW_BYTES = 28  # per trained number and step: weight, gradient and both moments, read and written


@dataclass(frozen=True)
class Cost:
    """What a step's time is made of."""

    product_flops: float  # forward, per token
    adapter_flops: float  # forward and backward, per token
    head_flops: float  # forward, per trained token
    attention_flops: float  # forward, per token and token of its row
    backward: float  # backward products per forward product
    head_backward: float
    moved_bytes: float  # per token
    start_seconds: float  # per micro-batch
    step_seconds: float  # per token of a row, for a recurrence, which goes one step after another
    optimiser_seconds: float  # per step
    flops_per_second: float
    bytes_per_second: float

    @classmethod
    def of(cls, shape: Shape, method: Method, tape: Tape, facts: Facts, again: float, optimizer: str = "adamw") -> Cost:
        """The cost of training a model of this shape by ``method`` on the machine of ``facts``."""
        adapter, trained = method.adds, method.count(shape)
        share = 0.0 if adapter else min(trained / shape.parameters, 1.0)  # of the weights that need a gradient
        through = tape.blocks / shape.layers  # of the blocks that the backward pass reaches
        rank = getattr(method, "rank", 0)
        widths = trained / rank if adapter and rank else 0.0  # sum of inputs and outputs of the adapted products
        stepped = shape.attention == "recurrent"
        operations = shape.layers * BLOCK_OPERATIONS + (ADAPTER_OPERATIONS * len(shape.linears) if adapter else 0)
        return cls(
            product_flops=2.0 * shape.products,
            adapter_flops=6.0 * widths * max(rank, THIN_WIDTH),
            head_flops=2.0 * shape.vocab * shape.hidden,
            attention_flops=0.0 if stepped else 2.0 * shape.heads * shape.head_dim * shape.layers,  # over half a row
            backward=through * (1.0 + again) + share,
            head_backward=1.0 + (share == 1.0),
            moved_bytes=PASSES * tape.block_bytes * shape.layers + ADAPTER_PASSES * widths * tape.item_bytes,
            start_seconds=operations * START_SECONDS * (1.0 + again / 3),
            step_seconds=stepped * shape.layers * STEP_OPERATIONS * START_SECONDS * (1.0 + again / 3),
            optimiser_seconds=trained * ADAMW_BYTES / facts.bytes_per_second
            + own_flops(optimizer, trained_linears(shape, method)) / (facts.gflops * 1e9),
            flops_per_second=facts.gflops * 1e9,
            bytes_per_second=facts.bytes_per_second,
        )

    def micro_batch_seconds(self, tokens: int, length: int, trained: int, kept: float = 0.0) -> float:
        """Forward and backward of ``tokens`` in rows of ``length``, ``trained`` of them predicted; ``kept``: the share
        of the blocks whose outputs are there already."""
        ahead = 1.0 - kept
        flops = tokens * (self.product_flops * (ahead + self.backward) + self.adapter_flops)
        flops += tokens * length * self.attention_flops * (ahead + 2.5 * min(self.backward, 1.0))
        flops += trained * self.head_flops * (1.0 + self.head_backward)
        started = self.start_seconds + length * self.step_seconds
        return flops / self.flops_per_second + ahead * (tokens * self.moved_bytes / self.bytes_per_second + started)

    def forward_seconds(self, tokens: int, length: int, trained: int) -> float:
        """The same without a backward pass."""
        flops = tokens * (self.product_flops + length * self.attention_flops) + trained * self.head_flops
        started = self.start_seconds + length * self.step_seconds
        return flops / self.flops_per_second + (tokens * self.moved_bytes / self.bytes_per_second + started) / 3


def trained_linears(shape: Shape, method: Method) -> list[tuple[int, int]]:
    """Outputs and inputs of the base's linears that train themselves."""
    names = method.base_names(shape)
    return [(linear.outputs, linear.inputs) for linear in shape.linears if f"{linear.name}.weight" in names]
