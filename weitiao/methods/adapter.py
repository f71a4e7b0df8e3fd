"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247; parallel: He et al.,
arXiv 2110.04366): two small linears with a nonlinearity between them, in every block, the identity at first.

Adapter(size=16, style="houlsby").attach(model)

PEFT has none, so the folder has a format of its own, which PEFT does not take for one of its adapters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weitiao.errors import InputError, t
from weitiao.methods.adapters import misfit
from weitiao.methods.base import Method, train_only

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weitiao.models.shape import Shape

CONFIG = "bottleneck_config.json"
WEIGHTS = "bottleneck.safetensors"
MODULE = "bottlenecks"


class Adapter(Method):
    """y = f(x) + up(act(down(f(x)))) behind a sublayer f, before its residual sum; only down and up train."""

    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    adds: ClassVar[bool] = True
    fuses: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 5e-4

    name: Literal["adapter"] = Field(default="adapter", description="bottleneck adapters in every block")
    size: int = Field(default=16, ge=1, description="inner width of an adapter")
    style: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        default="pfeiffer",
        description="houlsby: behind attention and MLP; pfeiffer: behind the MLP; parallel: beside it, from its input",
    )
    activation: Literal["relu", "gelu", "silu"] = Field(default="relu", description="nonlinearity between the linears")
    scale: float = Field(default=1.0, gt=0, description="what an adapter adds is multiplied by this")

    def attach(self, model: Any) -> nn.Module:
        """Freeze ``model`` and put the adapters into its blocks."""
        from torch import nn

        from weitiao.methods.bottleneck import Bottleneck, join
        from weitiao.models import modules, shape

        train_only(model, set())
        found = sites(shape.read(model.config), self.style)
        hidden, place = shape.read(model.config).hidden, modules.inner(model)
        adapters = nn.ModuleDict()
        for site in found:
            made = Bottleneck(hidden, self.size, self.activation, self.scale).to(place.device)
            join(place.get_submodule(site.output), place.get_submodule(site.input) if site.input else None, made)
            adapters[site.output.replace(".", "-")] = made
        place.add_module(MODULE, adapters)
        return model

    def count(self, shape: Shape) -> int:
        """2 · hidden · size + size + hidden for every place."""
        added = len(sites(shape, self.style)) * (2 * shape.hidden * self.size + self.size + shape.hidden)
        return added + shape.head_parameters

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The model without its adapters, inside the block."""
        from weitiao.methods import bottleneck
        from weitiao.models import modules

        return bottleneck.disabled(getattr(modules.inner(model), MODULE))

    def merge(self, model: nn.Module) -> nn.Module:
        """InputError: no matrix equals a matrix with a nonlinearity behind it."""
        raise InputError(t("method.name=adapter: an adapter is not linear and cannot be merged; keep the adapter"))

    def save(self, model: Any, folder: Path, base: str) -> None:
        """``bottleneck_config.json`` and ``bottleneck.safetensors``."""
        from safetensors.torch import save_file

        state = self._state(model)
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / WEIGHTS)
        values = {"base_model_name_or_path": base, **self.model_dump(mode="json")}
        (folder / CONFIG).write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def load(self, model: Any, folder: Path) -> nn.Module:
        """``model`` with the adapters saved in ``folder``; InputError unless they fit."""
        from safetensors.torch import load_file

        attached = self.attach(model)
        own, state = self._state(attached), load_file(folder / WEIGHTS)
        wanted = {name: tensor.shape for name, tensor in own.items()}
        found = {name: tensor.shape for name, tensor in state.items()}
        if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
            raise misfit(folder, read_config(folder).get("base_model_name_or_path"), model, wrong)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        return attached

    def _state(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapters' own tensors and those of a task's head, by the names in the file."""
        from weitiao.models import modules

        place = modules.inner(model)
        head = {f"head.{name}": tensor for name, tensor in modules.head_tensors(model).items()}
        return getattr(place, MODULE).state_dict() | head


@dataclass(frozen=True)
class Site:
    """Where an adapter sits: the module whose output it changes, and the one whose input it reads ("": its own)."""

    output: str
    input: str = ""


def sites(shape: Shape, style: str) -> list[Site]:
    """The places of a model's adapters, by its structure.

    A sublayer is a part of a block that holds matrices. What it gives back comes from its last linear with the hidden
    width as output, or, where there is none (a mixture of experts), from the part itself.
    """
    found = []
    for block in shape.blocks:
        parts = dict(_sublayers(shape, block))
        outputs = [output for output, _ in parts.values() if output]
        if len(outputs) < 2:
            raise InputError(
                t("{type}: its blocks have no attention and MLP one after the other", type=shape.model_type)
            )
        if style == "houlsby":
            found += [Site(outputs[0]), Site(outputs[-1])]
        elif style == "pfeiffer":
            found.append(Site(outputs[-1]))
        else:
            after = list(parts.values())[[output for output, _ in parts.values()].index(outputs[0]) + 1 :]
            found.append(Site(outputs[-1], after[0][1]))
    return found


def _sublayers(shape: Shape, block: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Parts of a block with matrices, in order: the module that gives the part's result ("" if none of the hidden width
    does), and the module that reads its input."""
    linears = {linear.name: linear for linear in shape.linears}
    parts: dict[str, list[str]] = {}
    for name, size in shape.tensors.items():
        if name.startswith(block + ".") and sum(width > 1 for width in size) > 1:
            parts.setdefault(name.removeprefix(block + ".").split(".")[0], []).append(name.rpartition(".")[0])
    for part, names in parts.items():
        if all(name in linears for name in names):
            wide = [name for name in names if linears[name].outputs == shape.hidden]
            yield part, (wide[-1] if wide else "", names[0])
        else:
            yield part, (f"{block}.{part}", f"{block}.{part}")


def read_config(folder: Path) -> Mapping[str, Any]:
    """What :meth:`Adapter.save` wrote beside the weights."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            t("{path}: not an adapter's description ({reason})", path=folder / CONFIG, reason=error)
        ) from None
    if not (folder / WEIGHTS).is_file():
        raise InputError(t("{path}: {file} is missing", path=folder, file=WEIGHTS))
    return values
