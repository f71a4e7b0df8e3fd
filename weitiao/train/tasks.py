"""Tasks: what is learnt from which rows. A task is a row type, a pure loss, and how documents become rows.

task = TaskOptions(name="pretrain", pack_tokens=512).build()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from weitiao.config import Options
from weitiao.data.rows import Chat, Labelled, Text
from weitiao.errors import t
from weitiao.models.heads import scores
from weitiao.train.losses import classification, nll

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weitiao.data.batch import Batch


class TaskOptions(Options):
    """What the model learns."""

    name: Literal["pretrain", "sft", "classify"] = Field(
        default="sft",
        description="pretrain: every token of plain text; sft: the assistant's turns of conversations; classify: the "
        "label of a text",
    )
    pack_tokens: int | None = Field(
        default=None,
        ge=2,
        description="pretrain only: lay documents end to end and cut them into rows of this many tokens, so that no "
        "padding is computed; null: a row is a document",
    )

    labels: tuple[str, ...] = Field(
        default=(), description="classify only: the labels in their order; none: those of the rows, sorted"
    )
    kind: Literal["auto", "single", "multi", "regression"] = Field(
        default="auto",
        description="classify only: one label a text, any number, or a number to predict; auto: as the rows have it",
    )

    @model_validator(mode="after")
    def _fits_the_task(self) -> TaskOptions:
        if self.pack_tokens is not None and self.name != "pretrain":
            raise ValueError(t("pack_tokens is for task.name=pretrain: conversations are not laid end to end"))
        if self.name != "classify" and (self.labels or self.kind != "auto"):
            raise ValueError(t("labels and kind are for task.name=classify"))
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(t("labels: one of them is there twice"))
        return self

    def build(self) -> Task:
        """The task that these options name."""
        return replace(TASKS[self.name], pack_tokens=self.pack_tokens)


@dataclass(frozen=True)
class Task:
    """``loss(outputs, targets) -> sum over trained tokens``, where ``outputs`` are what the model says of a batch and
    ``targets`` names what the batch says of them; ``needs_reference``: it also needs the logps of the model before
    tuning."""

    name: str
    row: type
    outputs: Callable[[nn.Module, Batch], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    targets: Literal["mask", "labels"] = "mask"
    needs_reference: bool = False
    pack_tokens: int | None = None

    def total(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed loss of a batch."""
        return self.loss(self.outputs(model, batch), getattr(batch, self.targets))


def _logps(model: nn.Module, batch: Batch) -> Tensor:
    """Rows are padded on the right, where a causal model never looks, so no attention mask is needed and the fastest
    attention kernel is taken."""
    from weitiao.train.logps import token_logps

    return token_logps(model, batch.ids, None, batch.mask, batch.attention.sum(1))


def _scores(model: nn.Module, batch: Batch) -> Tensor:
    return scores(model, batch.ids, batch.attention)


TASKS = {
    "pretrain": Task("pretrain", Text, _logps, nll),
    "sft": Task("sft", Chat, _logps, nll),
    "classify": Task("classify", Labelled, _scores, classification, "labels"),
}
