"""Sources: what a person names as data becomes rows, and everything that is wrong with it is said at once.

    splits = load(DataOptions(train="rows.jsonl", validation=0.1), "sft")
    source = read("rows.jsonl", DataOptions())      # source.rows, source.format, source.said

Files are jsonl, json, csv, tsv, parquet or txt (formats.py); their records' keys say what they mean (layouts.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from weitiao import config
from weitiao.config import Options, build
from weitiao.data.formats import Unreadable, format_of, records
from weitiao.data.layouts import (
    COLUMN_NAMES,
    LABELLED,
    LAYOUTS,
    OPTIONAL_NAMES,
    Layout,
    detect,
    normal_tools,
    template_slots,
)
from weitiao.data.rows import Chat, Row, Text
from weitiao.data.split import split
from weitiao.data.turns import RowError
from weitiao.errors import InputError, t

GENERATE = "generate:"
DETECTED_FROM = 20
SHOWN_BAD_ROWS = 20
Generators = Mapping[str, Callable[[int], Iterable[Row]]]


class DataOptions(Options):
    """Where rows come from, what they mean, and how they become examples."""

    train: str | list[str] | None = Field(default=None, description="files of training rows, or generate:NAME")
    validation: float | str | None = Field(
        default=0.1, description="share of the training rows, or a file; none: 0 or null"
    )
    test: float | str | None = Field(default=None, description="share of the training rows, or a file")
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt", "text", "labelled", "crosswoz",
        "jsonl", "json", "csv", "tsv", "parquet", "txt",
    ] = Field(default="auto", description="a layout of rows, or a kind of file; auto finds both")  # fmt: skip
    columns: dict[str, str] = Field(default={}, description="the file's own column names: {prompt: 问题, answer: 回答}")
    template: str | None = Field(
        default=None, description="the prompt, with the row's columns in braces: 问：{question}"
    )
    folder: str | None = Field(default=None, description="the folder (or zip files) of format crosswoz")
    tools: str | None = Field(
        default=None, description="a JSON file of tool schemas for every conversation that brings none"
    )
    max_length: Literal["auto"] | int = Field(
        default="auto", description="tokens of an example at most; auto takes the model's"
    )
    train_on: Literal["assistant", "last", "all"] = Field(default="assistant", description="whose tokens are trained")
    replay: str | list[str] | None = Field(
        default=None, description="general rows mixed in against forgetting: files, or generate:NAME"
    )
    replay_share: float = Field(
        default=0.1, gt=0, lt=1, description="share of the mixed training rows that replayed ones make up"
    )
    skip_bad: bool = Field(default=False, description="leave bad rows out, with a count, instead of stopping")
    allow_truncated: float = Field(default=0.01, ge=0, le=1, description="share of answers that max_length may cut")
    chat_template: str | None = Field(
        default=None, description="a Jinja file, or the name of a fallback, instead of the model's own"
    )

    @field_validator("validation", "test", mode="before")
    @classmethod
    def _share_as_text(cls, value: Any) -> Any:
        """``data.validation=0.2`` on a command line is a share, not a file called 0.2."""
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    @field_validator("validation", "test")
    @classmethod
    def _share_in_range(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(t("a share is at least 0 and less than 1"))
        return value

    @field_validator("max_length")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError(t("at least 1 token"))
        return value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in value if name not in COLUMN_NAMES]
        if unknown:
            known = ", ".join(COLUMN_NAMES)
            raise ValueError(t("unknown: {unknown}; known: {known}", unknown=", ".join(unknown), known=known))
        return value

    @field_validator("template")
    @classmethod
    def _well_formed(cls, value: str | None) -> str | None:
        if value is not None and not template_slots(value):
            raise ValueError(t("has no slot such as {question}, so every prompt would be the same"))
        return value

    @model_validator(mode="after")
    def _shares_leave_something(self) -> DataOptions:
        if sum(share for share in (self.validation, self.test) if isinstance(share, float)) >= 1:
            raise ValueError(t("validation and test leave nothing to train on"))
        return self


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: ``where`` is FILE:LINE."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """What one file holds: its rows, their layout (``format``), the line of each, and what a person should be told."""

    rows: list[Row]
    format: str
    lines: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class Splits:
    """Rows to train, choose and test on, and what a person should be told about where they came from."""

    train: list[Row]
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


# ---- one file --------------------------------------------------------------------------------------------------------


def read(path: str | Path, options: DataOptions, task: str = "") -> Source:
    """The rows of one file; those of task ``classify`` have labels. InputError names every bad row, FILE:LINE and why,
    unless ``options.skip_bad``."""
    source = _scan(Path(path), options, _read_tools(options.tools), task)
    _refuse_bad([source], options.skip_bad)
    return source


def _scan(path: Path, options: DataOptions, tools: tuple[Mapping[str, Any], ...], task: str) -> Source:
    """The rows of one file, its bad ones collected."""
    _check_readable(path)
    format = format_of(path, options.format)
    missing = set(options.columns.items())
    stream = _renamed(records(path, format), options, missing)
    first = list(itertools.islice(stream, DETECTED_FROM))
    if task == "classify" and options.format not in LAYOUTS:
        layout, said = Layout(LABELLED), list[str]()
    else:
        layout, said = _layout(path, format, options, [record for _, record in first])
    rows: list[Row] = []
    lines: list[int] = []
    bad: list[BadRow] = []
    for line, record in itertools.chain(first, stream):
        where = f"{path}:{line}"
        try:
            if isinstance(record, Unreadable):
                raise RowError(record.reason)
            row = layout.row(record, where)
        except RowError as error:
            bad.append(BadRow(where, str(error)))
            continue
        lines.append(line)
        rows.append(replace(row, tools=tools) if tools and isinstance(row, Chat) and not row.tools else row)
    if not rows and not bad:
        raise InputError(t("{path}: the file has no rows", path=path))
    if missing and rows:
        names = ", ".join(f"{own} (data.columns.{name})" for name, own in sorted(missing))
        raise InputError(t("{path}: no row has the column {names}", path=path, names=names))
    if layout.unused:
        said.append(t("{path}: keys not used: {keys}", path=path, keys=", ".join(sorted(layout.unused))))
    if bad and options.skip_bad:
        said.append(t("{path}: {count} bad rows left out, {rows} kept", path=path, count=len(bad), rows=len(rows)))
    return Source(rows, layout.name, lines, said, bad)


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise InputError(t("{path}: is a folder; name the files in it", path=path))
    if not path.exists():
        raise InputError(t("{path}: no such file", path=path))


def _renamed(
    stream: Iterator[tuple[int, Any]], options: DataOptions, missing: set[tuple[str, str]]
) -> Iterator[tuple[int, Any]]:
    """Records with the columns of ``data.columns`` under our names; one that is a template's slot keeps its own too.

    A row may lack an optional column; ``missing`` keeps those that no row has had so far.
    """
    slots = template_slots(options.template) if options.template else []
    taken = {own for own in options.columns.values() if own not in slots}
    for line, record in stream:
        if not isinstance(record, Mapping) or not options.columns:
            yield line, record
            continue
        found = {(name, own) for name, own in options.columns.items() if own in record}
        missing -= found
        lacking = [pair for pair in options.columns.items() if pair not in found and pair[0] not in OPTIONAL_NAMES]
        if lacking:
            names = ", ".join(f"{own} (data.columns.{name})" for name, own in lacking)
            keys = ", ".join(map(str, record))
            yield line, Unreadable(t("no column {names}; the row has {keys}", names=names, keys=keys))
            continue
        kept = {key: value for key, value in record.items() if key not in taken}
        yield line, kept | {name: record[own] for name, own in found}


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
        keys = ", ".join(map(str, keyed[0])) or t("none")
        example = "data.columns={prompt: ..., answer: ...}"
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


def _refuse_bad(sources: Sequence[Source], skip: bool) -> None:
    """InputError with the first bad rows and their count, unless they are to be skipped and something is left."""
    bad = [row for source in sources for row in source.bad]
    nothing_left = any(not source.rows for source in sources)
    if not bad or (skip and not nothing_left):
        return
    lines = [str(row) for row in bad[:SHOWN_BAD_ROWS]]
    rows = sum(len(source.rows) for source in sources) + len(bad)
    if nothing_left:
        lines.append(t("{bad} of {rows} rows are bad, and nothing would be left without them", bad=len(bad), rows=rows))
    else:
        lines.append(
            t(
                "{bad} of {rows} rows are bad; --skip-bad (data.skip_bad=true) goes on without them",
                bad=len(bad),
                rows=rows,
            )
        )
    raise InputError(lines)


def _read_tools(path: str | None) -> tuple[Mapping[str, Any], ...]:
    if path is None:
        return ()
    _check_readable(Path(path))
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        tools = normal_tools(found if isinstance(found, list) else [found])
    except ValueError as error:
        raise InputError(t("data.tools: {path}: {problem}", path=path, problem=error)) from None
    if not tools:
        raise InputError(t("data.tools: {path}: {problem}", path=path, problem=t("the list is empty")))
    return tools


def arguments(words: Sequence[str], skip_bad: bool = False) -> tuple[list[str], DataOptions]:
    """The files and the options in a command line's words: ``rows.csv columns.prompt=题 data.template=问：{题}``."""
    files: list[str] = []
    settings: list[str] = []
    for word in words:
        key = word.partition("=")[0].removeprefix("data.").partition(".")[0]
        is_setting = "=" in word and key in DataOptions.model_fields and not Path(word).exists()
        (settings if is_setting else files).append(word.removeprefix("data.") if is_setting else word)
    options = build(DataOptions, config.read({}, settings))
    return files, options.model_copy(update={"skip_bad": skip_bad or options.skip_bad})


def read_all(files: Sequence[str], options: DataOptions) -> list[Source]:
    """The sources of several files; one InputError with all that is wrong in any of them."""
    found = _Files(options, {}, 0)
    for name in files:
        found.rows(name)
    found.report()
    return found.sources


# ---- all of a recipe's data ------------------------------------------------------------------------------------------


def load(options: DataOptions, task: str, *, generators: Generators | None = None, seed: int = 0) -> Splits:
    """Train, validation and test rows as ``options`` name them; ``task`` is the task's name (sft needs conversations).

    ``train: generate:NAME`` draws from ``generators[NAME](seed)``. A share is taken from the training rows by dialogue
    (split.py). InputError lists every bad row of every file.
    """
    if options.replay:
        from weitiao.data.replay import replayed

        own = load(options.model_copy(update={"replay": None}), task, generators=generators, seed=seed)
        return replayed(own, options, task, generators or {}, seed)
    if options.format == "crosswoz":
        from weitiao.data import crosswoz

        return crosswoz.load(options, task, seed)
    names = [options.train] if isinstance(options.train, str) else options.train
    if not names:
        raise InputError(t("data.train: names nothing; give a file of rows, such as data.train=rows.jsonl"))
    files = _Files(options, generators or {}, seed, task)
    train = [row for name in names for row in files.rows(name)]
    held_out = {"validation": options.validation, "test": options.test}
    given = {part: files.rows(name) for part, name in held_out.items() if isinstance(name, str)}
    files.report()
    if task == "sft":
        _refuse_texts([*train, *(row for rows in given.values() for row in rows)])
    shares = {part: share for part, share in held_out.items() if isinstance(share, float) and share}
    said = files.said
    if shares:
        rest = 1 - sum(shares.values())
        train, *parts = split(train, [rest, *shares.values()], seed=seed)
        given |= dict(zip(shares, parts, strict=True))
        said += [t("{part}: none, there are too few rows to share", part=part) for part in shares if not given[part]]
    return Splits(train, given.get("validation", []), given.get("test", []), said)


class _Files:
    """The sources of one recipe: read in turn, their problems told together."""

    def __init__(self, options: DataOptions, generators: Generators, seed: int, task: str = ""):
        self.options, self.generators, self.seed, self.task = options, generators, seed, task
        self.tools = _read_tools(options.tools)
        self.sources: list[Source] = []
        self.problems: list[str] = []

    @property
    def said(self) -> list[str]:
        return [line for source in self.sources for line in source.said]

    def rows(self, name: str) -> list[Row]:
        try:
            if name.startswith(GENERATE):
                source = self._generated(name)
            else:
                source = _scan(Path(name), self.options, self.tools, self.task)
        except InputError as error:
            self.problems += error.problems
            return []
        self.sources.append(source)
        return source.rows

    def _generated(self, name: str) -> Source:
        generator = self.generators.get(name.removeprefix(GENERATE))
        if generator is None:
            known = ", ".join(f"{GENERATE}{known}" for known in self.generators) or t("none")
            raise InputError(t("{name}: no such generator; known: {known}", name=name, known=known))
        return Source(list(generator(self.seed)), "generated")

    def report(self) -> None:
        """One InputError with whatever was wrong anywhere."""
        try:
            _refuse_bad(self.sources, self.options.skip_bad)
        except InputError as error:
            raise InputError([*self.problems, *error.problems]) from None
        if self.problems:
            raise InputError(self.problems)


def _refuse_texts(rows: Sequence[Row]) -> None:
    text = next((row for row in rows if isinstance(row, Text)), None)
    if text is not None:
        raise InputError(
            t("{where}: is plain text; task sft needs questions and answers, task pretrain takes text", where=text.id)
        )
