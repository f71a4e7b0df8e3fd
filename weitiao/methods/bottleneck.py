"""The layer of a bottleneck adapter, and how it joins a module.

join(block.mlp.down_proj, None, Bottleneck(hidden=896, size=16, activation="relu", scale=1.0))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """scale · up(act(down(x))), nothing at first because ``up`` is zero; [..., hidden] to [..., hidden]."""

    def __init__(self, hidden: int, size: int, activation: str, scale: float):
        super().__init__()
        self.down, self.up = nn.Linear(hidden, size), nn.Linear(size, hidden)
        self.activation, self.scale, self.enabled = getattr(nn.functional, activation), scale, True
        nn.init.normal_(self.down.weight, std=hidden**-0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the adapter adds, in the inputs' dtype."""
        return self.up(self.activation(self.down(inputs.to(self._dtype(inputs))))).to(inputs.dtype) * self.scale

    def _dtype(self, inputs: Tensor) -> torch.dtype:
        return inputs.dtype if torch.is_autocast_enabled(inputs.device.type) else self.down.weight.dtype


def join(output: nn.Module, source: nn.Module | None, adapter: Bottleneck) -> None:
    """Let ``adapter`` change what ``output`` returns: from that result itself, or from what ``source`` is given."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [args[0] if args else next(iter(kwargs.values()))]

    def add(_: nn.Module, __: Any, result: Any) -> Any:
        if not adapter.enabled:
            return result
        first = result[0] if isinstance(result, tuple) else result
        changed = first + adapter(seen.pop() if source is not None else first)
        return (changed, *result[1:]) if isinstance(result, tuple) else changed

    if source is not None:
        source.register_forward_pre_hook(note, with_kwargs=True)
    output.register_forward_hook(add)


@contextmanager
def disabled(adapters: nn.ModuleDict) -> Iterator[None]:
    """The base as it is, inside the block."""
    for adapter in adapters.values():
        adapter.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.enabled = True  # type: ignore[assignment]
