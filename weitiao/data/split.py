"""Splits: rows are dealt to train, validation and test by dialogue, and stay where they are when rows are added.

    train, validation, test = split(rows, (0.8, 0.1, 0.1), seed=0)

A row's group (its dialogue; without one, its content, so that two equal rows are never torn apart) is hashed with the
seed to a number in [0, 1), and the shares cut that interval. Only a part that would stay empty takes a group from the
fullest; with strata, each of these is dealt by itself, so that a rare class is in every part. A row that would stay
where it is whatever is added cannot also make counts exact: shares are met on average.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from weitiao.data.rows import Row, Text
from weitiao.errors import InputError, first_of, t
from weitiao.runs import write_atomic

if TYPE_CHECKING:
    import numpy as np

RowT = TypeVar("RowT")
SHARES = (0.8, 0.1, 0.1)
PARTS = ("train", "validation", "test")


def group_of(row: Row) -> str:
    """What must not be torn apart: the row's own group, or its content without its id."""
    return f"group:{row.group}" if row.group is not None else content_of(row)


def content_of(row: Row) -> str:
    """What a row says, whatever it is called: equal for exact duplicates."""
    if isinstance(row, Text):  # the same, five times as fast, for millions of them
        return f"Text(text={row.text!r}, id='', group=None)"
    return repr(replace(row, id="", group=None))


def repeated(rows: Sequence[Row]) -> dict[int, int]:
    """The place of every row that says exactly what an earlier one says, and the place of the first that says so."""
    first: dict[bytes, int] = {}
    places = [first.setdefault(content_digest(row), place) for place, row in enumerate(rows)]
    return {place: before for place, before in enumerate(places) if before != place}


def content_digest(row: Row) -> bytes:
    """16 bytes that stand for what a row says."""
    return hashlib.sha256(content_of(row).encode("utf-8", "surrogatepass")).digest()[:16]


def place_of(group: str, seed: int) -> float:
    """The group's place in [0, 1): the first 8 bytes of the sha256 of seed and group."""
    digest = hashlib.sha256(f"{seed}\n{group}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split(
    rows: Sequence[RowT],
    shares: Sequence[float] = SHARES,
    *,
    group: Callable[[Any], str] = group_of,
    stratum: Callable[[Any], str] | None = None,
    seed: int = 0,
) -> list[list[RowT]]:
    """``rows`` in parts of about ``shares`` (which sum to 1), in their order, no group in two parts.

    Parts are filled by hash, so that adding rows moves none that are there. Where that leaves a part with a share
    empty, it takes the group nearest to its interval from the part with most groups: with as many groups as parts
    none stays empty, and with fewer the first part does not. With a ``stratum`` (a class of rows; a group belongs to
    that of most of its rows) this holds for every stratum. InputError if the shares are not shares.
    """
    if any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise InputError(
            t("shares must be at least 0 and sum to 1, found {shares}", shares=", ".join(map(str, shares)))
        )
    keys = [group(row) for row in rows]
    strata = _strata(keys, [stratum(row) if stratum else "" for row in rows])
    part_of: dict[str, int] = {}
    for members in strata.values():
        part_of |= _deal({key: place_of(key, seed) for key in members}, shares)
    parts: list[list[RowT]] = [[] for _ in shares]
    for row, key in zip(rows, keys, strict=True):
        parts[part_of[key]].append(row)
    return parts


def _strata(groups: Sequence[str], classes: Sequence[str]) -> dict[str, list[str]]:
    """The groups of every stratum: a group's is the class of most of its rows."""
    counts: dict[str, Counter[str]] = {}
    for group, name in zip(groups, classes, strict=True):
        counts.setdefault(group, Counter())[name] += 1
    strata: dict[str, list[str]] = {}
    for group, names in counts.items():
        strata.setdefault(min(names, key=lambda name: (-names[name], name)), []).append(group)
    return strata


def together(rows: Sequence[Row]) -> Callable[[Row], str]:
    """A group for each of ``rows``: its own, or where groups share a row, one for all that hang together."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while (higher := above.setdefault(name, name)) != name:
            above[name] = name = above[higher]
        return name

    for row in rows:
        one, two = top(group_of(row)), top(content_of(row))
        least, most = sorted((one, two), key=lambda name: (not name.startswith("group:"), name))
        above[most] = least
    return lambda row: top(group_of(row))


def leaks(parts: Sequence[Sequence[Row]]) -> list[tuple[Row, Row]]:
    """Pairs of rows that say the same in two parts: one for every row of a later part that an earlier part has."""
    first: dict[str, tuple[int, Row]] = {}
    found = []
    for number, part in enumerate(parts):
        for row in part:
            part_before, before = first.setdefault(content_of(row), (number, row))
            if part_before != number:
                found.append((before, row))
    return found


def parts_of(places: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """The part of every row, int64 [rows], by the place of its group (float64 [rows]); the same as :func:`split`."""
    import numpy as np

    found, low = np.full(len(places), -1), 1.0
    for part, share in enumerate(shares):
        low -= share
        if share > 0:
            found[(found < 0) & (places >= low)] = part
    wanted = [part for part, share in enumerate(shares) if share > 0]
    found[found < 0] = wanted[-1]
    if not np.bincount(found, minlength=len(shares))[
        wanted
    ].all():  # so few rows that one part takes a group from another
        part_of = _deal({str(place): place for place in places.tolist()}, shares)
        found = np.array([part_of[str(place)] for place in places.tolist()], dtype=np.int64)
    return found


def _deal(places: dict[str, float], shares: Sequence[float]) -> dict[str, int]:
    """The part of every group. The first part has the top of [0, 1), the last one the bottom."""
    bounds: list[tuple[float, float]] = []
    top = 1.0
    for share in shares:
        bounds.append((top - share, top))
        top -= share
    wanted = [part for part, share in enumerate(shares) if share > 0]
    part_of = {
        key: next((part for part in wanted if place >= bounds[part][0]), wanted[-1]) for key, place in places.items()
    }
    for part in wanted:
        counts = {other: sum(value == other for value in part_of.values()) for other in wanted}
        fullest = max(wanted, key=lambda other: counts[other])
        spare = counts[fullest] - (part != wanted[0])
        if counts[part] or spare < 1:
            continue
        low, high = bounds[part]
        candidates = [key for key, value in part_of.items() if value == fullest]
        nearest = min(candidates, key=lambda key: (max(low - places[key], places[key] - high), key))
        part_of[nearest] = part
    return part_of


def verb(
    file: Annotated[str, typer.Argument(help="a file of rows")],
    settings: Annotated[list[str] | None, typer.Argument(help="data options, such as columns.group=对话")] = None,
    shares: Annotated[str, typer.Option(help="train:validation:test, or train:validation")] = "8:1:1",
    stratify: Annotated[
        str | None, typer.Option(metavar="KEY", help="every value of this key of the file in every part; or: calls")
    ] = None,
    join: Annotated[bool, typer.Option("--join", help="groups that share a row are dealt together")] = False,
    allow_leakage: Annotated[
        bool, typer.Option("--allow-leakage", help="a row that groups in two parts share is no error")
    ] = False,
    seed: Annotated[int, typer.Option(help="another seed deals the dialogues another way")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Write FILE's rows, as they are, to FILE.train.jsonl, .validation.jsonl and .test.jsonl beside it."""
    from weitiao.data.sources import arguments, read_all

    files, options = arguments([file, *(settings or [])], skip_bad)
    if files != [file]:
        raise InputError(t("one file at a time; found {files}", files=", ".join(files)))
    path = Path(file)
    parts = _shares(shares)
    targets = [path.with_name(f"{path.stem}.{part}.jsonl") for part in PARTS[: len(parts)]]
    if held := [str(target) for target in targets if target.exists()]:
        raise InputError(t("{files}: exist already, and nothing is overwritten", files=", ".join(held)))
    (source,) = read_all(files, options, keep=True)
    for line in source.said:
        print(line, file=sys.stderr)
    group = together(source.rows) if join else group_of
    stratum = _stratum(path, stratify, source.records) if stratify else None
    pairs = list(zip(source.rows, source.records, strict=True))
    dealt = split(pairs, parts, group=lambda pair: group(pair[0]), stratum=stratum, seed=seed)
    if not allow_leakage:
        _refuse_leaks(leaks([[row for row, _ in part] for part in dealt]))
    for target, part in zip(targets, dealt, strict=True):
        lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for _, record in part)
        write_atomic(target, "".join(lines))
    if as_json:
        print(json.dumps({str(target): len(part) for target, part in zip(targets, dealt, strict=True)}))
        return
    for target, part in zip(targets, dealt, strict=True):
        print(f"{target}\t{len(part)}")
        for name, count in sorted(Counter(map(stratum, part)).items()) if stratum else ():
            print(f"  {stratify}={name}\t{count}")


def _stratum(path: Path, key: str, records: Sequence[Any]) -> Callable[[tuple[Row, Any]], str]:
    """What a pair of row and record belongs to by ``key``; InputError if no record has it."""
    if key == "calls":
        return lambda pair: " ".join(sorted({call.name for m in getattr(pair[0], "messages", ()) for call in m.calls}))
    if not any(key in record for record in records):
        keys = ", ".join(dict.fromkeys(name for record in records[:20] for name in record))
        raise InputError(
            t("{path}: no row has the key {key} (--stratify); there are {keys}", path=path, key=key, keys=keys)
        )

    def value(pair: tuple[Row, Any]) -> str:
        found = pair[1].get(key)
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, sort_keys=True)

    return value


def _refuse_leaks(found: Sequence[tuple[Row, Row]]) -> None:
    """InputError that names the groups which share a row and were dealt to different parts."""
    if not found:
        return
    message = "{first} (group {one}) says the same as {second} (group {two}), in another part"
    problems = [
        t(message, first=first.id, one=first.group, second=second.id, two=second.group) for first, second in found
    ]
    mend = t("--join deals groups that share a row together; --allow-leakage leaves them as they are")
    raise InputError([*first_of(problems), mend])


def _shares(text: str) -> list[float]:
    """``8:1:1`` as shares that sum to 1."""
    try:
        numbers = [float(number) for number in text.split(":")]
    except ValueError:
        numbers = []
    if not 2 <= len(numbers) <= len(PARTS) or min(numbers) < 0 or not numbers[0]:
        raise InputError(t("--shares {found}: expected two or three numbers, such as 8:1:1", found=text))
    return [number / sum(numbers) for number in numbers]
