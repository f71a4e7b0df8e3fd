"""The task's head alone trains; the model below it is read as it is.

Head().attach(model)            # a model with a head: task.name=classify
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weitiao.errors import InputError, t
from weitiao.methods.base import Method, save_plain, train_only

if TYPE_CHECKING:
    from torch import nn

    from weitiao.models.shape import Shape


class Head(Method):
    """A linear probe: classification, regression or a reward from frozen hidden states."""

    learning_rate: ClassVar[float] = 1e-3

    name: Literal["head"] = Field(default="head", description="the head of the task alone trains")

    def attach(self, model: Any) -> nn.Module:
        """Freeze everything but the head, which becomes float32."""
        from weitiao.models import shape

        train_only(model, self.base_names(shape.read(model.config)))
        return model

    def count(self, shape: Shape) -> int:
        """The head's parameters."""
        self.base_names(shape)
        return shape.head_parameters

    def base_names(self, shape: Shape) -> set[str]:
        """Names of the head's parameters; InputError for a model without a task's head."""
        if not shape.head:
            message = "method.name=head: a language model has no head of a task; it is for task.name=classify"
            raise InputError(t(message))
        return set(shape.head)

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """A plain model folder."""
        save_plain(model, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """What was saved is the whole model."""
        return model
