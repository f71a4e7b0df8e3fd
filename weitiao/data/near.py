"""Near duplicates: rows that say almost the same, found by MinHash without comparing every pair.

    own = index(rows, seed=0)
    near(own, threshold=0.8)                # [Near(row=7, like=2, similarity=0.91)]: row 7 is much like row 2
    near(index(test), index(train))         # rows of test that are much like a row of train

A row's words become a set of pieces of three characters (white space, punctuation and case apart). Two sets of Jaccard
similarity s agree in one minimum with chance s (Broder, 1997), so in one of the bands with 1 - (1 - s^5)^20: 0.9996 at
0.8. What shares a band is compared exactly. An index takes 160 bytes a row, and rows whose calls or labels differ are
never alike: the difference is what they teach.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from weitiao.data.rows import Chat, Labelled, Message, Pair, Row, Text

BANDS, ROWS_OF_BAND = 20, 5
PIECE = 3  # characters
AT_ONCE = 2048  # pieces hashed together, so that a book of a row takes no more memory than a page
FEW = 8  # rows of one band that a row is compared with at most
THRESHOLD = 0.8


@dataclass(frozen=True)
class Index:
    """The words of rows, and the bands of each: uint64 [rows, BANDS]."""

    texts: Sequence[str]
    keys: np.ndarray


@dataclass(frozen=True)
class Near:
    """``row`` is much like ``like``: the Jaccard similarity of their pieces."""

    row: int
    like: int
    similarity: float


def words_of(row: Row) -> str:
    """What a row's user and assistant say. What many rows share (system prompts, results) is no likeness."""
    if isinstance(row, Text | Labelled):
        return row.text
    messages = (*row.prompt, *row.chosen, *row.rejected) if isinstance(row, Pair) else row.messages
    return "\n".join(message.content for message in messages if message.role in ("user", "assistant"))


def lesson_of(row: Row) -> str:
    """What a row teaches beside words: its calls, or its label."""
    if isinstance(row, Labelled):
        return repr(row.label)
    calls = row.messages if isinstance(row, Chat) else ()
    return json.dumps([_calls(message) for message in calls if message.calls], ensure_ascii=False, sort_keys=True)


def _calls(message: Message) -> list[tuple[str, dict[str, object]]]:
    return [(call.name, dict(call.arguments)) for call in message.calls]


def index(rows: Sequence[Row], seed: int = 0) -> Index:
    """The index of ``rows``; two that are compared need the same ``seed``."""
    random = np.random.default_rng(seed)
    shape = (BANDS * ROWS_OF_BAND, 2)
    factors, shifts = random.integers(0, 2**63, shape, dtype=np.uint64).T.copy()
    keys = np.empty((len(rows), BANDS), dtype=np.uint64)
    texts = [words_of(row) for row in rows]
    for place, row in enumerate(rows):
        minima = _minima(pieces(texts[place]), factors | np.uint64(1), shifts).reshape(BANDS, ROWS_OF_BAND)
        lesson = hashlib.sha256(lesson_of(row).encode("utf-8", "surrogatepass")).digest()
        keys[place] = _mixed(_joined(minima.T) ^ np.frombuffer(lesson[:8], dtype=np.uint64))
    return Index(texts, keys)


def pieces(text: str) -> np.ndarray:
    """The set of a text's pieces as sorted 64-bit hashes: letters and digits alone, three at a time."""
    plain = "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold())) or text
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    size = min(PIECE, len(codes))
    windows = [codes[start : len(codes) - size + 1 + start] for start in range(size)]
    return np.unique(_mixed(_joined(windows))) if size else np.zeros(1, dtype=np.uint64)


def _joined(columns: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Several columns of numbers as one: a polynomial modulo 2^64."""
    found = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        found = found * np.uint64(0x100000001B3) + column.astype(np.uint64) + np.uint64(1)
    return found


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit spread over all bits (the end of splitmix64; Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _minima(found: np.ndarray, factors: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """The least value of the pieces under each of the hash functions: uint64 [functions]."""
    least = np.full(len(factors), 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(found), AT_ONCE):
        some = (found[start : start + AT_ONCE, None] * factors + shifts) >> np.uint64(32)
        np.minimum(least, some.min(axis=0), out=least)
    return least


def near(own: Index, other: Index | None = None, threshold: float = THRESHOLD) -> list[Near]:
    """Rows of ``own`` that are at least ``threshold`` like an earlier one, or like one of ``other``; each row once."""
    before = 0 if other is None else len(other.texts)
    texts = [*(other.texts if other else ()), *own.texts]
    keys = own.keys if other is None else np.concatenate([other.keys, own.keys])
    likeness = _likeness(texts)
    found: dict[int, Near] = {}
    for band in range(BANDS):
        for group in _groups(keys[:, band]):
            leaders = [place for place in group[:FEW] if place < before]
            for place in group:
                if place < before or place in found:
                    continue
                alike = next((one for one in leaders if likeness(one, place, threshold) >= threshold), None)
                if alike is not None:
                    found[place] = Near(place - before, alike, likeness(alike, place, 0))
                elif other is None and len(leaders) < FEW:
                    leaders.append(place)
    return sorted(found.values(), key=lambda one: one.row)


def _groups(column: np.ndarray) -> Iterator[list[int]]:
    """The places of equal values, in order, where there are at least two."""
    order = np.argsort(column, kind="stable")
    edges = np.flatnonzero(np.diff(column[order])) + 1
    starts, stops = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
    for start, stop in zip(starts[stops - starts > 1], stops[stops - starts > 1], strict=True):
        yield order[start:stop].tolist()


def _likeness(texts: Sequence[str]) -> Callable[[int, int, float], float]:
    """The Jaccard similarity of two texts' pieces; 0 where their numbers alone keep it under the third argument."""

    @lru_cache(maxsize=4096)
    def known(place: int) -> np.ndarray:
        return pieces(texts[place])

    def likeness(first: int, second: int, least: float) -> float:
        one, two = known(first), known(second)
        if min(len(one), len(two)) < least * max(len(one), len(two)):
            return 0.0
        common = len(np.intersect1d(one, two, assume_unique=True))
        return common / (len(one) + len(two) - common)

    return likeness
