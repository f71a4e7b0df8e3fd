"""A mixture's experts in codes: what their family keeps as one tensor becomes a linear of codes for each expert.

    put_in_codes(model, "nf4")     # called by models.quantized
    put_back(model, torch.bfloat16)

Families whose experts transformers can compute in more than one way are known by that (its experts interface, where the
computation with codes is registered as one more way); experts of any other family stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from weitiao.models.quantized import Kind, QuantizedLinear

NAME, PLAIN = "weitiao_codes", "grouped_mm"  # ways to compute experts: with codes, and transformers' default
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
CODES = "_codes"  # ends the name of what stands in a weight's place


class ExpertLinear(QuantizedLinear):
    """The codes of one expert's matrix: part of a stack, and no linear that a method could choose."""

    of_a_stack = True


def mixtures(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every mixture that transformers' experts interface computes."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "_is_expert_parallel"))


def put_in_codes(model: nn.Module, kind: Kind, double: bool, training: Collection[str]) -> int:
    """Codes in the place of the experts' weights that are not among ``training``; returns how many tensors it were."""
    done = 0
    for name, mixture in mixtures(model):
        for own in WEIGHTS:
            weight = mixture._parameters.get(own)
            if weight is None or f"{name}.{own}" in training:
                continue
            delattr(mixture, own)
            setattr(mixture, own + CODES, nn.ModuleList(_coded(mixture, one, kind, double) for one in weight.detach()))
            ExpertsInterface.register(NAME, forward)
            mixture.config._experts_implementation = NAME
            done += 1
    return done


def _coded(mixture: Any, weight: Tensor, kind: Kind, double: bool) -> ExpertLinear:
    """One expert's matrix, [in, out] where its mixture says so."""
    weight = weight.T if mixture.is_transposed else weight
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return ExpertLinear(linear, kind, double)


def forward(mixture: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What transformers' own give: ``hidden`` [S, H], and of each row the experts it is sent to, ``index`` [S, k], with
    their ``weights`` [S, k], to [S, H]. One expert's codes are spread out at a time."""
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        rows, places = (index == expert).nonzero(as_tuple=True)
        inner = _product(mixture, WEIGHTS[0] if mixture.has_gate else WEIGHTS[1], hidden[rows], expert)
        inner = mixture._apply_gate(inner) if mixture.has_gate else mixture.act_fn(inner)
        said = _product(mixture, WEIGHTS[2], inner, expert)
        said = mixture.post_expert_norm(said) if mixture.has_post_expert_norm else said
        out.index_add_(0, rows, (said * weights[rows, places, None]).to(out.dtype))
    return out


def _product(mixture: Any, own: str, inputs: Tensor, expert: int) -> Tensor:
    """One expert's product, of codes or, where they train, of the weights."""
    bias = getattr(mixture, f"{own}_bias")[expert] if mixture.has_bias else 0
    if (codes := getattr(mixture, own + CODES, None)) is not None:
        return codes[expert](inputs) + bias
    weight = getattr(mixture, own)[expert]
    return nn.functional.linear(inputs, weight.T if mixture.is_transposed else weight) + bias


def spread(mixture: Any, own: str, dtype: torch.dtype) -> Tensor:
    """The tensor [experts, …] that a stack of codes stands for, as its family keeps it."""
    weights = [codes.spread(dtype) for codes in getattr(mixture, own + CODES)]
    return torch.stack([weight.T if mixture.is_transposed else weight for weight in weights])


def put_back(model: nn.Module, dtype: torch.dtype) -> None:
    """Plain tensors in the place of codes again."""
    for _, mixture in mixtures(model):
        for own in WEIGHTS:
            if hasattr(mixture, own + CODES):
                weight = nn.Parameter(spread(mixture, own, dtype), requires_grad=False)
                delattr(mixture, own + CODES)
                setattr(mixture, own, weight)
                mixture.config._experts_implementation = PLAIN


def plain_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of :func:`spread` by the names that a plain model has for them."""
    return {
        f"{name}.{own}": spread(mixture, own, dtype)
        for name, mixture in mixtures(model)
        for own in WEIGHTS
        if hasattr(mixture, own + CODES)
    }
