"""Prefix tuning (Li and Liang, arXiv 2101.00190; in this form P-Tuning v2, arXiv 2110.07602): every layer attends to a
few keys and values that train, before those of the tokens.

PrefixTuning(tokens=16).attach(model)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weitiao.errors import InputError, t
from weitiao.methods.base import Method
from weitiao.methods.prompt_tuning import NO_MERGE

if TYPE_CHECKING:
    from torch import nn

    from weitiao.models.shape import Shape


class PrefixTuning(Method):
    """``tokens`` keys and values train for each layer; the model is frozen."""

    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    adds: ClassVar[bool] = True
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    fuses: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2

    name: Literal["prefix_tuning"] = Field(
        default="prefix_tuning", description="virtual keys and values in every layer (Li and Liang 2021; P-Tuning v2)"
    )
    tokens: int = Field(default=16, ge=1, description="how many virtual tokens")
    projection: int = Field(
        default=0, ge=0, description="inner width of a network that produces them while they are learnt; 0: none"
    )

    @classmethod
    def described(cls, values: Mapping[str, Any]) -> PrefixTuning:
        """The method of PEFT's configuration."""
        return cls(tokens=values["num_virtual_tokens"])

    def attach(self, model: Any) -> nn.Module:
        """Freeze ``model`` and let every layer see the prefix."""
        from weitiao.methods import virtual
        from weitiao.models import shape

        _check(shape.read(model.config))
        return virtual.attach(model, virtual.prefix(model, self.tokens, self.projection), prefix=True)

    def count(self, shape: Shape) -> int:
        """tokens · 2 · layers · key-value width, or the weights of the network that produces them."""
        _check(shape)
        states = 2 * shape.layers * shape.kv_heads * shape.head_dim
        if not self.projection:
            return self.tokens * states + shape.head_parameters
        width = shape.kv_heads * shape.head_dim
        network = (width + 1) * self.projection + (self.projection + 1) * states
        return self.tokens * width + network + shape.head_parameters

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The model without its virtual tokens, inside the block."""
        from weitiao.methods import virtual

        return virtual.disabled(model)

    def merge(self, model: nn.Module) -> nn.Module:
        """InputError: there is nothing in the weights that could hold them."""
        raise InputError(t(NO_MERGE, name=self.name))

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """PEFT's format of prefix tuning: the keys and values themselves."""
        from peft import PrefixTuningConfig

        from weitiao.methods import virtual

        virtual.save(model, folder, base, PrefixTuningConfig(prefix_projection=False))

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """``model`` with the saved keys and values before every layer's own."""
        from weitiao.methods import virtual

        return virtual.load(model, folder, "PREFIX_TUNING", prefix=True)


def _check(shape: Shape) -> None:
    """InputError for a family without a cache of keys and values."""
    if shape.kind != "causal" or shape.attention == "recurrent":
        message = "method.name=prefix_tuning: {type} has no cache of keys and values that a prefix could stand in"
        raise InputError(t(message, type=shape.model_type))
