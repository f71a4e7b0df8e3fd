"""Statistics of rows: how long they are, which are twice there, how much is trained, and what a max_length would cut.

    weitiao data stats train.jsonl validation.jsonl --model weitiao-tiny-zh

Without a model lengths are counted in characters; with one also in its tokens, as training would see them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao.data.rows import Chat, Pair, Row, Text, text_of
from weitiao.data.sources import Source, arguments, read_all
from weitiao.data.split import content_of
from weitiao.errors import InputError, t

if TYPE_CHECKING:
    from weitiao.data.render import Renderer

ROWS_AT_ONCE = 256
FENCE = 1.5  # Tukey's fences: an outlier is further than this many interquartile ranges from the quartiles
MEAN_FACTOR = 1.5
CUT_SHARE = 0.01


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


def stats(source: Source, renderer: Renderer | None = None, train_on: str = "assistant") -> dict[str, Any]:
    """What is in one source. With a ``renderer`` also tokens, the share of them that is trained, and max_lengths.

    ``duplicates`` are rows that say exactly what an earlier row says.
    """
    rows = source.rows
    found: dict[str, Any] = {
        "layout": source.format,
        "rows": len(rows),
        "bad_rows": len(source.bad),
        "turns": sum(_turns(row) for row in rows),
        "calls": sum(len(message.calls) for row in rows if isinstance(row, Chat) for message in row.messages),
        "duplicates": len(rows) - len(_contents(rows)),
        "characters": lengths([len(text_of(row)) for row in rows]),
    }
    return found | (_tokens(rows, renderer, train_on) if renderer else {})


def _turns(row: Row) -> int:
    if isinstance(row, Pair):
        return len(row.prompt) + len(row.chosen) + len(row.rejected)
    return len(getattr(row, "messages", ()))


def _contents(rows: Iterable[Row]) -> set[bytes]:
    return {hashlib.sha256(content_of(row).encode("utf-8", "surrogatepass")).digest()[:16] for row in rows}


def _tokens(rows: Sequence[Row], renderer: Renderer, train_on: str) -> dict[str, Any]:
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
        "max_length": suggest(sizes),
    }


def overlap(sources: Sequence[Source]) -> list[tuple[int, int, int]]:
    """(first, second, rows): how many different rows of one source say exactly what a row of another says."""
    contents = [_contents(source.rows) for source in sources]
    return [(a, b, len(contents[a] & contents[b])) for a, b in combinations(range(len(sources)), 2)]


# ---- the verb --------------------------------------------------------------------------------------------------------


def verb(
    words: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="files of rows, and data options (train_on=last)")
    ],
    model: Annotated[str | None, typer.Option(help="a model or a run whose tokenizer counts tokens")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Lengths, duplicates and overlap of FILEs; with --model tokens, what is trained, and what max_length would cut."""
    files, options = arguments(words, skip_bad)
    if not files:
        raise InputError(t("name at least one file of rows"))
    sources = read_all(files, options)
    renderer = _renderer(model, sources, options.chat_template) if model else None
    for line in [*(line for source in sources for line in source.said), *(renderer.said if renderer else [])]:
        print(line, file=sys.stderr)
    found = [
        {"file": name, **stats(source, renderer, options.train_on)} for name, source in zip(files, sources, strict=True)
    ]
    common = [{"files": [files[a], files[b]], "rows": rows} for a, b, rows in overlap(sources)]
    if as_json:
        print(json.dumps({"files": found, "overlap": common}, ensure_ascii=False))
    else:
        _print(found, common)


def _renderer(model: str, sources: Sequence[Source], template: str | None) -> Renderer:
    """The renderer of a run, or of a model by name or folder."""
    from weitiao.data.render import Renderer
    from weitiao.models.load import load_tokenizer
    from weitiao.runs import Run, is_run
    from weitiao.weights import fetch

    folder = Run.open(model).final if is_run(model) else fetch.resolve(model)
    chats = [row for source in sources for row in source.rows if isinstance(row, Chat)]
    tools = any(chat.tools or any(message.calls for message in chat.messages) for chat in chats)
    return Renderer.of(load_tokenizer(folder), tools=tools, override=template)


def _print(found: Sequence[dict[str, Any]], common: Sequence[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(entry["file"] for entry in found), box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"
    for key, name in _names().items():
        if any(key in entry for entry in found):
            table.add_row(name, *(_shown(entry.get(key)) for entry in found))
    for unit, unit_name in _units().items():
        if any(unit in entry for entry in found):
            table.add_section()
            for measure, name in _measures().items():
                cells = [_shown(entry[unit][measure]) if unit in entry else "" for entry in found]
                table.add_row(f"{unit_name}: {name}", *cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(120, 40 + 30 * len(found)))
    console.print(table)
    for entry in found:
        for rule in entry.get("max_length", ()):
            message = "{file}: max_length {limit} ({rule}) cuts {rows} rows ({share:.2%}), {tokens} tokens"
            values = {"limit": rule["max_length"], "rows": rule["cut_rows"], "share": rule["cut_share"]}
            print(t(message, file=entry["file"], rule=_rules()[rule["rule"]], tokens=rule["cut_tokens"], **values))
    for pair in common:
        print(
            t(
                "{rows} rows are both in {first} and in {second}",
                rows=pair["rows"],
                first=pair["files"][0],
                second=pair["files"][1],
            )
        )


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else ""


def _names() -> dict[str, str]:
    return {
        "rows": t("rows"),
        "bad_rows": t("bad rows left out"),
        "turns": t("turns"),
        "calls": t("calls"),
        "duplicates": t("exact duplicates"),
        "refused_by_template": t("refused by the chat template"),
        "trained_tokens": t("trained tokens"),
        "trained_share": t("share of tokens that is trained"),
    }


def _units() -> dict[str, str]:
    return {"characters": t("characters"), "tokens": t("tokens")}


def _measures() -> dict[str, str]:
    return {
        "sum": t("sum"),
        "min": t("shortest"),
        "median": t("median"),
        "mean": t("mean"),
        "p95": t("95th percentile"),
        "p99": t("99th percentile"),
        "max": t("longest"),
    }


def _rules() -> dict[str, str]:
    return {"typical": t("1.5 × the mean without outliers"), "p99": t("cuts at most 1 %")}
