"""Block expansion (LLaMA Pro, Wu et al., arXiv 2401.02415): new blocks between the old ones, which pass everything
through at first; only they train, so that what the model knew stays.

Expand(blocks=2, where="interleaved").attach(model)

The result is a plain model with more layers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weitiao.errors import InputError, t
from weitiao.methods.adapter import sites
from weitiao.methods.base import Method, save_plain, train_only

if TYPE_CHECKING:
    from torch import nn

    from weitiao.models.shape import Shape

INDICES = ("layer_idx", "layer_id")  # what a module calls its block's place


class Expand(Method):
    """Copies of blocks whose outputs are zero train; everything else is frozen."""

    adds: ClassVar[bool] = True

    name: Literal["expand"] = Field(default="expand", description="new blocks that start as the identity (LLaMA Pro)")
    blocks: int = Field(default=2, ge=1, description="how many blocks are added")
    where: Literal["interleaved", "tail"] = Field(
        default="interleaved", description="behind every so many old blocks, or all behind the last one"
    )

    def attach(self, model: Any) -> nn.Module:
        """Insert the new blocks into ``model`` and its configuration; only they train, in float32."""
        import torch
        from torch import nn

        from weitiao.models import modules, shape
        from weitiao.models.quantized import dequantize

        before = shape.read(model.config)
        old, order = list(modules.blocks(model)), self.order(before.layers)
        _check(before, order)
        holder, _, blocks = before.blocks[0].rpartition(".")[0].rpartition(".")
        outputs = [site.output.removeprefix(before.blocks[0] + ".") for site in sites(before, "houlsby")[:2]]
        layers, new = [], []
        for place, (source, fresh) in enumerate(order):
            layer = dequantize(copy.deepcopy(old[source])) if fresh else old[source]  # codes cannot train
            if fresh:
                new.append(place)
                fold: Any = getattr(layer, "fold_norms", None)
                if fold is not None:  # its residual passes its norms, which have to change nothing
                    fold()
                with torch.no_grad():
                    for name in outputs:
                        for weight in _last(layer.get_submodule(name)):
                            weight.zero_()
            for module, name in ((part, name) for part in layer.modules() for name in INDICES):
                if hasattr(module, name):
                    setattr(module, name, place)  # the cache keeps a place for each
            layers.append(layer)
        setattr(modules.inner(model).get_submodule(holder), blocks, nn.ModuleList(layers))
        lengthen(model.config, [source for source, _ in order])
        block = before.blocks[0].rpartition(".")[0]
        inside = tuple(f"{block}.{place}." for place in new)
        train_only(model, {name for name, _ in model.named_parameters() if name.startswith(inside)})
        return model

    def order(self, layers: int) -> list[tuple[int, bool]]:
        """The blocks of the expanded model: (index of the old block, whether it is a new copy of it)."""
        if self.where == "tail":
            return [(old, False) for old in range(layers)] + [(layers - 1, True)] * self.blocks
        ends = [round(layers * (number + 1) / self.blocks) - 1 for number in range(self.blocks)]
        found = []
        for old in range(layers):
            found += [(old, False)] + [(old, True)] * ends.count(old)
        return found + [(0, True)] * ends.count(-1)

    def count(self, shape: Shape) -> int:
        """The parameters of the blocks that are copied."""
        _check(shape, order := self.order(shape.layers))
        sources = [source for source, fresh in order if fresh]
        return sum(shape.parameters_under(shape.blocks[source]) for source in sources) + shape.head_parameters

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """A plain model folder with more layers."""
        save_plain(model, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """What was saved is the whole model."""
        return model


def _check(shape: Shape, order: list[tuple[int, bool]]) -> None:
    """InputError for a family whose blocks cannot be the identity, and where its class would not make such a block at
    such a place (RWKV's first one has a norm of its own)."""
    from weitiao.models import shape as shapes

    if shape.kind == "masked":
        message = "method.name=expand: {type} norms what its blocks add up, so that no block of it changes nothing"
        raise InputError(t(message, type=shape.model_type))
    config = shapes.read_config(json.loads(shape.configuration))
    lengthen(config, [source for source, _ in order])
    longer = shapes.read(config)
    for place, (source, _) in enumerate(order):
        if _tensors(longer, place) != _tensors(shape, source):
            message = (
                "method.name=expand: {type} cannot have a copy of its block {source} as block {place}; "
                "take method.where=tail or other method.blocks"
            )
            raise InputError(t(message, type=shape.model_type, source=source, place=place))


def _tensors(shape: Shape, block: int) -> dict[str, tuple[int, ...]]:
    """Names inside a block and sizes of its tensors."""
    prefix = shape.blocks[block] + "."
    return {name.removeprefix(prefix): size for name, size in shape.tensors.items() if name.startswith(prefix)}


def _last(module: Any) -> list[Any]:
    """The weights that make a sublayer's output: a linear's own, or the last matrices of a mixture of experts."""
    own = dict(module.named_parameters(recurse=False))
    if "weight" in own:
        return list(own.values())
    return [weight for name, weight in module.named_parameters() if "down_proj" in name]


def lengthen(config: Any, sources: Sequence[int]) -> None:
    """Make a configuration say as many layers as ``sources`` has, with what it says of each layer copied along."""
    former = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == former and name.startswith(("layer", "mlp_only", "no_rope")):
            setattr(config, name, [value[source] for source in sources])
    config.num_hidden_layers = len(sources)
