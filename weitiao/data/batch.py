"""Examples to batches: which rows make up a step, how a step is cut into micro-batches, and the tensors of one.

    steps = plan_epoch([len(e) for e in examples], batch_size=8, micro_batch_tokens=4096, seed=0, epoch=0)
    for step in steps:
        for rows in step:
            batch = collate([examples[i] for i in rows], pad_id)

Which rows share a step is drawn at random and depends on nothing but the number of rows, ``batch_size``, ``seed`` and
``epoch``. Lengths are looked at only inside a step: its rows are sorted and cut where that saves the most padding.
Steps made of rows of like length would pad a little less, but they make gradients of one kind of row at a time (all
the short calls, then all the long answers), and a step would no longer be an even draw from the data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from weitiao.errors import InputError, t

if TYPE_CHECKING:
    import torch

SPREAD = 4  # times the bound that a micro-batch without padding may have with it: embeddings and the last norm have it
COMPARED = 500_000  # rows at most whose beginnings are compared
START_TOKENS = 128  # what starting one more micro-batch costs: padding below it is cheaper than a cut


@dataclass(frozen=True, eq=False)
class Example:
    """One row as tokens. ``ids``: int32 [T]; ``mask``: bool [T], true where the token is a training target; ``labels``:
    of a labelled text its class (int64 []), a mark for each class (float32 [labels]) or its number (float32 [])."""

    ids: np.ndarray
    mask: np.ndarray
    id: str = ""
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Targets that really are predicted: the first token of a row has nothing before it, and a label is one."""
        return int(self.mask[1:].sum()) if self.labels is None else 1


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors of one micro-batch, all [B, T]: ``ids`` int64, ``mask`` bool (true where the token is a
    training target, as in ``Example``, not shifted), ``attention`` int64 (1 where there is a token); and the rows'
    ``labels`` [B, …], if they have any."""

    ids: torch.Tensor
    mask: torch.Tensor
    attention: torch.Tensor
    labels: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.ids.to(device), self.mask.to(device), self.attention.to(device), labels)


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """The tokens of every example, int64 [rows]; of mapped ones without looking at them."""
    known = getattr(examples, "lengths", None)
    return np.array([len(example) for example in examples] if known is None else known, dtype=np.int64)


def trained_of(examples: Sequence[Example]) -> np.ndarray:
    """The trained tokens of every example, int64 [rows]; of mapped ones without looking at them."""
    known = getattr(examples, "trained", None)
    return np.array([example.trained_tokens for example in examples] if known is None else known, dtype=np.int64)


class Steps(Sequence[list[list[int]]]):
    """The steps of an epoch, each cut into micro-batches when it is asked for: there may be a million."""

    def __init__(self, order: np.ndarray, size: int, cut: Callable[[list[int]], list[list[int]]]):
        self.order, self.size, self.cut = order, size, cut

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    @overload
    def __getitem__(self, index: int) -> list[list[int]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[list[int]]]: ...
    def __getitem__(self, index: int | slice) -> list[list[int]] | list[list[list[int]]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self.size
        return self.cut(self.order[start : start + self.size].tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps) and list(self) == list(other)


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    micro_batch_tokens: int | None,
    seed: int,
    epoch: int,
    *,
    padded: bool = True,
    shared: Sequence[int] | None = None,
    processes: int = 1,
) -> Steps:
    """The epoch as steps, each a list of micro-batches, each a list of indices into ``lengths``.

    Every row occurs exactly once; every step but the last has ``batch_size`` rows. A micro-batch holds at most
    ``micro_batch_tokens`` tokens (None: no bound), or one row that is longer by itself; this bound moves rows between
    micro-batches of one step and never between steps. Padding (rows × ``padded_length``) counts where it is
    ``padded``, that is, computed; what rows have in common in front counts once where it is ``shared``
    (:func:`shared_tokens`). A step's rows are dealt to as many ``processes`` before they are cut, and the micro-batch
    number i is that of the process i mod ``processes``; those of a process that has fewer than others are empty.
    """
    if batch_size < 1 or (micro_batch_tokens is not None and micro_batch_tokens < 1):
        raise InputError(t("batch_size and micro_batch_tokens must be at least 1"))
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths))

    def cut(rows: list[int]) -> list[list[int]]:
        tokens = {row: int(lengths[row]) for row in rows}
        hands = deal(rows, tokens, processes)
        parts = [micro_batches(hand, tokens, micro_batch_tokens, padded, shared) for hand in hands]
        most = max(map(len, parts))
        return [part[number] if number < len(part) else [] for number in range(most) for part in parts]

    return Steps(order, batch_size, cut)


def deal(rows: Sequence[int], lengths: Mapping[int, int] | Sequence[int], processes: int) -> list[list[int]]:
    """``rows`` in as many parts, of as many rows and about as many tokens each: the longest are dealt first, and every
    other round backwards."""
    if processes == 1:
        return [list(rows)]
    order = sorted(rows, key=lambda row: (-lengths[row], row))
    hands: list[list[int]] = [[] for _ in range(processes)]
    for start in range(0, len(order), processes):
        turn = hands if start // processes % 2 == 0 else hands[::-1]
        for hand, row in zip(turn, order[start : start + processes], strict=False):
            hand.append(row)
    return hands


def micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int] | Mapping[int, int],
    bound: int | None,
    padded: bool = True,
    shared: Sequence[int] | None = None,
) -> list[list[int]]:
    """``rows`` sorted from long to short (the largest memory first) and cut within ``bound``: where padding is
    computed, so that it and ``START_TOKENS`` per micro-batch are least, else into as few parts as will do, as even as
    can be."""
    rows = sorted(rows, key=lambda row: (-lengths[row], row))
    places: Sequence[int] = range(len(rows) + 1)
    if rows and _fits(rows, lengths, bound, padded):  # more parts never help, nor do cuts between rows of one length
        if not padded:
            return [rows]
        sizes = [padded_length(lengths[row]) for row in rows]
        places = [0, *(place for place in places[1:-1] if sizes[place] != sizes[place - 1]), len(rows)]
    costs, cuts = [(0, 0)] + [(0, 0)] * len(rows), [0] * (len(rows) + 1)
    for number, end in enumerate(places[1:], 1):
        best = None
        tokens = common = 0
        for start in reversed(places[:number]):
            row = rows[start]
            if padded:
                tokens = (end - start) * padded_length(lengths[row])
            else:
                begun = shared[row] if shared is not None else 0
                tokens += lengths[row] - (begun if common else 0)
                common = common or begun
            spread = 0 if padded else (end - start) * padded_length(lengths[rows[start]])
            if bound is not None and max(tokens, spread // SPREAD) > bound and end - start > 1:
                break  # further rows are longer still
            before = costs[start]
            cost = (before[0] + tokens + START_TOKENS, 0) if padded else (before[0] + 1, before[1] + tokens * tokens)
            if best is None or cost <= best:
                best, costs[end], cuts[end] = cost, cost, start
    batches: list[list[int]] = []
    end = len(rows)
    while end:
        batches.append(rows[cuts[end] : end])
        end = cuts[end]
    return batches[::-1]


def _fits(rows: Sequence[int], lengths: Mapping[int, int] | Sequence[int], bound: int | None, padded: bool) -> bool:
    """Whether all of ``rows``, the longest first, may be one micro-batch."""
    spread = len(rows) * padded_length(lengths[rows[0]])
    return bound is None or (spread if padded else max(sum(lengths[row] for row in rows), spread // SPREAD)) <= bound


def shared_tokens(examples: Sequence[Example]) -> np.ndarray:
    """What examples have in common in front, such as a system prompt, int64 [rows]: one number for all that begin with
    those tokens, most of the largest group that begins alike, and 0 for the others, and for all of very many. How rows
    are cut into micro-batches depends on it; what these have in common is found again in each."""
    from weitiao.models.prefixes import LEAST, common

    found = np.zeros(len(examples), dtype=np.int64)
    if len(examples) > COMPARED:  # to look at each would take longer than a start may
        return found
    groups: dict[bytes, list[int]] = {}
    for row, example in enumerate(examples):
        groups.setdefault(example.ids[:LEAST].tobytes(), []).append(row)
    alike = max(groups.values(), key=len, default=[])
    if len(alike) < 2:
        return found
    first = examples[alike[0]].ids
    begun = np.array([common(first, examples[row].ids[:-1]) for row in alike])
    number = int(np.median(begun[1:]))
    if number >= LEAST:
        found[np.array(alike)[begun >= number]] = number
    return found


def padded_length(length: int) -> int:
    """What a row of ``length`` tokens is padded to: a multiple of 8, of 32 from 64 on. oneDNN compiles a kernel for
    every size of a product that it meets, which takes longer than the product, so few sizes are worth some padding."""
    multiple = 8 if length <= 64 else 32
    return -(-length // multiple) * multiple


def collate(examples: Sequence[Example], pad_id: int, positions: int | None = None) -> Batch:
    """``examples`` as one right-padded batch, no longer than ``positions`` where a model has only so many; padding is
    never attended to and never a target."""
    import torch

    longest = max(len(example) for example in examples)
    shape = (len(examples), max(longest, min(padded_length(longest), positions or sys.maxsize)))
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    attention = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = example.ids
        mask[row, : len(example)] = example.mask
        attention[row, : len(example)] = 1
    given = [example.labels for example in examples if example.labels is not None]
    labels = torch.from_numpy(np.stack(given)) if given else None
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(attention), labels)


class Packed(Sequence[Example]):
    """Documents laid end to end in ``order`` and cut into rows of ``length`` tokens, each made when it is asked for."""

    def __init__(self, examples: Sequence[Example], order: np.ndarray, length: int):
        self.examples, self.order, self.length = examples, order, length
        self.ends = np.cumsum(lengths_of(examples)[order])
        self.tokens = int(self.ends[-1]) if len(order) else 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row."""
        starts = np.arange(len(self)) * self.length
        return np.minimum(self.length, self.tokens - starts)

    def __len__(self) -> int:
        return -(-max(self.tokens - 1, 0) // self.length)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        start, end = row * self.length, min((row + 1) * self.length, self.tokens)
        first, last = np.searchsorted(self.ends, [start, end - 1], "right").tolist()
        parts = [self.examples[place] for place in self.order[first : last + 1].tolist()]
        skipped = start - (int(self.ends[first - 1]) if first else 0)
        ids, mask = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "mask"))
        own = slice(skipped, skipped + end - start)
        return Example(ids[own], mask[own], f"packed:{row}")


def pack(examples: Sequence[Example], length: int, *, seed: int, epoch: int) -> Packed:
    """Documents laid end to end and cut into rows of ``length`` tokens (the last row may be shorter), in an order drawn
    from ``seed`` and ``epoch``. No token is lost or repeated, except that a single one left over at the very end, which
    nothing could predict, is dropped. The eos that ends every document separates it from the next; attention is not
    cut there, as is usual in pretraining.
    """
    if length < 2:
        raise InputError(t("packed rows need at least 2 tokens, not {length}", length=length))
    return Packed(examples, np.random.default_rng((seed, epoch)).permutation(len(examples)), length)
