"""What changes in a run: the weights that train, the optimiser's state, the method's own, random numbers.

parts = Parts(model, method, optimizer, paged)
parts.save(run.checkpoints, step, facts)
parts.put(parts.load(path), str(path))           # as they were then
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weitiao.errors import InputError, t
from weitiao.methods.base import Method, trainable
from weitiao.train import checkpoint, together
from weitiao.train.many import ALONE, Many
from weitiao.train.paging import Paged, home_bytes

SHOWN_NAMES = 20


@dataclass
class Parts:
    """``paged``: where the optimiser's state lies, if that is not beside the weights; ``many``: the processes that have
    a part each, of random numbers at least."""

    model: nn.Module
    method: Method
    optimizer: torch.optim.Optimizer
    paged: Paged | None = None
    many: Many = ALONE

    def __post_init__(self) -> None:
        self.parameters = trainable(self.model)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of all weights that train, which is finite if they are; no wait for the device, and frozen weights
        are not read."""
        return norm(self.parameters.values())

    def generators(self) -> list[Tensor]:
        """The state of the generators that a step draws from, cheaply; for all of them see ``checkpoint``."""
        on_gpu = next(iter(self.parameters.values())).is_cuda
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]

    def set_generators(self, states: Sequence[Tensor]) -> None:
        """Put them back."""
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state)

    def saved_bytes(self, optimizer: str) -> tuple[int, int]:
        """What :meth:`take` will hold once the optimiser called ``optimizer`` has its state: weights, and state."""
        moments = 0 if optimizer == "adafactor" else home_bytes(optimizer, self.optimizer.param_groups)
        own = sum(tensor.nbytes for tensor in self.method.state(self.model).values())
        return sum(parameter.nbytes for parameter in self.parameters.values()), moments + own

    def take(self, step: int, facts: Mapping[str, Any]) -> checkpoint.State:
        """All of it, as it is now; tensors are not copied."""
        names: dict[Any, str] = {parameter: name for name, parameter in self.parameters.items()}
        moments = {
            f"{kind}/{names[parameter]}": tensor
            for parameter, kinds in self.optimizer.state.items()
            for kind, tensor in kinds.items()
        }
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        own = self.method.state(self.model)
        return checkpoint.State(step, weights, moments, self.many.random_state(), own, dict(facts))

    def save(self, folder: Path, step: int, facts: Mapping[str, Any]) -> None:
        """Write all of it below ``folder``; Poisoned for a number that is not finite."""
        saved = self.paged.home.rest if self.paged else None
        together.save(self.many, folder, self.take(step, facts), saved)

    def load(self, path: Path) -> checkpoint.State:
        """The checkpoint at ``path``: whole, or this process's shards of it."""
        return together.load(self.many, path, self.parameters)

    def put(self, state: checkpoint.State, where: str, moments: bool = True, seed: int = 0) -> None:
        """As it was in ``state``, which is used up; without ``moments`` the optimiser begins anew. ``seed`` is for the
        generators of a process that there was not then."""
        self.put_weights(state.parameters, where)
        self.optimizer.state.clear()
        while moments and state.optimizer:  # one leaves before the next is read
            self.put_moment(*state.optimizer.popitem())
        self.method.restore(self.model, state.method)
        self.many.set_random_state(state.random, seed + state.step)

    def put_weights(self, values: Mapping[str, Tensor], where: str) -> None:
        """Copy ``values`` into the parameters that train; they must be exactly these."""
        other = {
            name for name in values.keys() & self.parameters.keys() if values[name].shape != self.parameters[name].shape
        }
        if wrong := sorted(values.keys() ^ self.parameters.keys() | other):
            shown = ", ".join(wrong[:SHOWN_NAMES])
            raise InputError(t("{path}: holds other parameters than train now: {names}", path=where, names=shown))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def put_moment(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of a checkpoint into the optimiser's state. torch's fused steps count where the weights are."""
        kind, _, of = name.partition("/")
        parameter = self.parameters[of]
        if self.paged and tensor.ndim:
            self.paged.keep(parameter, kind, tensor)
            return
        stays = kind == "step" and not self.optimizer.defaults.get("fused")
        self.optimizer.state[parameter][kind] = tensor.to("cpu" if stays else parameter.device, copy=True)

    def close(self) -> None:
        """Let go of what the optimiser's state takes outside memory."""
        if self.paged:
            self.paged.close()


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm [] of all ``tensors`` together, of those in shards over all processes."""
    total: Any = nn.utils.get_total_norm(tensors)
    return total.full_tensor() if hasattr(total, "full_tensor") else total
