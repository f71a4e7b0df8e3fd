"""Mixing: how many rows of every source are taken, and which.

    sources = [SourceOptions(path="own.jsonl", repeat=3), SourceOptions(path="general.jsonl", repeat=0.5)]
    mixed = mix([own, general], sources, seed=0)        # the rows of each that are taken

``repeat`` is how often a source's rows are seen (3: each one thrice; 0.5: a half of them). With a ``weight`` for each,
the sources' numbers of rows stand in that proportion, and ``repeat`` is the most that any row is seen: the result is
the largest that allows. Which rows are taken follows from the seed and what they say, so added rows displace few.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from weitiao.data.messages import record_of
from weitiao.data.rows import Chat, Row
from weitiao.data.split import content_of, place_of
from weitiao.errors import InputError, say, t
from weitiao.runs import write_atomic

if TYPE_CHECKING:
    from weitiao.data.options import SourceOptions
    from weitiao.data.sources import Source

RowT = TypeVar("RowT")


def counts(available: Sequence[int], sources: Sequence[SourceOptions], rows: int | None = None) -> list[int]:
    """How many rows of each source are taken, of ``available`` ones; ``rows`` is the number of all, if it is given.

    InputError for a source that has too few for ``rows``, and for one of which nothing would be taken.
    """
    most = [count * source.repeat for count, source in zip(available, sources, strict=True)]
    weights = [source.weight or size for source, size in zip(sources, most, strict=True)]
    shares = [weight / max(sum(weights), 1e-12) for weight in weights]
    total = min((size / share for size, share in zip(most, shares, strict=True) if share), default=0)
    total = total if rows is None else rows
    found = [round(total * share + 1e-9) for share in shares]
    problems = []
    for source, count, size in zip(sources, found, most, strict=True):
        if count > round(size + 1e-9):
            message = "{path}: {count} rows are needed and {most} are there; raise its repeat, or take fewer rows"
            problems.append(t(message, path=source.path, count=count, most=round(size)))
        elif not count and size:
            problems.append(t("{path}: no row of it would be taken; raise its repeat or weight", path=source.path))
    if problems:
        raise InputError(problems)
    return found


def mix(
    parts: Sequence[Sequence[RowT]],
    sources: Sequence[SourceOptions],
    seed: int = 0,
    *,
    rows: int | None = None,
    place: Callable[[Any], float] | None = None,
) -> list[list[RowT]]:
    """The rows of every source that are taken, in their order, a repeated row beside itself. See :func:`counts`.
    ``place``: the number in [0, 1) that decides for a row; from what it says, unless it is given."""
    place = place or (lambda row: place_of(content_of(row), seed))
    taken = counts([len(part) for part in parts], sources, rows)
    return [_taken(part, count, place) for part, count in zip(parts, taken, strict=True)]


def _taken(part: Sequence[RowT], count: int, rank: Callable[[Any], float]) -> list[RowT]:
    """Each row as often as all can be, and those with the lowest hashes once more."""
    times, rest = divmod(count, max(1, len(part)))
    order = sorted(range(len(part)), key=lambda place: rank(part[place])) if rest else []
    once_more = set(order[:rest])
    return [row for place, row in enumerate(part) for _ in range(times + (place in once_more))]


def verb(
    words: Annotated[
        list[str],
        typer.Argument(metavar="FILE[,repeat=N][,weight=W]...", help="sources, and data options such as patch=FILE"),
    ],
    output: Annotated[Path, typer.Option(help="the file to write, a jsonl")],
    rows: Annotated[int | None, typer.Option(min=1, help="how many rows in all; as many as there are")] = None,
    seed: Annotated[int, typer.Option(min=0, help="another seed takes other rows, in another order")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Mix the rows of several FILEs, as they are, into one file; each with its repeat or its weight."""
    from weitiao.config import build
    from weitiao.data.options import DataOptions
    from weitiao.data.sources import arguments, read_all

    named, options = arguments(words, skip_bad)
    if not named:
        raise InputError(t("name at least one file of rows"))
    wanted = build(DataOptions, {"train": [_source(word) for word in named]}).sources
    if output.exists() and not overwrite:
        raise InputError(t("{path}: is there already; --overwrite replaces it", path=output))
    sources = read_all([one.path for one in wanted], options, keep=True)
    for line in (line for source in sources for line in source.said):
        print(line, file=sys.stderr)
    pairs = _pairs(sources)
    mixed = mix(pairs, wanted, seed, rows=rows, place=lambda pair: place_of(content_of(pair[0]), seed))
    lines = [json.dumps(own, ensure_ascii=False, default=str) + "\n" for part in mixed for _, own in part]
    random.Random(f"mix {seed}").shuffle(lines)
    write_atomic(output, "".join(lines))
    found = [
        {"file": one.path, "rows": len(source.rows), "taken": len(part), "share": round(len(part) / len(lines), 4)}
        for one, source, part in zip(wanted, sources, mixed, strict=True)
    ]
    if as_json:
        print(json.dumps({"output": str(output), "rows": len(lines), "sources": found}, ensure_ascii=False))
        return
    for one in found:
        print(f"{one['file']}\t{one['rows']}\t{one['taken']}\t{one['share']:.2%}")
    print(output)


def _pairs(sources: Sequence[Source]) -> list[list[tuple[Row, Any]]]:
    """Rows with the records to write: as they are, or where the sources' layouts differ, all conversations in one."""
    layouts = {source.format: str(source.path) for source in sources}
    if len(layouts) == 1:
        return [list(zip(source.rows, source.records, strict=True)) for source in sources]
    if not all(isinstance(row, Chat) for source in sources for row in source.rows):
        found = ", ".join(f"{path} ({layout})" for layout, path in layouts.items())
        raise InputError(t("{found}: conversations and plain text cannot be in one file", found=found))
    say("the sources have several layouts; all are written as messages")
    return [[(row, record_of(row)) for row in source.rows if isinstance(row, Chat)] for source in sources]


def _source(word: str) -> dict[str, str]:
    """``general.jsonl,repeat=0.5`` as the options of a source."""
    path, *settings = [word] if Path(word).exists() else word.split(",")
    pairs = [setting.partition("=") for setting in settings]
    return {"path": path} | {key.strip(): value for key, _, value in pairs}
