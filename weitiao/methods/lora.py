"""LoRA (Hu et al., arXiv 2106.09685): small matrices beside the frozen linears, in PEFT's layers and folder format.

LoRA(rank=8, alpha=16).attach(model)

The base is held once, in the compute dtype; the small matrices are float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from weitiao.errors import InputError, t
from weitiao.methods import adapters, pissa
from weitiao.methods.base import Method, trainable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weitiao.models.shape import Experts, Shape

IN_CODES = "model.quantize holds experts in codes; take quantize=none, or leave the experts as they are"


class LoRA(Method):
    """Low-rank adaptation: y = Wx + (alpha / rank) · B A dropout(x), with W frozen."""

    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    adds: ClassVar[bool] = True
    peft_type: ClassVar[str] = "LORA"

    name: Literal["lora"] = Field(default="lora", description="small matrices beside frozen linears")
    rank: int = Field(default=8, ge=1, description="inner width of the added matrices")
    alpha: float = Field(default=16, gt=0, description="strength: what is added is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of inputs to the added matrices that is dropped")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear",
        description="linears that get one: all-linear (the output head apart), or ends of dotted names; so does the "
        "token embedding where it is named",
    )
    target_parameters: tuple[str, ...] = Field(
        default=(),
        description="experts of a mixture that get one each, by ends of names (mlp.experts.gate_up_proj, "
        "mlp.experts.down_proj); every pass then forms all of their sums, as much again as their weights take",
    )
    rslora: bool = Field(default=False, description="scale by alpha / √rank (arXiv 2312.03732), steadier at high ranks")
    dora: bool = Field(
        default=False, description="learn each output's magnitude apart from its direction (DoRA, arXiv 2402.09353)"
    )
    initialize: Literal["zero", "pissa"] = Field(
        default="zero",
        description="zero: B is zero, A random; pissa: the largest singular vectors of the weight, which the frozen "
        "rest then lacks (arXiv 2404.02948)",
    )
    b_learning_rate: float = Field(
        default=1.0, gt=0, description="learning rate of B as a multiple of A's; LoRA+ (arXiv 2402.12354) takes 16"
    )
    rank_pattern: dict[str, int] = Field(default={}, description="another rank for some linears, by ends of names")
    alpha_pattern: dict[str, float] = Field(default={}, description="another alpha for some linears, by ends of names")
    modules_to_save: tuple[str, ...] = Field(
        default=(), description="further modules that train whole and are saved in the adapter, by ends of dotted names"
    )

    @model_validator(mode="after")
    def _fits_experts(self) -> LoRA:
        if self.target_parameters and (self.dora or self.dropout or self.initialize == "pissa"):
            raise ValueError(t("target_parameters goes with neither dora, dropout nor initialize=pissa"))
        return self

    def attach(self, model: Any) -> nn.Module:
        """Wrap the chosen linears of ``model``; only what is added trains, in float32."""
        from peft import LoraConfig

        from weitiao.models import modules, shape
        from weitiao.models.quantized import kind_of

        linears, own = modules.linears(model), shape.read(model.config)
        targets, embedding = self.targets(own)
        self.count(own)
        if self.chosen_experts(own) and kind_of(model):
            raise InputError("method.target_parameters: " + t(IN_CODES))
        if self.dora:
            _check_directions({name: linears[name] for name in targets})
        config = LoraConfig(
            **adapters.task_of(model, self.modules_to_save),
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType] (PEFT divides by it, any number will do)
            lora_dropout=self.dropout,
            target_modules=adapters.short_names([*targets, *embedding], [name for name, _ in model.named_modules()]),
            target_parameters=list(self.target_parameters) or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            rank_pattern=self.rank_pattern,
            alpha_pattern=dict(self.alpha_pattern),
            fan_in_fan_out=all(type(linears[name]).__name__ == "Conv1D" for name in targets),
        )
        wrapped = adapters.wrap(model, config)
        if self.initialize == "pissa":
            pissa.begin(wrapped)
        return wrapped

    def targets(self, shape: Shape) -> tuple[list[str], list[str]]:
        """Names of the linears that get two matrices, and of the embedding if it does. InputError for a name that means
        neither, and for an embedding where there are none for it."""
        from weitiao.models import modules

        names = [linear.name for linear in shape.linears]
        if self.target_modules == modules.ALL_LINEAR:
            return names, []
        chosen = modules.pick([*names, shape.embedding], self.target_modules, "method.target_modules")
        embedding = [name for name in chosen if name == shape.embedding]
        if embedding and (self.dora or self.initialize == "pissa"):
            raise InputError(t("method.target_modules: {name} goes with neither dora nor pissa", name=embedding[0]))
        return [name for name in chosen if name not in embedding], embedding

    def chosen_experts(self, shape: Shape) -> list[Experts]:
        """What ``target_parameters`` means; InputError for a name that means nothing."""
        from weitiao.models import modules

        wanted = self.target_parameters
        targets = {name: [stack for stack in shape.experts if modules.matches(stack.name, name)] for name in wanted}
        if lonely := [target for target, found in targets.items() if not found]:
            known = ", ".join(dict.fromkeys(re.sub(r".*\.\d+\.", "", stack.name) for stack in shape.experts))
            message = 'method.target_parameters: {type} keeps no experts in "{name}" ({names})'
            raise InputError([t(message, type=shape.model_type, name=name, names=known or "-") for name in lonely])
        return [stack for found in targets.values() for stack in found]

    def _saved(self, shape: Shape) -> set[str]:
        """Names of the base's parameters that train whole; InputError for an unknown module or a tied one."""
        from weitiao.models import modules

        names = {name.rpartition(".")[0] for name in shape.tensors}
        names = sorted(names | {above for name in names for above in _parents(name)})
        chosen = modules.pick(names, self.modules_to_save, "method.modules_to_save")
        found = {name for name in shape.tensors if any(name.startswith(module + ".") for module in chosen)}
        tied = [name for name in found if shape.tied and shape.tensors[name] == (shape.vocab, shape.hidden)]
        if tied:
            message = "method.modules_to_save: {name} is both embedding and head here; method.name=freeze trains it"
            raise InputError(t(message, name=tied[0]))
        return found | shape.head

    def count(self, shape: Shape) -> int:
        """rank · (inputs + outputs) for every chosen linear or expert, with DoRA its outputs as well, and what trains
        whole. InputError for ranks and names that cannot be."""
        targets, embedding = self.targets(shape)
        sizes = {linear.name: (linear.inputs, linear.outputs) for linear in shape.linears if linear.name in targets}
        sizes |= {name: (shape.vocab, shape.tensors[f"{name}.weight"][1]) for name in embedding}
        ranks = {name: self._rank_of(name) for name in sizes}
        adapters.check_ranks(ranks, sizes)
        added = sum(rank * sum(sizes[name]) for name, rank in ranks.items())
        added += sum(sizes[name][1] for name in targets) if self.dora else 0
        experts = self.chosen_experts(shape)
        added += sum(self._rank_of(stack.name) * stack.count * (stack.inputs + stack.outputs) for stack in experts)
        return added + sum(math.prod(shape.tensors[name]) for name in self._saved(shape))

    def _rank_of(self, name: str) -> int:
        """As PEFT reads ``rank_pattern``."""
        hits = (rank for end, rank in self.rank_pattern.items() if re.match(rf"(.*\.)?({end})$", name))
        return next(hits, self.rank)

    def parameter_groups(self, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """As every method's; LoRA+ gives B a learning rate of its own."""
        groups = super().parameter_groups(model, learning_rate)
        if self.b_learning_rate == 1.0:
            return groups
        b = {id(weight) for name, weight in trainable(model).items() if re.search(r"\.lora_(embedding_)?B\.", name)}
        split = []
        for group in groups:
            for faster in (False, True):
                chosen = [p for p in group["params"] if (id(p) in b) == faster]
                rate = learning_rate * (self.b_learning_rate if faster else 1.0)
                split += [{**group, "params": chosen, "lr": rate}] if chosen else []
        return split

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """For PiSSA, what was taken out of the base."""
        return pissa.state(model) if self.initialize == "pissa" else {}

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Take out of the base what was taken out when the run began."""
        if self.initialize == "pissa":
            pissa.restore(model, state)

    def training(self, model: nn.Module) -> AbstractContextManager[Any]:
        """See ``adapters.passing``."""
        return adapters.passing(model)

    def disabled(self, model: Any) -> AbstractContextManager[Any]:
        """The base as it was, inside the block; not after PiSSA, which took its main part out of the base."""
        if self.initialize == "pissa":
            message = "method.initialize: pissa changed the base, which cannot be switched back; load it anew"
            raise InputError(t(message))
        return model.disable_adapter()

    def merge(self, model: Any) -> nn.Module:
        """The base with the product of the small matrices added to its weights; the wrapped model is used up.
        InputError where an embedding would take the head with it."""
        from weitiao.models import modules

        embedding, head = modules.embedding(model), modules.output_linear(model)
        if getattr(embedding, "lora_embedding_A", None) and head is not None and head.weight is embedding.weight:
            message = "{model}: embedding and head are one weight, and LoRA changed one use alone; keep the adapter"
            raise InputError(t(message, model=model.name_or_path))
        return adapters.merge(model)

    def save(self, model: Any, folder: Path, base: str) -> None:
        """As PEFT writes it; after PiSSA an adapter of twice the rank, on the base as it was."""
        with pissa.as_lora(model) if self.initialize == "pissa" else nullcontext():
            adapters.save(model, folder, base)

    def load(self, model: Any, folder: Path) -> nn.Module:
        """``model`` with the adapter in ``folder``, ours or PEFT's own; InputError unless it fits exactly."""
        return adapters.load(model, folder, "LORA")

    @classmethod
    def described(cls, values: Mapping[str, Any]) -> LoRA:
        """The method of PEFT's configuration."""
        options = {
            "rank": values["r"],
            "alpha": values["lora_alpha"],
            "dropout": values.get("lora_dropout", 0.0),
            "target_modules": values.get("target_modules") or cls.model_fields["target_modules"].default,
            "target_parameters": values.get("target_parameters") or (),
            "rslora": values.get("use_rslora", False),
            "dora": values.get("use_dora", False),
            "rank_pattern": values.get("rank_pattern") or {},
            "alpha_pattern": values.get("alpha_pattern") or {},
            "modules_to_save": values.get("modules_to_save") or (),
        }
        return cls.model_validate(options)


def _check_directions(linears: Mapping[str, Any]) -> None:
    """InputError where a weight has a row of zeros: DoRA divides by the row's length, and everything becomes NaN."""
    for name, linear in linears.items():
        weight = linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight
        if count := int((~weight.any(1)).sum()):
            message = "method.dora: {count} outputs of {name} are zero in this model, and have no direction to learn"
            raise InputError(t(message, count=count, name=name))


def _parents(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``."""
    words = name.split(".")
    return [".".join(words[:end]) for end in range(1, len(words))]
