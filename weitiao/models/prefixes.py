"""What rows of a micro-batch begin with in common, such as a system prompt and the schemas of tools: it is computed
once, and the rows branch off behind it (tree attention).

    layout = Layout.of(ids, lengths)            # which rows, and how many tokens
    fronts = Fronts.of(layout, lengths, T)      # which tokens are computed, and where the others are to be had

A causal model makes the same of the same tokens, whatever comes behind them, so nothing is approximated: a row's
queries see the keys of its own tokens and those of the row that has the common ones, whose gradients are summed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEAST = 16  # tokens in common that are worth it
OPTION = "rows_layout"  # by which a layout comes to a model's blocks


class Layout(NamedTuple):
    """The rows of ids [B, T], int64 [B] each: their ``lengths``, the earlier row (or the row itself) that has the
    tokens which they begin with in common, and how ``many`` these are; of a row that has them, the most that another
    shares.
    """

    width: int  # T
    lengths: Tensor
    leaders: Tensor
    many: Tensor

    @classmethod
    def of(cls, ids: Tensor, lengths: Tensor) -> Layout:
        """Every row follows the one that it shares most with, of those that follow none; one token stays its own."""
        rows = [row[:size] for row, size in zip(ids.numpy(), lengths.tolist(), strict=True)]
        leaders, many = followed(rows)
        return cls(ids.shape[1], lengths, torch.tensor(leaders), torch.tensor(many))


def followed(rows: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """The leader of every row and how many tokens are in common, as a :class:`Layout` has them."""
    leaders, many, heads = [*range(len(rows))], [0] * len(rows), list[int]()
    for number, row in enumerate(rows):
        shared = [common(row[:-1], rows[head]) for head in heads]
        most = max(shared, default=0)
        if most < LEAST:
            heads.append(number)
            continue
        leaders[number], many[number] = heads[shared.index(most)], most
        many[leaders[number]] = max(most, many[leaders[number]])
    return leaders, many


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many numbers both begin with."""
    size = min(len(one), len(other))
    same = one[:size] == other[:size]
    return size if same.all() else int(same.argmin())


class Fronts(NamedTuple):
    """Of the [B · T] tokens of a layout those that are ``computed`` (int64 [N]), the ``real`` ones (all but padding,
    int64 [M]), the ``sources`` of these among the computed (int64 [M]), and the ``table`` for attention: for every row
    the first token of what it has in front in common, the number of these, the sum of such numbers before it, and
    behind all of them their sum (int64 [3 B + 1])."""

    computed: Tensor
    starts: Tensor  # int64 [B + 1]: where each row's own tokens begin among the computed
    real: Tensor
    sources: Tensor
    table: Tensor

    @classmethod
    def of(cls, layout: Layout, length: int) -> Fronts | None:
        """For hidden states of ``length`` tokens a row, which may begin with virtual ones, that all have in common.
        None where no row has anything in common with another."""
        if not layout.many.any():
            return None
        virtual, rows = length - layout.width, torch.arange(len(layout.many))
        many = torch.where(layout.many > 0, layout.many + virtual, 0)
        places, own = torch.arange(length), layout.leaders == rows
        real = places < (layout.lengths + virtual)[:, None]
        borrowed = (places < many[:, None]) & ~own[:, None]
        numbers = (real & ~borrowed).flatten().cumsum(0).view(real.shape) - 1
        starts = torch.cat([many.new_zeros(1), (real & ~borrowed).sum(1).cumsum(0)])
        sources = torch.where(borrowed, numbers[layout.leaders], numbers)
        before = torch.cat([many.new_zeros(1), many.cumsum(0)])
        return cls(
            (real & ~borrowed).flatten().nonzero()[:, 0],
            starts,
            real.flatten().nonzero()[:, 0],
            sources[real],
            torch.cat([starts[layout.leaders], many, before]),
        )
