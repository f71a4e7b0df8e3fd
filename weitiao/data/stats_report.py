"""What ``weitiao data stats`` prints, and its page.

show(found, common)                          # a table and sentences on stdout
html_page(found, common, sizes)              # one self-contained page, with plots
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weitiao.data import page
from weitiao.errors import t
from weitiao.machine import terminal

SHOWN = 8


def show(found: Sequence[dict[str, Any]], common: Sequence[dict[str, Any]]) -> None:
    """The figures of every file, side by side, and what two of them have in common."""
    _table(found)
    for line in (*_sentences(found), *_overlaps(common)):
        print(line)


def html_page(found: Sequence[dict[str, Any]], common: Sequence[dict[str, Any]], sizes: Sequence[Sequence[int]]) -> str:
    """Everything as a page; ``sizes`` are the characters of every row of every file."""
    parts = [page.table(["", *(entry["file"] for entry in found)], _cells(found))]
    parts += [page.paragraph(line) for line in _sentences(found)]
    parts += [
        page.paragraph(line, bad=bool(pair["pairs"])) for line, pair in zip(_overlaps(common), common, strict=True)
    ]
    for pair in common:
        parts += _pairs(pair["pairs"])
    for entry, values in zip(found, sizes, strict=True):
        marks = {t("median"): entry["characters"]["median"], t("95th percentile"): entry["characters"]["p95"]}
        parts += [page.heading(f"{entry['file']}: {t('characters of a row')}"), page.histogram(values, marks)]
        for title, counts in _balances(entry):
            parts += [page.heading(f"{entry['file']}: {title}"), page.bars(counts)]
        if entry["near"]:
            parts += [page.heading(f"{entry['file']}: {t('near duplicates')}"), *_pairs(entry["near"])]
    return page.page(t("statistics of {files}", files=", ".join(entry["file"] for entry in found)), parts)


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    head = [t("row"), t("is like"), t("similarity")]
    return (
        [page.table(head, ([pair["row"], pair["like"], f"{pair['similarity']:.2f}"] for pair in pairs))]
        if pairs
        else []
    )


def _balances(entry: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """(title, counts) of whatever has a balance in one file."""
    yield t("turns of a row"), {str(turns): count for turns, count in entry["turns_of_rows"].items()}
    yield t("scripts"), entry["scripts"]
    if entry["labels"]:
        yield t("labels"), entry["labels"]
    for tool, about in entry["slots"].items():
        yield t("arguments of {tool}", tool=tool), {name: one["calls"] for name, one in about["arguments"].items()}
        for name, one in about["arguments"].items():
            yield t("values of {name}", name=f"{tool}.{name}"), one["values"]


def _sentences(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a file has that does not fit a cell: balances, and what a max_length cuts."""
    for entry in found:
        file = entry["file"]
        yield f"{file}: {t('scripts')}: {_counts(entry['scripts'])}"
        if entry["labels"]:
            yield f"{file}: {t('labels')}: {_counts(entry['labels'])}"
        for tool, about in entry["slots"].items():
            arguments = {name: one["calls"] for name, one in about["arguments"].items()}
            yield f"{file}: {t('arguments of {tool}', tool=tool)} ({about['calls']}): {_counts(arguments)}"
        for rule in entry.get("max_length", ()):
            message = "{file}: max_length {limit} ({rule}) cuts {rows} rows ({share:.2%}), {tokens} tokens"
            values = {"limit": rule["max_length"], "rows": rule["cut_rows"], "share": rule["cut_share"]}
            yield t(message, file=file, rule=_rules()[rule["rule"]], tokens=rule["cut_tokens"], **values)


def _counts(counts: Mapping[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:SHOWN]]
    return ", ".join(shown + (["…"] if len(counts) > SHOWN else []))


def _overlaps(common: Sequence[dict[str, Any]]) -> Iterator[str]:
    for pair in common:
        message = "{rows} rows in both {first} and {second}; {near} more much alike"
        values = {"rows": pair["rows"], "near": pair["near"]}
        yield t(message, first=pair["files"][0], second=pair["files"][1], **values)


def _cells(found: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """The table's rows: a name, then a figure for every file."""
    for key, name in _names().items():
        if any(key in entry for entry in found):
            yield [name, *(_shown(entry.get(key)) for entry in found)]
    for unit, unit_name in _units().items():
        if any(unit in entry for entry in found):
            for measure, name in _measures().items():
                cells = [_shown(entry[unit][measure]) if unit in entry else "" for entry in found]
                yield [f"{unit_name}: {name}", *cells]


def _table(found: Sequence[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table("", *(entry["file"] for entry in found), box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"
    for cells in _cells(found):
        table.add_row(*cells)
    terminal.show(table)


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
        "near_duplicates": t("near duplicates"),
        "outliers": t("outliers by length"),
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
    return {"typical": t("1.5 × the mean without outliers"), "p99": t("cuts at most 1 %"), "asked": t("asked for")}
