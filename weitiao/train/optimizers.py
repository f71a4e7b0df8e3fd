"""Optimisers that torch does not have as they are needed: Lion, AdamW with its moments in 8 bits, Muon beside AdamW.

Lion(parameters, lr=1e-4)
AdamW8bit(parameters, lr=1e-4)
Muon([{"params": matrices, "linear": True}, {"params": others}], lr=1e-3)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weitiao import machine
from weitiao.models.quantized import SCALES_BLOCK as BLOCK
from weitiao.models.quantized import dynamic_map

NEWTON = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: singular values between 0.7 and 1.2 after five steps
NEWTON_STEPS = 5
MOMENTUM = 0.95  # Muon's, whatever AdamW's betas are
SMALL = 4096  # a tensor with fewer numbers keeps float32 moments: it saves nothing, and norms are sensitive


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., arXiv 2302.06675): the sign of an average of gradients; one moment, and a rate about a tenth
    of AdamW's."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over every parameter with a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                average = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                direction = average.lerp(parameter.grad, 1 - first).sign_()
                parameter.add_(direction, alpha=-group["lr"])
                average.lerp_(parameter.grad, 1 - second)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two moments are 8-bit codes with a scale for each block of 256 (Dettmers et al., arXiv 2110.02861):
    a quarter of their memory. A tensor's moments are decoded, updated and encoded one after another."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over every parameter with a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                _keep(state, name, torch.zeros_like(parameter))
        state["step"] += 1
        mean = _kept(state, "exp_avg", parameter).lerp_(grad, 1 - first)
        square = _kept(state, "exp_avg_sq", parameter).mul_(second).addcmul_(grad, grad, value=1 - second)
        steps = state["step"].item()
        size = group["lr"] / (1 - first**steps)
        spread = (square / (1 - second**steps)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean, spread, value=-size)
        _keep(state, "exp_avg", mean)
        _keep(state, "exp_avg_sq", square)


def _keep(state: dict[str, Tensor], name: str, moment: Tensor) -> None:
    """Note a moment [any shape]: as codes and scales, or whole where it is small. The second moment is kept as its
    square root, whose range is half as many powers of ten."""
    if moment.numel() < SMALL:
        state[name] = moment
        return
    flat = (moment.sqrt() if name == "exp_avg_sq" else moment).reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    table = dynamic_map().to(flat.device)
    scaled = (blocks / scales.clamp_min(1e-38)[:, None]).view(-1)[: len(flat)]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True)
    state[name], state[f"{name}_scales"] = codes.to(torch.uint8), scales


def _kept(state: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The reverse of :func:`_keep`, float32 in the shape of ``like``."""
    codes = state[name]
    if codes.dtype != torch.uint8:
        return codes
    values = dynamic_map().to(codes.device)[codes.int()]
    values = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    values = (values * state[f"{name}_scales"][:, None]).view(-1)[: like.numel()].view(like.shape)
    return values.square_() if name == "exp_avg_sq" else values


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the groups marked ``linear``: a weight moves
    along its averaged gradient made orthogonal, as far as AdamW would move it (Liu et al., arXiv 2502.16982), so that
    rates and decay are AdamW's. Every other group is AdamW's own."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over every parameter with a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("linear")]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for weight in group["params"] if group.get("linear") else ():
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)

    def _move(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        average = state["momentum"].lerp_(grad, 1 - MOMENTUM)
        direction = orthogonal(grad.lerp(average, MOMENTUM))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the orthogonal matrix nearest to ``matrix`` [m, n] (its U Vᵀ), by Newton-Schulz steps in bfloat16 where
    this machine multiplies that faster."""
    fast = matrix.is_cuda or machine.best_dtype() == "bfloat16"
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).to(torch.bfloat16 if fast else torch.float32)
    wide = wide / wide.norm().clamp_min(1e-7)
    a, b, c = NEWTON
    for _ in range(NEWTON_STEPS):
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=b, alpha=c), wide, beta=a)
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).to(matrix.dtype)
