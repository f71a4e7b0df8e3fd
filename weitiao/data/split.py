"""Splits: rows are dealt to train, validation and test by dialogue, and stay where they are when rows are added.

    train, validation, test = split(rows, (0.8, 0.1, 0.1), seed=0)

A row's group (its dialogue; without one, its content, so that two equal rows are never torn apart) is hashed with the
seed to a number in [0, 1), and the shares cut that interval. Only a part that would stay empty takes a group from the
fullest.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from weitiao.data.rows import Row
from weitiao.errors import InputError, t
from weitiao.runs import write_atomic

RowT = TypeVar("RowT")
SHARES = (0.8, 0.1, 0.1)
PARTS = ("train", "validation", "test")


def group_of(row: Row) -> str:
    """What must not be torn apart: the row's own group, or its content without its id."""
    return f"group:{row.group}" if row.group is not None else content_of(row)


def content_of(row: Row) -> str:
    """What a row says, whatever it is called: equal for exact duplicates."""
    return repr(replace(row, id="", group=None))


def place_of(group: str, seed: int) -> float:
    """The group's place in [0, 1): the first 8 bytes of the sha256 of seed and group."""
    digest = hashlib.sha256(f"{seed}\n{group}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split(
    rows: Sequence[RowT],
    shares: Sequence[float] = SHARES,
    *,
    group: Callable[[Any], str] = group_of,
    seed: int = 0,
) -> list[list[RowT]]:
    """``rows`` in parts of about ``shares`` (which sum to 1), in their order, no group in two parts.

    Parts are filled by hash, so that adding rows moves none that are there. Where that leaves a part with a share
    empty, it takes the group nearest to its interval from the part with most groups: with as many groups as parts
    none stays empty, and with fewer the first part does not. InputError if the shares are not shares.
    """
    if any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise InputError(
            t("shares must be at least 0 and sum to 1, found {shares}", shares=", ".join(map(str, shares)))
        )
    keys = [group(row) for row in rows]
    part_of = _deal({key: place_of(key, seed) for key in keys}, shares)
    parts: list[list[RowT]] = [[] for _ in shares]
    for row, key in zip(rows, keys, strict=True):
        parts[part_of[key]].append(row)
    return parts


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
    seed: Annotated[int, typer.Option(help="another seed deals the dialogues another way")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Write FILE's rows, as they are, to FILE.train.jsonl, .validation.jsonl and .test.jsonl beside it."""
    from weitiao.data.formats import format_of, records
    from weitiao.data.sources import arguments, read

    files, options = arguments([file, *(settings or [])], skip_bad)
    if files != [file]:
        raise InputError(t("one file at a time; found {files}", files=", ".join(files)))
    path = Path(file)
    parts = _shares(shares)
    targets = [path.with_name(f"{path.stem}.{part}.jsonl") for part in PARTS[: len(parts)]]
    if held := [str(target) for target in targets if target.exists()]:
        raise InputError(t("{files}: exist already, and nothing is overwritten", files=", ".join(held)))
    source = read(path, options)
    for line in source.said:
        print(line, file=sys.stderr)
    numbered = list(zip(source.lines, source.rows, strict=True))
    dealt = split(numbered, parts, group=lambda pair: group_of(pair[1]), seed=seed)
    part_of = {line: part for part, pairs in enumerate(dealt) for line, _ in pairs}
    texts: list[list[str]] = [[] for _ in parts]
    for line, record in records(path, format_of(path, options.format)):
        if line in part_of:
            texts[part_of[line]].append(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    for target, lines in zip(targets, texts, strict=True):
        write_atomic(target, "".join(lines))
    if as_json:
        print(json.dumps({str(target): len(lines) for target, lines in zip(targets, texts, strict=True)}))
        return
    for target, lines in zip(targets, texts, strict=True):
        print(f"{target}\t{len(lines)}")


def _shares(text: str) -> list[float]:
    """``8:1:1`` as shares that sum to 1."""
    try:
        numbers = [float(number) for number in text.split(":")]
    except ValueError:
        numbers = []
    if not 2 <= len(numbers) <= len(PARTS) or min(numbers) < 0 or not numbers[0]:
        raise InputError(t("--shares {found}: expected two or three numbers, such as 8:1:1", found=text))
    return [number / sum(numbers) for number in numbers]
