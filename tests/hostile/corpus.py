"""Hostile files made by seed: nothing is copied from anywhere, and what would run only leaves a mark.

    for case in hostile(seed=0): case.write(folder)

A case is a few files, the way a person would open them, and whether that must be refused. A payload that runs creates
the file CANARY where the process stands, which is the folder of the case.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tests.hostile.case import Case
from tests.hostile.folders import adapters, configurations, templates, tokenizers
from tests.hostile.lying import ggufs, headers
from tests.hostile.pickled import archives, gadgets, machines

HOSTILE: tuple[Callable[[random.Random], Iterator[Case]], ...] = (
    gadgets,
    machines,
    archives,
    headers,
    ggufs,
    configurations,
    tokenizers,
    templates,
    adapters,
)


def hostile(seed: int) -> list[Case]:
    """Every hostile case, in an order that depends on nothing but the seed."""
    return [case for make in HOSTILE for case in make(random.Random(f"{seed} {make.__name__}"))]
