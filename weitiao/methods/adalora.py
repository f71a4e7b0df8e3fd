"""AdaLoRA (Zhang et al., arXiv 2303.10512): updates in SVD form, P Λ Q, whose ranks move to where they are needed.

AdaLoRA(rank=12, target_rank=8).attach(model)

PEFT's layers and folder format; the allocation of ranks is ours: after the optimiser's step and before gradients are
cleared, once a step, with its averages in the checkpoint.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from weitiao.errors import t
from weitiao.methods import adapters
from weitiao.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weitiao.models.shape import Shape

STATE = "adalora"  # attribute of the wrapped model that holds the allocator


class AdaLoRA(Method):
    """y = Wx + (alpha / rank) · P Λ Q x; the least important entries of Λ are set to zero until the mean rank is
    ``target_rank``."""

    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    adds: ClassVar[bool] = True
    peft_type: ClassVar[str] = "ADALORA"
    fuses: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    name: Literal["adalora"] = Field(default="adalora", description="low-rank updates whose ranks are allocated")
    rank: int = Field(default=12, ge=1, description="rank of every update at first")
    target_rank: int = Field(default=8, ge=1, description="mean rank in the end")
    alpha: float = Field(default=32, gt=0, description="strength: what is added is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of inputs to the added matrices that is dropped")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", description="linears that get one: all-linear (the output head apart), or ends of names"
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps before ranks are taken away")
    final: float = Field(default=0.3, ge=0, lt=1, description="share of the steps after the last rank was taken away")
    every: int = Field(default=5, ge=1, description="steps between two allocations")
    beta1: float = Field(default=0.85, gt=0, lt=1, description="smoothing of the sensitivity")
    beta2: float = Field(default=0.85, gt=0, lt=1, description="smoothing of its uncertainty")
    orthogonality: float = Field(
        default=0.5, ge=0, description="weight in the loss of how far P and Q are from orthogonal"
    )

    @model_validator(mode="after")
    def _shrinks(self) -> AdaLoRA:
        if self.target_rank > self.rank:
            raise ValueError(t("target_rank cannot be above rank: ranks are only taken away"))
        if self.warmup + self.final >= 1:
            raise ValueError(t("warmup and final leave no steps to take ranks away"))
        return self

    @classmethod
    def described(cls, values: Mapping[str, Any]) -> AdaLoRA:
        """The method of PEFT's configuration."""
        return cls(
            rank=values["init_r"], target_rank=min(values["target_r"], values["init_r"]), alpha=values["lora_alpha"]
        )

    def attach(self, model: Any) -> nn.Module:
        """Wrap the chosen linears of ``model``; only what is added trains, in float32."""
        from peft import AdaLoraConfig

        from weitiao.models import modules, shape

        linears = modules.linears(model)
        targets = modules.pick(linears, self.target_modules, "method.target_modules")
        self.count(shape.read(model.config))
        config = AdaLoraConfig(
            **adapters.task_of(model),
            init_r=self.rank,
            target_r=self.target_rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType] (PEFT divides by it, any number will do)
            lora_dropout=self.dropout,
            target_modules=adapters.short_names(targets, [name for name, _ in model.named_modules()]),
            fan_in_fan_out=all(type(linears[name]).__name__ == "Conv1D" for name in targets),
            total_step=1,  # PEFT's own allocator is not used
        )
        wrapped = adapters.wrap(model, config)
        for layer in _layers(wrapped).values():
            layer.ranknum[adapters.ADAPTER].requires_grad_(False)  # a count, by which PEFT divides
        return wrapped

    def count(self, shape: Shape) -> int:
        """rank · (inputs + outputs + 1) for every chosen linear."""
        from weitiao.models import modules

        linears = {linear.name: linear for linear in shape.linears}
        targets = modules.pick(linears, self.target_modules, "method.target_modules")
        sizes = {name: (linears[name].inputs, linears[name].outputs) for name in targets}
        adapters.check_ranks(dict.fromkeys(targets, self.rank), sizes)
        added = sum(self.rank * (sum(size) + 1) for size in sizes.values())
        return added + shape.head_parameters

    def begin(self, model: nn.Module, total_steps: int) -> None:
        """Prepare the averages; ranks shrink between the ``warmup`` and the ``final`` share of ``total_steps``."""
        object.__setattr__(model, STATE, Allocator(self, model, total_steps))

    def after_step(self, model: nn.Module, step: int) -> None:
        """Note how sensitive the loss is to every entry, and take ranks away when it is time."""
        getattr(model, STATE).step(step)

    def penalty(self, model: nn.Module) -> Tensor | float:
        """orthogonality · mean over all P and Q of ‖PᵀP - I‖ (Frobenius), as PEFT computes it."""
        import torch

        if not self.orthogonality:
            return 0.0
        norms = []
        for layer in _layers(model).values():
            q, p = layer.lora_A[adapters.ADAPTER], layer.lora_B[adapters.ADAPTER]
            one = torch.eye(len(q), device=q.device)
            norms += [(q @ q.T - one).norm(), (p.T @ p - one).norm()]
        return self.orthogonality * torch.stack(norms).mean()

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages, for the checkpoint."""
        return getattr(model, STATE).state()

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Go on with averages from a checkpoint."""
        getattr(model, STATE).restore(state)

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The rank of every update, by the linear's name: entries of Λ that are not zero."""
        return {name: int((layer.lora_E[adapters.ADAPTER] != 0).sum()) for name, layer in _layers(model).items()}

    def outcome(self, model: nn.Module) -> dict[str, str]:
        """The final ranks: of the linears of one kind the mean, the least and the most."""
        kinds: dict[str, list[int]] = {}
        for name, rank in self.ranks(model).items():
            kinds.setdefault(name.rpartition(".")[2], []).append(rank)
        told = (f"{kind} {fmean(ranks):.1f} ({min(ranks)}–{max(ranks)})" for kind, ranks in kinds.items())
        return {t("final ranks"): ", ".join(told)}

    def training(self, model: nn.Module) -> AbstractContextManager[Any]:
        """See ``adapters.passing``."""
        return adapters.passing(model)

    def disabled(self, model: Any) -> AbstractContextManager[Any]:
        """The base as it was, inside the block."""
        return model.disable_adapter()

    def merge(self, model: Any) -> nn.Module:
        """The base with P Λ Q added to its weights."""
        return adapters.merge(model)

    def save(self, model: Any, folder: Path, base: str) -> None:
        """As PEFT writes it, of every update only the triplets whose Λ is not zero: what the model computes."""
        config = model.peft_config[adapters.ADAPTER]
        before = copy.copy(config.rank_pattern)
        config.rank_pattern = {
            f"{name}.lora_E": (layer.lora_E[adapters.ADAPTER].detach() != 0).view(-1).tolist()
            for name, layer in _layers(model).items()
        }
        try:
            adapters.save(model, folder, base)
        finally:
            config.rank_pattern = before

    def load(self, model: Any, folder: Path) -> nn.Module:
        """``model`` with the adapter in ``folder``, ours or PEFT's own."""
        return adapters.load(model, folder, "ADALORA")


def _layers(model: Any) -> dict[str, Any]:
    from peft.tuners.adalora.layer import AdaLoraLayer

    return adapters.layers(model, AdaLoraLayer)


class Allocator:
    """Importance of every triplet (a row of Q, an entry of Λ, a column of P), and what follows from it.

    Sensitivity of an entry w is |w · gradient|, smoothed; its uncertainty the smoothed distance from that mean; an
    entry's score is their product, a triplet's the sum over its parts (means over row and column; section 3.2).
    """

    def __init__(self, method: AdaLoRA, model: nn.Module, total_steps: int):
        import torch

        self.method, self.total_steps = method, total_steps
        self.layers = _layers(model)
        self.first = min(round(method.warmup * total_steps), total_steps - 1)
        self.last = max(total_steps - round(method.final * total_steps), self.first + 1)
        self.averages: dict[str, Tensor] = {
            f"{kind}/{name}": torch.zeros_like(weight)
            for name, weight in self._weights().items()
            for kind in ("sensitivity", "uncertainty")
        }
        self.kept: dict[str, Tensor] = {}

    def _weights(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{part}": getattr(layer, part)[adapters.ADAPTER]
            for name, layer in self.layers.items()
            for part in ("lora_A", "lora_E", "lora_B")
        }

    def step(self, step: int) -> None:
        """After the optimiser's step number ``step`` (from 1), while gradients are still there."""
        import torch

        with torch.no_grad():
            if step <= self.last:
                self._note()
                if step > self.first and ((step - self.first) % self.method.every == 0 or step == self.last):
                    self._allocate(self.budget(step))
            for name, kept in self.kept.items():  # the optimiser's moments would bring a removed entry back
                self.layers[name].lora_E[adapters.ADAPTER].mul_(kept[:, None])

    def budget(self, step: int) -> int:
        """Triplets that stay after ``step``: a cubic descent (equation 9)."""
        count, method = len(self.layers), self.method
        done = min(max((step - self.first) / (self.last - self.first), 0.0), 1.0)
        return count * method.target_rank + math.ceil(count * (method.rank - method.target_rank) * (1 - done) ** 3)

    def _note(self) -> None:
        for name, weight in self._weights().items():
            now = (weight * weight.grad).abs() if weight.grad is not None else weight.new_zeros(weight.shape)
            mean, spread = self.averages[f"sensitivity/{name}"], self.averages[f"uncertainty/{name}"]
            mean.mul_(self.method.beta1).add_(now, alpha=1 - self.method.beta1)
            spread.mul_(self.method.beta2).add_((now - mean).abs(), alpha=1 - self.method.beta2)

    def _allocate(self, budget: int) -> None:
        """Keep the ``budget`` triplets with the highest scores, over all matrices."""
        import torch

        scores = [self._score(name) for name in self.layers]
        order = torch.cat(scores).argsort(descending=True, stable=True)
        kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        kept[order[:budget]] = True
        self.kept = dict(zip(self.layers, kept.split([len(score) for score in scores]), strict=True))

    def _score(self, name: str) -> Tensor:
        entry = {
            part: self.averages[f"sensitivity/{name}.{part}"] * self.averages[f"uncertainty/{name}.{part}"]
            for part in ("lora_A", "lora_E", "lora_B")
        }
        return entry["lora_E"][:, 0] + entry["lora_A"].mean(1) + entry["lora_B"].mean(0)

    def state(self) -> dict[str, Tensor]:
        """Averages and what is kept."""
        return self.averages | {f"kept/{name}": kept for name, kept in self.kept.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The reverse of :meth:`state`."""
        for name, tensor in state.items():
            kind, _, rest = name.partition("/")
            if kind == "kept":
                self.kept[rest] = tensor
            else:
                self.averages[name].copy_(tensor)
