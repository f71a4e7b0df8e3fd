"""PiSSA (Meng et al., arXiv 2404.02948): LoRA that begins as the main part of a weight, W = (W - s B₀ A₀) + s B A.

    begin(wrapped)                      # A and B from the singular vectors, the rest stays in the base
    with as_lora(wrapped): ...          # the same sum as plain LoRA of twice the rank on W itself

What was taken out is kept, so that the saved adapter fits the base as everyone has it: s (B A - B₀ A₀) is the product
of [B, -B₀] and [A; A₀].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weitiao.methods.adapters import ADAPTER, layers

if TYPE_CHECKING:
    from torch import Tensor, nn

START = "pissa_start"  # attribute of the wrapped model: name of a linear -> A₀, B₀


def begin(model: Any) -> None:
    """Take the ``rank`` largest singular directions of every wrapped weight out of the base and into A and B."""
    import torch
    from torch import nn

    start = {}
    for name, layer in _layers(model).items():
        rank, scale = layer.r[ADAPTER], layer.scaling[ADAPTER]
        weight = layer.get_base_layer().weight.detach()
        weight = weight.T if _transposed(layer) else weight
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        root = (values[:rank] / scale).sqrt()
        # in the order in which a checkpoint holds them: the fused optimiser walks weights and moments side by side
        a, b = (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()
        missing = rank - len(root)  # where the weight itself has a lower rank
        a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
        layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data = a.clone(), b.clone()
        start[name] = (a, b)
        _add(layer, a, b, -scale)
    object.__setattr__(model, START, start)


def state(model: Any) -> dict[str, Tensor]:
    """A₀ and B₀ of every linear."""
    start = getattr(model, START)
    return {f"{name}.{part}": tensor for name, pair in start.items() for part, tensor in zip("ab", pair, strict=True)}


def restore(model: Any, kept: dict[str, Tensor]) -> None:
    """Put A₀ and B₀ of another beginning in the place of this one's."""
    start = getattr(model, START)
    for name, layer in _layers(model).items():
        before, scale = start[name], layer.scaling[ADAPTER]
        a, b = (kept[f"{name}.{part}"].to(before[0].device) for part in "ab")
        if not (a.equal(before[0]) and b.equal(before[1])):
            _add(layer, before[0], before[1], scale)
            _add(layer, a, b, -scale)
            start[name] = (a, b)


@contextmanager
def as_lora(model: Any) -> Iterator[None]:
    """Inside the block the adapter is plain LoRA of twice the rank and alpha, for saving; the base is not touched."""
    import torch
    from torch import nn

    config = model.peft_config[ADAPTER]
    former = {name: getattr(config, name) for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    scale = 2 if not config.use_rslora else 2**0.5
    kept = {}
    for name, layer in _layers(model).items():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        kept[name] = (a, b)
        first, second = getattr(model, START)[name]
        layer.lora_A[ADAPTER].weight = nn.Parameter(torch.cat((a.detach(), first)))
        layer.lora_B[ADAPTER].weight = nn.Parameter(torch.cat((b.detach(), -second), dim=1))
    config.r, config.lora_alpha = 2 * config.r, scale * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: scale * alpha for name, alpha in config.alpha_pattern.items()}
    try:
        yield
    finally:
        for name, layer in _layers(model).items():
            layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight = kept[name]
        for name, value in former.items():
            setattr(config, name, value)


def _layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora.layer import LoraLayer

    return layers(model, LoraLayer)


def _transposed(layer: Any) -> bool:
    return bool(getattr(layer, "fan_in_fan_out", False))


def _add(layer: Any, a: Tensor, b: Tensor, scale: float) -> None:
    """Add ``scale`` · B A to the base's weight, in float32 and rounded once; codes stay as they are, and the product is
    taken off what they stand for."""
    from weitiao.models.quantized import QuantizedLinear

    base = layer.get_base_layer()
    if isinstance(base, QuantizedLinear):
        base.taken = (-scale * b, a) if scale < 0 else None
        return
    weight: nn.Parameter = base.weight
    product = scale * (b @ a)
    weight.data = (weight.data.float() + (product.T if _transposed(layer) else product)).to(weight.dtype)
