"""Statistics of rows: how long they are, which are twice there, how much is trained, and what a max_length would cut.

    weitiao data stats train.jsonl validation.jsonl --model weitiao-tiny-zh --html stats.html

Without a model lengths are counted in characters; with one also in its tokens, as training would see them. Several
files are taken for the parts of one split: a row that is, or almost is, in two of them is a leak.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao.data import balance
from weitiao.data.near import THRESHOLD, Index, Near, index, near
from weitiao.data.rows import Chat, Pair, Row, Text, text_of
from weitiao.data.sources import Source, arguments, read_all
from weitiao.data.split import content_digest, repeated
from weitiao.errors import InputError, first_of, t
from weitiao.runs import write_atomic

if TYPE_CHECKING:
    from weitiao.data.render import Renderer

ROWS_AT_ONCE = 256
FENCE = 1.5  # Tukey's fences: an outlier is further than this many interquartile ranges from the quartiles
MEAN_FACTOR = 1.5
CUT_SHARE = 0.01
SHOWN_PAIRS = 20


def lengths(values: Sequence[int]) -> dict[str, float]:
    """Count, sum, min, median, mean, p95, p99 and max; percentiles are values that occur (nearest rank)."""
    ordered = sorted(values)
    found = {"median": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        "count": len(ordered),
        "sum": sum(ordered),
        "min": ordered[0],
        "mean": round(sum(ordered) / len(ordered), 2),
        **{name: _percentile(ordered, share) for name, share in found.items()},
        "max": ordered[-1],
    }


def _percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least ``share`` of the values do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def without_outliers(values: Sequence[int]) -> list[int]:
    """The values within Tukey's fences (Exploratory Data Analysis, 1977)."""
    ordered = sorted(values)
    low, high = _percentile(ordered, 0.25), _percentile(ordered, 0.75)
    margin = FENCE * (high - low)
    return [value for value in ordered if low - margin <= value <= high + margin]


def suggest(values: Sequence[int]) -> list[dict[str, Any]]:
    """Two max_lengths for examples of these token lengths, and what each would cut.

    1.5 times the mean of the lengths that are no outliers, and the smallest that cuts at most 1 % of the examples.
    """
    typical = without_outliers(values)
    rules = {
        "typical": math.ceil(MEAN_FACTOR * sum(typical) / len(typical)),
        "p99": _percentile(sorted(values), 1 - CUT_SHARE),
    }
    return [{"rule": rule, "max_length": limit, **_cuts(values, limit)} for rule, limit in rules.items()]


def _cuts(values: Sequence[int], limit: int) -> dict[str, float]:
    over = [value - limit for value in values if value > limit]
    return {"cut_rows": len(over), "cut_share": round(len(over) / len(values), 4), "cut_tokens": sum(over)}


def stats(
    source: Source,
    renderer: Renderer | None = None,
    train_on: str = "assistant",
    *,
    max_length: int | None = None,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> dict[str, Any]:
    """What is in one source. With a ``renderer`` also tokens, the share of them that is trained, and max_lengths: two
    that are suggested, and ``max_length`` itself if it is given.

    ``duplicates`` are rows that say exactly what an earlier row says; ``near_duplicates`` those of the others that are
    at least ``threshold`` like an earlier one (not sought at 0), of which ``near`` has the first pairs.
    """
    rows = source.rows
    twice = repeated(rows)
    once = [place for place in range(len(rows)) if place not in twice]
    alike = near(index([rows[place] for place in once], seed), threshold=threshold) if threshold else []
    found: dict[str, Any] = {
        "layout": source.format,
        "rows": len(rows),
        "bad_rows": len(source.bad),
        "turns": sum(_turns(row) for row in rows),
        "turns_of_rows": dict(sorted(Counter(map(_turns, rows)).items())),
        "calls": sum(len(message.calls) for row in rows if isinstance(row, Chat) for message in row.messages),
        "duplicates": len(twice),
        "near_duplicates": len(alike),
        "near": [
            {"row": _name(source, once[one.row]), "like": _name(source, once[one.like]), "similarity": _rounded(one)}
            for one in alike[:SHOWN_PAIRS]
        ],
        "characters": lengths([len(text_of(row)) for row in rows]),
        "outliers": len(rows) - len(without_outliers([len(text_of(row)) for row in rows])),
        "scripts": balance.scripts(rows),
        "labels": balance.labels(rows),
        "slots": balance.slots(rows),
    }
    return found | (_tokens(rows, renderer, train_on, max_length) if renderer else {})


def _name(source: Source, place: int) -> str:
    return source.rows[place].id or f"{place + 1}"


def _rounded(one: Near) -> float:
    return round(one.similarity, 3)


def _turns(row: Row) -> int:
    if isinstance(row, Pair):
        return len(row.prompt) + len(row.chosen) + len(row.rejected)
    return len(getattr(row, "messages", ()))


def _contents(rows: Iterable[Row]) -> set[bytes]:
    return {content_digest(row) for row in rows}


def _tokens(rows: Sequence[Row], renderer: Renderer, train_on: str, max_length: int | None) -> dict[str, Any]:
    """Token lengths and trained tokens of the examples that training would make of ``rows``."""
    from rich.console import Console
    from rich.progress import track

    from weitiao.data.spans import encode_text

    sizes: list[int] = []
    trained = refused = 0
    starts = range(0, len(rows), ROWS_AT_ONCE)
    console = Console(stderr=True)
    for start in track(starts, t("counting tokens"), console=console, transient=True, disable=not console.is_terminal):
        some = rows[start : start + ROWS_AT_ONCE]
        made = [encode_text(renderer.tokenizer, row.text) for row in some if isinstance(row, Text)]
        for examples in renderer.renders([row for row in some if isinstance(row, Chat)], train_on):
            if isinstance(examples, InputError):
                refused += 1
            else:
                made += examples
        sizes += [len(rendered.ids) for rendered in made]
        trained += sum(sum(rendered.mask) for rendered in made)
    if not sizes:
        return {"refused_by_template": refused}
    return {
        "refused_by_template": refused,
        "tokens": lengths(sizes),
        "trained_tokens": trained,
        "trained_share": round(trained / max(1, sum(sizes)), 4),
        "max_length": [
            *suggest(sizes),
            *([{"rule": "asked", "max_length": max_length, **_cuts(sizes, max_length)}] if max_length else []),
        ],
    }


def overlap(sources: Sequence[Source]) -> list[tuple[int, int, int]]:
    """(first, second, rows): how many different rows of one source say exactly what a row of another says."""
    contents = [_contents(source.rows) for source in sources]
    return [(a, b, len(contents[a] & contents[b])) for a, b in combinations(range(len(sources)), 2)]


def leaks(sources: Sequence[Source], threshold: float = THRESHOLD, seed: int = 0) -> list[dict[str, Any]]:
    """What two sources have in common, for each pair of which the first is to be learnt: ``rows``, which stand in both
    word for word, ``near`` rows of the second that are much like one of the first, and the first ``pairs`` of either.
    """
    contents = [{content_digest(row): place for place, row in reversed(list(enumerate(one.rows)))} for one in sources]
    indices: list[Index] = [index(one.rows, seed) for one in sources] if threshold and len(sources) > 1 else []
    found = []
    for a, b, rows in overlap(sources):
        same = {place: contents[a][key] for key, place in contents[b].items() if key in contents[a]}
        alike = near(indices[b], indices[a], threshold) if threshold else []
        alike = [one for one in alike if content_digest(sources[b].rows[one.row]) not in contents[a]]
        pairs = [
            *(
                {"row": _name(sources[b], two), "like": _name(sources[a], one), "similarity": 1.0}
                for two, one in sorted(same.items())
            ),
            *(
                {"row": _name(sources[b], one.row), "like": _name(sources[a], one.like), "similarity": _rounded(one)}
                for one in alike
            ),
        ]
        found.append({"first": a, "second": b, "rows": rows, "near": len(alike), "pairs": pairs[:SHOWN_PAIRS]})
    return found


# ---- the verb --------------------------------------------------------------------------------------------------------


def verb(
    words: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="files of rows, and data options (train_on=last)")
    ],
    model: Annotated[str | None, typer.Option(help="a model or a run whose tokenizer counts tokens")] = None,
    threshold: Annotated[
        float, typer.Option("--near", min=0, max=1, help="how alike near duplicates are; 0 does not look for them")
    ] = THRESHOLD,
    seed: Annotated[int, typer.Option(min=0, help="seed of the search for near duplicates")] = 0,
    allow_leakage: Annotated[
        bool, typer.Option("--allow-leakage", help="rows in two of the files are no error")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="also write a page with plots to this file")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Lengths, balance, duplicates and overlap of FILEs; with --model tokens, what is trained, what max_length cuts."""
    from weitiao.data import stats_report
    from weitiao.data.show import renderer_of

    files, options = arguments(words, skip_bad)
    if not files:
        raise InputError(t("name at least one file of rows"))
    sources = read_all(files, options)
    rows = [row for source in sources for row in source.rows]
    renderer = renderer_of(model, rows, options.chat_template) if model else None
    for line in [*(line for source in sources for line in source.said), *(renderer.said if renderer else [])]:
        print(line, file=sys.stderr)
    limit = options.max_length if isinstance(options.max_length, int) else None
    found = [
        {
            "file": name,
            **stats(source, renderer, options.train_on, max_length=limit, threshold=threshold, seed=seed),
        }
        for name, source in zip(files, sources, strict=True)
    ]
    common = [
        {"files": [files[leak.pop("first")], files[leak.pop("second")]], **leak}
        for leak in leaks(sources, threshold, seed)
    ]
    if as_json:
        print(json.dumps({"files": found, "overlap": common}, ensure_ascii=False))
    else:
        stats_report.show(found, common)
    if html is not None:
        sizes = [[len(text_of(row)) for row in source.rows] for source in sources]
        write_atomic(html, stats_report.html_page(found, common, sizes))
        print(html, file=sys.stderr)
    if not allow_leakage:
        _refuse_leaks(common)


def _refuse_leaks(common: Sequence[dict[str, Any]]) -> None:
    """InputError that names what two files have in common."""
    problems = []
    for leak in common:
        pairs = [f"{pair['row']} = {pair['like']} ({pair['similarity']:.2f})" for pair in leak["pairs"]]
        if pairs:
            first, second = leak["files"]
            message = "{second} leaks into {first}: {rows} rows in both, {near} more almost"
            problems.append(t(message, first=first, second=second, rows=leak["rows"], near=leak["near"]))
            problems += first_of(pairs, 5)
    if problems:
        raise InputError([*problems, t("leave those rows out (weitiao data clean --against), or --allow-leakage")])
