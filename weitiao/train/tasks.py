"""Tasks: what is learnt from which rows. A task is a row type, a pure loss, and how documents become rows.

task = TaskOptions(name="pretrain", pack_tokens=512).build()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from weitiao.config import Options
from weitiao.data.rows import Chat, Text
from weitiao.errors import t
from weitiao.train.losses import nll

if TYPE_CHECKING:
    from torch import Tensor


class TaskOptions(Options):
    """What the model learns."""

    name: Literal["pretrain", "sft"] = Field(
        default="sft", description="pretrain: every token of plain text; sft: the assistant's turns of conversations"
    )
    pack_tokens: int | None = Field(
        default=None,
        ge=2,
        description="pretrain only: lay documents end to end and cut them into rows of this many tokens, so that no "
        "padding is computed; null: a row is a document",
    )

    @model_validator(mode="after")
    def _packs_documents_only(self) -> TaskOptions:
        if self.pack_tokens is not None and self.name != "pretrain":
            raise ValueError(t("pack_tokens is for task.name=pretrain: conversations are not laid end to end"))
        return self

    def build(self) -> Task:
        """The task that these options name."""
        return replace(TASKS[self.name], pack_tokens=self.pack_tokens)


@dataclass(frozen=True)
class Task:
    """``loss(logps [N], mask [B, T]) -> sum over trained tokens``; ``needs_reference``: it also needs the logps of the
    model before tuning."""

    name: str
    row: type
    loss: Callable[[Tensor, Tensor], Tensor]
    needs_reference: bool = False
    pack_tokens: int | None = None


TASKS = {
    "pretrain": Task("pretrain", Text, nll),
    "sft": Task("sft", Chat, nll),
}
