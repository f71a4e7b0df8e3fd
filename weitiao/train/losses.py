"""Losses: pure functions from a model's outputs to a sum. The loop divides by the step's count of trained tokens.

nll(logps, mask).backward()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def nll(logps: Tensor, mask: Tensor) -> Tensor:
    """Sum of negative log-likelihoods, in nats.

    ``logps`` [N] are the trained positions of a batch, row by row; ``mask`` [B, T] says which those are (a loss over
    whole rows needs it, this one does not).
    """
    return -logps.sum()


def classification(scores: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of what a head's scores [B, L] cost: cross-entropy where ``labels`` are classes (int64 [B]), the
    mean over labels of the binary cross-entropy where they are marks (float [B, L]), the squared error where they are
    numbers (float [B])."""
    from torch.nn import functional as F

    if not labels.is_floating_point():
        return F.cross_entropy(scores, labels, reduction="sum")
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(1).sum()
    return F.mse_loss(scores[:, 0], labels, reduction="sum")
