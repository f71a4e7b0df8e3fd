"""P-tuning (Liu et al., arXiv 2103.10385): virtual tokens that a small network produces while they are learnt.

PTuning(tokens=20, encoder="mlp").attach(model)

Only what the network produces is needed afterwards, so only that is saved.
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


class PTuning(Method):
    """``tokens`` vectors train together with an MLP or an LSTM that they pass through; the model is frozen."""

    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    adds: ClassVar[bool] = True
    peft_type: ClassVar[str] = "P_TUNING"
    learning_rate: ClassVar[float] = 1e-3

    name: Literal["p_tuning"] = Field(
        default="p_tuning", description="virtual tokens from a prompt encoder (Liu et al. 2021)"
    )
    tokens: int = Field(default=20, ge=1, description="how many virtual tokens")
    encoder: Literal["mlp", "lstm"] = Field(default="mlp", description="what produces them: three linears, or an LSTM")
    encoder_hidden: int = Field(default=128, ge=1, description="inner width of the prompt encoder")
    encoder_layers: int = Field(default=2, ge=1, description="layers of an LSTM encoder")

    @classmethod
    def described(cls, values: Mapping[str, Any]) -> PTuning:
        """The method of PEFT's configuration."""
        return cls(tokens=values["num_virtual_tokens"])

    def attach(self, model: Any) -> nn.Module:
        """Freeze ``model`` and put the encoder's output before its inputs."""
        from weitiao.methods import virtual
        from weitiao.models import modules

        width = modules.embedding(model).embedding_dim
        return virtual.attach(
            model, virtual.encoder(self.encoder, self.tokens, width, self.encoder_hidden, self.encoder_layers)
        )

    def count(self, shape: Shape) -> int:
        """The vectors, the encoder's weights and a task's head."""
        width, inner = shape.hidden, self.encoder_hidden
        vectors = self.tokens * width + shape.head_parameters
        if self.encoder == "mlp":
            return vectors + (width + 1) * inner + (inner + 1) * inner + (inner + 1) * width
        first = 8 * inner * (width + inner + 2)  # two directions of four gates, with torch's two biases
        rest = (self.encoder_layers - 1) * 8 * inner * (2 * inner + inner + 2)
        return vectors + first + rest + (2 * inner + 1) * 2 * inner + (2 * inner + 1) * width

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The model without its virtual tokens, inside the block."""
        from weitiao.methods import virtual

        return virtual.disabled(model)

    def merge(self, model: nn.Module) -> nn.Module:
        """InputError: there is nothing in the weights that could hold them."""
        raise InputError(t(NO_MERGE, name=self.name))

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """PEFT's format of P-tuning: the encoder's output, by which PEFT takes the encoder as done."""
        from peft import PromptEncoderConfig

        from weitiao.methods import virtual

        kind = self.encoder.upper()
        config = PromptEncoderConfig(encoder_reparameterization_type=kind, encoder_hidden_size=self.encoder_hidden)
        virtual.save(model, folder, base, config)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """``model`` with the saved vectors before its inputs."""
        from weitiao.methods import virtual

        return virtual.load(model, folder, "P_TUNING")
