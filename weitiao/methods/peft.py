"""Any other method that PEFT has, by PEFT's own name and options.

Peft(kind="OFT", config={"r": 8, "target_modules": ["q_proj"]}).attach(model)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weitiao.config import unknown
from weitiao.errors import InputError, t
from weitiao.methods import adapters
from weitiao.methods.base import Method, trainable

if TYPE_CHECKING:
    from torch import nn

    from weitiao.models.shape import Shape


class Peft(Method):
    """A PEFT configuration, passed through."""

    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    adds: ClassVar[bool] = True
    fuses: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    name: Literal["peft"] = Field(default="peft", description="any other method of PEFT, by its name")
    kind: str = Field(default="IA3", description="PEFT's name of the method: OFT, BOFT, VERA, IA3, LOHA, LOKR, …")
    config: dict[str, Any] = Field(default={}, description="options of that method, as PEFT calls them")

    def attach(self, model: Any) -> nn.Module:
        """``model`` in PEFT's wrapper."""
        from weitiao.models import modules

        kind, values = self._configuration(), dict(self.config)
        task = {name: value for name, value in adapters.task_of(model).items() if name in kind.__dataclass_fields__}
        values = task | values
        linears = list(modules.linears(model))
        if "target_modules" in kind.__dataclass_fields__ and "target_modules" not in values:
            values["target_modules"] = adapters.short_names(linears, [name for name, _ in model.named_modules()])
        if kind.__name__ == "IA3Config":  # its down-projections are scaled at their input
            wanted = values["target_modules"]
            values.setdefault("feedforward_modules", [name for name in wanted if name.endswith(DOWN)])
        try:
            return adapters.wrap(model, kind(**values))
        except (TypeError, ValueError) as error:
            raise InputError(t("method.config: {reason}", reason=" ".join(str(error).split()))) from error

    def _configuration(self) -> Any:
        """PEFT's class for the options."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = {str(getattr(kind, "value", kind)): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.kind.upper() not in known:
            raise InputError("method.kind: " + unknown(self.kind, "PEFT", known))
        return known[self.kind.upper()]

    def count(self, shape: Shape) -> int:
        """What PEFT adds to the model, built without memory."""
        import torch

        with torch.device("meta"):
            return sum(parameter.numel() for parameter in trainable(self.attach(shape.build())).values())

    def training(self, model: nn.Module) -> AbstractContextManager[Any]:
        """See ``adapters.passing``."""
        return adapters.passing(model)

    def disabled(self, model: Any) -> AbstractContextManager[Any]:
        """The base as it was, inside the block."""
        return model.disable_adapter()

    def merge(self, model: Any) -> nn.Module:
        """The base with the adapter in its weights, where PEFT can do that; InputError otherwise."""
        if not hasattr(model, "merge_and_unload"):
            raise InputError(t("method.kind: PEFT cannot merge {kind}; keep the adapter", kind=self.kind))
        return adapters.merge(model)

    def save(self, model: Any, folder: Path, base: str) -> None:
        """As PEFT writes it."""
        adapters.save(model, folder, base)

    def load(self, model: Any, folder: Path) -> nn.Module:
        """``model`` with the adapter in ``folder``."""
        return adapters.load(model, folder)

    @classmethod
    def described(cls, values: Mapping[str, Any]) -> Peft:
        """The method of PEFT's configuration."""
        return cls(kind=values["peft_type"])


DOWN = ("down_proj", "mlp.c_proj", "output.dense", "fc2", "dense_4h_to_h")
