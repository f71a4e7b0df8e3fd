"""How the weights are changed, for how long, and what is kept.

TrainOptions(epochs=3, learning_rate=1e-4)
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from weitiao.config import Options
from weitiao.errors import t

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(MiB|GiB)$")]
Cadence = Literal["epoch", "none"] | Count


class TrainOptions(Options):
    """How the weights are changed, for how long, and what is kept."""

    epochs: float = Field(default=3, gt=0, description="times that every row is seen")
    max_steps: int | None = Field(
        default=None, ge=1, description="stop after this many steps, if epochs would take more"
    )
    batch_size: int = Field(default=8, ge=1, description="rows per optimiser step; how they are cut changes no result")
    micro_batch_tokens: Literal["auto"] | Count = Field(
        default="auto", description="padded tokens computed at once; fewer need less memory"
    )
    learning_rate: float = Field(
        default=2e-4,
        gt=0,
        description="the highest learning rate, after warm-up; a recipe's default is its method's own (docs: methods), "
        "and 6e-4 for a new model",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="the learning rate after warm-up: constant, or falling along a line or half a cosine",
    )
    minimum_rate: float = Field(
        default=0.0, ge=0, le=1, description="where the schedule ends, as a share of learning_rate"
    )
    warmup_steps: int = Field(
        default=20, ge=0, description="steps over which the rate rises; at most half of all steps"
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "sgd", "lion", "muon"] = Field(
        default="adamw",
        description="adamw; adamw8bit: its moments in a quarter of the memory; adafactor: next to no state; sgd: with "
        "betas' first as momentum; lion: one moment, a tenth of adamw's rate; muon: linears' weights move along an "
        "orthogonal matrix, which takes fewer steps when much is to be learnt",
    )
    paged_optimizer: bool = Field(
        default=False,
        description="keep the optimiser's state in a file in the run folder (for a GPU, in the host's memory), where "
        "it is read and written one parameter at a time: less memory, slower steps, the same result; not for "
        "adafactor, which has next to no state",
    )
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="AdamW: decay of the first and second moment")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW: added to the root of the second moment")
    weight_decay: float = Field(
        default=0.0, ge=0, description="decoupled decay of matrices; biases and norms do not decay"
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="gradients longer than this are shortened; null: never"
    )
    evaluate_every: Cadence = Field(
        default="epoch", description="epoch, a number of steps, or none; the last step counts"
    )
    save_every: Cadence = Field(
        default="epoch", description="epoch, a number of steps, or none; the last step is always saved"
    )
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept, beside the best")
    best: str | None = Field(
        default="loss",
        description="validation measure whose best checkpoint becomes the result: loss (lowest) or an evaluator's "
        "(highest); null: the last step",
    )
    memory: Literal["auto", "low", "fast"] | Size = Field(
        default="auto",
        description="low: compute activations twice instead of keeping them; auto: only where they would not fit; "
        "fast: never; a size such as 4GiB or 900MiB: those of as many blocks as it takes for the plan's peak to stay "
        "below it",
    )
    engine: Literal["auto", "plain"] = Field(
        default="auto",
        description="auto: blocks of Llama's kind run in one piece on a CPU, equal up to rounding and faster; plain: "
        "transformers' own modules",
    )
    trunk: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: what the lowest blocks make of the rows, if nothing trains in them, is kept in the run "
        "folder while the run lasts, so that only the first epoch computes it; off: every epoch does",
    )
    shared_prefixes: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="auto: what rows of a micro-batch begin with in common (a system prompt, tools) is computed once "
        "where that changes no result, that is, without dropout; on: with dropout too, of which they then share the "
        "draw; off: every row computes it",
    )
    distributed: Literal["auto", "none", "ddp", "fsdp2"] = Field(
        default="auto",
        description="how processes that torchrun has started share the rows of a step (docs: several); none: one "
        "process; ddp: each holds everything and gradients are summed; fsdp2: weights, gradients and the optimiser's "
        "state are divided, for models that no device holds; auto: ddp under torchrun, else none",
    )
    process_timeout: float = Field(
        default=1800,
        gt=0,
        description="seconds that processes wait for one another before the run ends; the first alone reads the rows, "
        "and measures",
    )
    bad_rows: Literal["skip", "stop"] = Field(
        default="skip",
        description="when steps stay bad (a loss, gradient or weight that is no finite number, or leaps), skip: back "
        "to the last checkpoint and on without the rows at fault; stop: end. Both write them to bad_rows.jsonl",
    )
    seed: int = Field(default=0, ge=0, description="order of the rows, dropout, initial adapter weights")

    @model_validator(mode="after")
    def _has_state_to_page(self) -> TrainOptions:
        if self.paged_optimizer and self.optimizer == "adafactor":
            raise ValueError(t("paged_optimizer: adafactor keeps next to no state; leave one of the two out"))
        return self
