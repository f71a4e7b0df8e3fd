"""Replay: general rows among the training rows, so that what the base knew is not forgotten.

    load(DataOptions(train="mine.jsonl", replay="general.jsonl", replay_share=0.2), "sft")     # a fifth is general

Which rows are replayed and where they stand follows from the seed. They are trained on and never measured: validation
and test hold the person's own rows only. A file of them is read in its own layout, whatever ``data.format`` says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from weitiao.data.rows import Row
from weitiao.data.sources import DataOptions, Generators, Splits, load
from weitiao.errors import t


def replayed(own: Splits, options: DataOptions, task: str, generators: Generators, seed: int) -> Splits:
    """``own`` with as many replayed rows as make up ``options.replay_share`` of the training rows, or all there are,
    which is said. InputError where the replayed rows cannot be used."""
    plain = {"train": options.replay, "replay": None, "validation": None, "test": None, "format": "auto"}
    plain |= {"columns": {}, "template": None, "folder": None, "patch": None}
    found = load(options.model_copy(update=plain), task, generators=generators, seed=seed)
    wanted = max(1, round(len(own.train) * options.replay_share / (1 - options.replay_share)))
    taken = random.Random(f"replay {seed}").sample(found.train, min(wanted, len(found.train)))
    train, places = interleaved(own.train, taken, seed)
    names = ", ".join([options.replay] if isinstance(options.replay, str) else options.replay or [])
    share = round(100 * len(taken) / max(len(train), 1), 1)
    if len(taken) < wanted:
        message = "replay: all {count} rows of {names}, {share} % of the training rows; {wanted} were wanted"
        said = t(message, count=len(taken), names=names, share=share, wanted=wanted)
    else:
        said = t(
            "replay: {count} rows of {names}, {share} % of the training rows",
            count=len(taken),
            names=names,
            share=share,
        )
    return replace(own, train=train, said=[*own.said, *found.said, said], replayed=places)


def interleaved(own: Sequence[Row], taken: Sequence[Row], seed: int) -> tuple[list[Row], frozenset[int]]:
    """``own`` in their order with ``taken`` in theirs at places drawn from the seed; and those places."""
    total = len(own) + len(taken)
    places = frozenset(random.Random(f"places {seed}").sample(range(total), len(taken)))
    ours, theirs = iter(own), iter(taken)
    return [next(theirs) if place in places else next(ours) for place in range(total)], places
