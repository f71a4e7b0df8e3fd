"""Every parameter trains.

Full().attach(model)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from weitiao.methods.base import Method, save_plain, train_only

if TYPE_CHECKING:
    from torch import nn

    from weitiao.models.shape import Shape


class Full(Method):
    """Full tuning: every parameter trains, held in float32."""

    learning_rate: ClassVar[float] = 5e-5

    name: Literal["full"] = Field(default="full", description="every parameter trains")

    def attach(self, model: nn.Module) -> nn.Module:
        """Make every parameter float32 and trainable."""
        train_only(model, {name for name, _ in model.named_parameters()})
        return model

    def count(self, shape: Shape) -> int:
        """All of them."""
        return shape.parameters

    def base_names(self, shape: Shape) -> set[str]:
        """All of them."""
        return set(shape.tensors)

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """A plain model folder."""
        save_plain(model, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """What was saved is the whole model."""
        return model
