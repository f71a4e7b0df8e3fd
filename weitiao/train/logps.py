"""Log-probabilities of the trained tokens: the one place of training that touches logits.

    logps = token_logps(model, ids, None, mask)     # [N], N = trained positions of the batch

The head runs only where a token is trained, a few rows at a time, so that the logits of a batch never exist at once;
and the gradient that a summed loss will ask for is formed while a piece's softmax is still in the cache (the idea of
fused linear cross-entropy, arXiv 2410.10989), so that the head runs once and not twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from weitiao.models import modules
from weitiao.models.block import layout
from weitiao.models.kernels import target_logps
from weitiao.models.products import at_weight, available, summed

CHUNK_ROWS = 128  # positions in one piece at least: with fewer a product is slower
CHUNK_ELEMENTS = 1 << 25  # logits of one piece otherwise


def token_logps(
    model: nn.Module, ids: Tensor, attention: Tensor | None, mask: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Log-probability of every trained token given what stands before it: float32 [N], row by row.

    ``ids`` [B, T]; ``attention`` [B, T] or None where every token may be seen by those behind it (right padding needs
    none: a causal model never looks at what follows); ``mask`` [B, T], true at trained tokens; ``lengths`` [B]: what
    lies behind so many tokens of a row is padding, which then need not be computed. A row's first token is never
    predicted, so it is not counted.
    """
    hidden = hidden_states(model, ids, attention, lengths)[:, :-1]
    trained = mask[:, 1:]
    return head_logps(model, hidden[trained], ids[:, 1:][trained])


def hidden_states(model: nn.Module, ids: Tensor, attention: Tensor | None, lengths: Tensor | None = None) -> Tensor:
    """The last layer's output [B, T, H]; virtual tokens that a method puts in front are cut off again."""
    options = {} if lengths is None else layout(model, ids, lengths)
    outputs = modules.backbone(model)(input_ids=ids, attention_mask=attention, use_cache=False, **options)
    return outputs.last_hidden_state[:, -ids.shape[1] :]


def head_logps(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of ``targets`` [N] under the model's head applied to ``hidden`` [N, H]."""
    head, device = modules.head(model), hidden.device.type
    if type(head) is nn.Linear and head.bias is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        return _LinearLogps.apply(hidden.to(dtype), head.weight, targets, torch.is_grad_enabled())  # pyright: ignore
    if not len(targets):
        return hidden.sum(-1).float()  # empty, and still part of the graph
    pieces = [
        checkpoint(_logps, head, h, y, use_reentrant=False)
        for _, h, y in _pieces(hidden, targets, modules.embedding(model).weight.shape[0])
    ]
    return torch.cat(pieces)  # pyright: ignore[reportArgumentType]


def _logps(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same by autograd, for a head that is more than a matrix: wrapped by a method, scaled, capped, or BERT's."""
    return head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits are computed together."""
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)


class _LinearLogps(torch.autograd.Function):
    """logps of a linear head. The forward pass keeps d(sum of logps)/d(hidden) per row, which serves any gradient, and
    d(sum of logps)/d(weight), which serves one that is equal for all rows; for others the pieces run again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> Tensor:
        needs_hidden, needs_weight = (keep and needed for needed in ctx.needs_input_grad[:2])
        cast = weight.to(hidden.dtype)
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for rows, h, y in _pieces(hidden, targets, len(weight)):
            logits = _product(h, cast.t())
            logps[rows] = target_logps(logits, y, needs_hidden or needs_weight)
            _add_gradients(logits, h, cast, grad_hidden, grad_weight, rows)
        ctx.save_for_backward(hidden, weight, targets, grad_hidden, grad_weight)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = outputs
        hidden, weight, targets, grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None and len(grad):
            if bool((grad == grad[0]).all()):
                grad_weight = grad_weight * grad[0]
            else:
                grad_weight = torch.zeros_like(grad_weight)
                cast = weight.to(hidden.dtype)
                for rows, h, y in _pieces(hidden, targets, len(weight)):
                    logits = _product(h, cast.t())
                    target_logps(logits, y, True)
                    _add_gradients(logits.mul_(grad[rows, None]), h, cast, None, grad_weight, rows)
            grad_weight = grad_weight.to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad[:, None].to(grad_hidden.dtype)
        return grad_hidden, grad_weight, None, None


def _pieces(hidden: Tensor, targets: Tensor, vocabulary: int):
    """(slice, hidden rows, target rows) of one piece after another."""
    count = -(-len(targets) // chunk_rows(vocabulary))
    for piece in range(count):
        rows = slice(len(targets) * piece // count, len(targets) * (piece + 1) // count)
        yield rows, hidden[rows], targets[rows]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In the dtype of both, whatever autocast says."""
    with torch.autocast(left.device.type, enabled=False):
        if left.device.type == "cpu" and available(left.dtype) and left.stride(1) == 1:
            across = right.stride(1) == 1
            return summed([(left, right if across else right.t(), across)])
        return left @ right


def _add_gradients(
    steep: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    rows: slice,
) -> None:
    """Add what one piece's gradient at its logits [n, V] comes to at its hidden states and at the weight."""
    if grad_hidden is not None:
        grad_hidden[rows] = _product(steep, weight)
    if grad_weight is not None:
        with torch.autocast(hidden.device.type, enabled=False):
            at_weight(steep, hidden, onto=grad_weight)
