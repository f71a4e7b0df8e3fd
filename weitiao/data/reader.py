"""One file of rows, as they come: records, renamed columns, the layout they have, rows and what is no row.

reader = Reader(Path("rows.jsonl"), DataOptions())
for line, row, record in reader: ...                # row is a BadRow where the record is none
reader.said, reader.told(rows, bad)
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weitiao.data.bad import BadRow
from weitiao.data.formats import SEPARATORS, Unreadable, format_of, records, separator
from weitiao.data.layouts import LABELLED, LAYOUTS, OPTIONAL_NAMES, Layout, detect, meant, template_slots
from weitiao.data.options import DataOptions
from weitiao.data.patch import Patch
from weitiao.data.rows import Chat, Row
from weitiao.data.turns import RowError
from weitiao.errors import InputError, t

DETECTED_FROM = 20


class Reader:
    """The rows of one file, as they come: (line, row or BadRow, the file's own record). ``layout`` is how records are
    read, ``said`` the sentence about it; ``named`` is what rows are called by, the path unless another is given."""

    def __init__(
        self,
        path: Path,
        options: DataOptions,
        tools: tuple[Mapping[str, Any], ...] = (),
        task: str = "",
        patch: Patch | None = None,
        *,
        mend: Callable[[Any], Any] | None = None,
        named: str = "",
    ):
        check_readable(path)
        format = format_of(path, options.format)
        self.path, self.options, self.tools, self.named = path, options, tools, named or str(path)
        self.missing = set(options.columns.items())
        found = records(path, format)
        if patch and patch.decisions:
            found = patch.applied(found)
        if mend:
            found = ((line, mend(record)) for line, record in found)
        stream = _renamed(found, options, self.missing)
        first = list(itertools.islice(stream, DETECTED_FROM))
        if task == "classify" and options.format not in LAYOUTS:
            self.layout, self.said = Layout(LABELLED), list[str]()
        else:
            self.layout, self.said = _layout(path, format, options, [record for _, record, _ in first])
        self.stream = itertools.chain(first, stream)

    def __iter__(self) -> Iterator[tuple[int, Row | BadRow, Any]]:
        for line, record, own in self.stream:
            where = f"{self.named}:{line}"
            try:
                if isinstance(record, Unreadable):
                    raise RowError(record.reason)
                row = self.layout.row(record, where)
            except RowError as error:
                yield line, BadRow(where, str(error), own.raw if isinstance(own, Unreadable) else own), own
                continue
            if self.tools and isinstance(row, Chat) and not row.tools:
                row = replace(row, tools=self.tools)
            yield line, row, own

    def told(self, rows: int, bad: int) -> list[str]:
        """What a person should be told when all has been read; InputError where there were no rows, or none with a
        named column."""
        path, said = self.path, []
        if not rows and not bad:
            raise InputError(t("{path}: the file has no rows", path=path))
        if self.missing and rows:
            names = ", ".join(f"{own} (data.columns.{name})" for name, own in sorted(self.missing))
            raise InputError(t("{path}: no row has the column {names}", path=path, names=names))
        if (format := format_of(path, self.options.format)) in SEPARATORS:
            between = separator(path, format)
            if between != SEPARATORS[format]:
                said.append(t("{path}: its cells are separated by {found}", path=path, found=json.dumps(between)))
        if self.layout.numbers:
            names = ", ".join(sorted(self.layout.numbers))
            said.append(t("{path}: numbers taken for text: {keys}", path=path, keys=names))
        if self.layout.unused:
            said.append(t("{path}: keys not used: {keys}", path=path, keys=", ".join(sorted(self.layout.unused))))
        return said


def problem_of(record: Any, options: DataOptions, layout: str) -> str:
    """What keeps a record from being a row of this layout; "" where nothing does."""
    ((_, renamed, _),) = _renamed(iter([(1, record)]), options, set())
    try:
        if isinstance(renamed, Unreadable):
            raise RowError(renamed.reason)
        Layout(layout, options.template).row(renamed)
    except RowError as error:
        return str(error)
    return ""


def check_readable(path: Path) -> None:
    """InputError for a folder, or for what is not there."""
    if path.is_dir():
        raise InputError(t("{path}: is a folder; name the files in it", path=path))
    if not path.exists():
        raise InputError(t("{path}: no such file", path=path))


def _renamed(
    stream: Iterator[tuple[int, Any]], options: DataOptions, missing: set[tuple[str, str]]
) -> Iterator[tuple[int, Any, Any]]:
    """(line, record with the columns of ``data.columns`` under our names, record as it is); a column that is a
    template's slot keeps its own name too.

    A row may lack an optional column; ``missing`` keeps those that no row has had so far.
    """
    slots = template_slots(options.template) if options.template else []
    taken = {own for own in options.columns.values() if own not in slots}
    for line, record in stream:
        if not isinstance(record, Mapping) or not options.columns:
            yield line, record, record
            continue
        found = {(name, own) for name, own in options.columns.items() if own in record}
        missing -= found
        lacking = [pair for pair in options.columns.items() if pair not in found and pair[0] not in OPTIONAL_NAMES]
        if lacking:
            names = ", ".join(f"{own} (data.columns.{name})" for name, own in lacking)
            keys = ", ".join(map(str, record))
            yield line, Unreadable(t("no column {names}; the row has {keys}", names=names, keys=keys)), record
            continue
        kept = {key: value for key, value in record.items() if key not in taken}
        yield line, kept | {name: record[own] for name, own in found}, record


def _layout(path: Path, format: str, options: DataOptions, first: Sequence[Any]) -> tuple[Layout, list[str]]:
    """How to read the file's records, and the sentence that says so."""
    if options.template is not None:
        return Layout("prompt", options.template), [t("{path}: prompts from data.template", path=path)]
    if options.format in (*LAYOUTS, LABELLED):
        return Layout(options.format), []
    found = detect(first, tuple(options.columns))
    if found is None:
        keyed = [record for record in first if isinstance(record, Mapping)]
        if not keyed:  # nothing but unreadable lines: they are reported one by one
            return Layout("messages"), []
        if inside := [key for key, value in keyed[0].items() if isinstance(value, list) and len(keyed) == 1]:
            message = "{path}: one object, whose key {key} holds a list; a file of rows is that list alone"
            raise InputError(t(message, path=path, key=inside[0]))
        keys = ", ".join(map(str, keyed[0])) or t("none")
        example = "'data.columns={{prompt: {}, answer: {}}}'".format(*meant(keyed[0]))
        raise InputError(
            t(
                "{path}: cannot tell what its rows are from the keys {keys}; say so with {example}",
                path=path,
                keys=keys,
                example=example,
            )
        )
    layout, key = found
    shown = options.columns.get(key, key)
    if format == "txt":
        return Layout(layout), [t("{path}: text, one row a line", path=path)]
    return Layout(layout), [t("{path}: {layout} (from the key '{key}')", path=path, layout=layout, key=shown)]
