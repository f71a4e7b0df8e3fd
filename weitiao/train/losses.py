"""Losses: pure functions from log-probabilities to a sum. The loop divides by the step's count of trained tokens.

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
