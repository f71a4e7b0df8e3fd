"""Prompt tuning (Lester et al., arXiv 2104.08691): a few vectors that train stand before the tokens of every input.

PromptTuning(tokens=20, start="vocabulary").attach(model)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weitiao.errors import InputError, t
from weitiao.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weitiao.models.shape import Shape

NO_MERGE = (
    "method.name={name}: virtual tokens stand beside the weights and cannot be merged into them; keep the adapter"
)


class PromptTuning(Method):
    """``tokens`` vectors of the embedding's width train; the model is frozen."""

    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    adds: ClassVar[bool] = True
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    learning_rate: ClassVar[float] = 3e-2

    name: Literal["prompt_tuning"] = Field(
        default="prompt_tuning", description="virtual tokens at the input (Lester et al. 2021)"
    )
    tokens: int = Field(default=20, ge=1, description="how many virtual tokens")
    start: Literal["vocabulary", "random", "text"] = Field(
        default="vocabulary",
        description="what they are at first: tokens drawn from the vocabulary, random numbers, or method.text",
    )
    text: str | None = Field(default=None, description="for start=text: a description of the task, repeated or cut")

    @classmethod
    def described(cls, values: Mapping[str, Any]) -> PromptTuning:
        """The method of PEFT's configuration."""
        return cls(tokens=values["num_virtual_tokens"])

    def attach(self, model: Any) -> nn.Module:
        """Freeze ``model`` and put the virtual tokens before its inputs."""
        from weitiao.methods import virtual

        return virtual.attach(model, virtual.Vectors(self._first(model)))

    def _first(self, model: Any) -> Tensor:
        """The vectors before training [tokens, hidden]."""
        import torch

        from weitiao.models import modules

        weight = modules.embedding(model).weight.detach().float()
        if self.start == "random":
            return torch.randn(self.tokens, weight.shape[1]) * weight.std()
        if self.start == "vocabulary":
            return weight[torch.randint(0, len(weight), (self.tokens,))].clone()
        ids = self._text_ids(model)
        return weight[torch.tensor((ids * (self.tokens // len(ids) + 1))[: self.tokens])].clone()

    def _text_ids(self, model: Any) -> list[int]:
        from weitiao.models.load import load_tokenizer

        ids = load_tokenizer(model.name_or_path)(self.text or "", add_special_tokens=False).input_ids
        if not ids:
            raise InputError(t("method.text: start=text needs a text that the virtual tokens begin as"))
        return ids

    def count(self, shape: Shape) -> int:
        """tokens · hidden, and a task's head."""
        return self.tokens * shape.hidden + shape.head_parameters

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The model without its virtual tokens, inside the block."""
        from weitiao.methods import virtual

        return virtual.disabled(model)

    def merge(self, model: nn.Module) -> nn.Module:
        """InputError: there is nothing in the weights that could hold them."""
        raise InputError(t(NO_MERGE, name=self.name))

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """PEFT's format of prompt tuning."""
        from peft import PromptTuningConfig

        from weitiao.methods import virtual

        virtual.save(model, folder, base, PromptTuningConfig(num_virtual_tokens=self.tokens))

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """``model`` with the saved vectors before its inputs."""
        from weitiao.methods import virtual

        return virtual.load(model, folder, "PROMPT_TUNING")
