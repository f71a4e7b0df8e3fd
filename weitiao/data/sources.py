"""Sources: what a person names as data becomes rows, and everything that is wrong with it is said at once.

    splits = load(DataOptions(train="rows.jsonl", validation=0.1), "sft")
    source = read("rows.jsonl", DataOptions())      # source.rows, source.format, source.said

Files are jsonl, json, csv, tsv, parquet or txt (formats.py); their records' keys say what they mean (layouts.py).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weitiao import config
from weitiao.config import build
from weitiao.data import remote
from weitiao.data.bad import BadRow, counted, listed
from weitiao.data.layouts import normal_tools
from weitiao.data.mix import mix
from weitiao.data.options import DataOptions, SourceOptions
from weitiao.data.patch import Patch
from weitiao.data.reader import Reader, check_readable, problem_of
from weitiao.data.remote import fetched
from weitiao.data.rows import Row, Text
from weitiao.data.split import group_of, repeated, split
from weitiao.errors import InputError, t
from weitiao.runs import command

__all__ = ["BadRow", "DataOptions", "Reader", "Source", "Splits", "load", "problem_of", "read", "read_all", "scan"]

GENERATE = "generate:"
SETTING = re.compile(r"(?:data\.)?(\w+)(?:\.\w+)*=")
Generators = Mapping[str, Callable[[int], Iterable[Row]]]


@dataclass(frozen=True)
class Source:
    """What one file holds: its rows, their layout (``format``), the line of each, and what a person should be told.
    ``records`` are the file's own objects, row by row, where they were asked for."""

    rows: list[Row]
    format: str
    lines: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    path: Path = Path()


@dataclass(frozen=True)
class Splits:
    """Rows to train, choose and test on, and what a person should be told about where they came from."""

    train: list[Row]
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    replayed: frozenset[int] = frozenset()  # places in ``train`` of rows against forgetting


# ---- one file --------------------------------------------------------------------------------------------------------


def read(path: str | Path, options: DataOptions, task: str = "") -> Source:
    """The rows of one file; those of task ``classify`` have labels. InputError names every bad row, FILE:LINE and why,
    unless ``options.skip_bad``."""
    patch = Patch.read(options.patch)
    source = scan(Path(path), options, read_tools(options.tools), task, patch)
    _refuse_bad([source], options.skip_bad)
    if patch.problems:
        raise InputError(patch.problems)
    source.said.extend(patch.said)
    return source


def scan(
    path: Path,
    options: DataOptions,
    tools: tuple[Mapping[str, Any], ...] = (),
    task: str = "",
    patch: Patch | None = None,
    *,
    keep: bool = False,
    mend: Callable[[Any], Any] | None = None,
) -> Source:
    """The rows of one file, its bad ones collected and not refused. ``patch`` edits the records, then ``mend`` what
    stays of them; ``keep``: the source also has the records that its rows were made of."""
    reader = Reader(path, options, tools, task, patch, mend=mend)
    source = Source([], reader.layout.name, said=reader.said, path=path)
    for line, row, own in reader:
        if isinstance(row, BadRow):
            source.bad.append(row)
            continue
        source.lines.append(line)
        source.rows.append(row)
        if keep:
            source.records.append(own)
    counts = len(source.rows), len(source.bad)
    source.said.extend([*reader.told(*counts), *left_out(path, *counts, options.skip_bad)])
    if options.skip_bad:
        source.said.extend(counted(source.bad))
    return source


def left_out(path: Path, rows: int, bad: int, skip: bool) -> list[str]:
    """The sentence about bad rows that were skipped, if any were."""
    message = "{path}: {count} bad rows left out, {rows} kept"
    return [t(message, path=path, count=bad, rows=rows)] if bad and skip else []


def _refuse_bad(sources: Sequence[Source], skip: bool) -> None:
    """InputError with the bad rows and their count, unless they are to be skipped and something is left."""
    lines = listed([row for source in sources for row in source.bad])
    refuse_bad([(len(source.rows), len(source.bad)) for source in sources], lines, skip)


def refuse_bad(found: Sequence[tuple[int, int]], lines: Sequence[str], skip: bool) -> None:
    """The same for (good rows, bad rows) of every source, the bad ones told in ``lines``."""
    bad, rows = sum(bad for _, bad in found), sum(good + bad for good, bad in found)
    nothing_left = any(not good for good, _ in found)
    if not bad or (skip and not nothing_left):
        return
    if nothing_left:
        message = "{bad} of {rows} rows are bad, and nothing would be left without them"
    else:
        message = "{bad} of {rows} rows are bad; --skip-bad (data.skip_bad=true) goes on without them"
    raise InputError([*lines, t(message, bad=bad, rows=rows)])


def read_tools(path: str | None) -> tuple[Mapping[str, Any], ...]:
    """The tool schemas of ``data.tools``; InputError where there are none in it."""
    if path is None:
        return ()
    check_readable(Path(path))
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
        key = SETTING.match(word)
        is_setting = key is not None and key[1] in DataOptions.model_fields and not Path(word).exists()
        (settings if is_setting else files).append(word.removeprefix("data.") if is_setting else word)
    options = build(DataOptions, config.read({}, settings))
    return files, options.model_copy(update={"skip_bad": skip_bad or options.skip_bad})


def read_all(files: Sequence[str], options: DataOptions, *, keep: bool = False) -> list[Source]:
    """The sources of several files; one InputError with all that is wrong in any of them. ``keep`` as for ``scan``."""
    found = _Files(options, {}, 0, keep=keep)
    for name in (str(path) for file in files for path in remote.files(file)):
        found.rows(name)
    found.report()
    if found.sources:
        found.sources[-1].said.extend(found.patch.said)
    return found.sources


# ---- all of a recipe's data ------------------------------------------------------------------------------------------


def load(options: DataOptions, task: str, *, generators: Generators | None = None, seed: int = 0) -> Splits:
    """Train, validation and test rows as ``options`` name them; ``task`` is the task's name (sft needs conversations).

    ``train: generate:NAME`` draws from ``generators[NAME](seed)``. A share is taken from the training rows by dialogue
    (split.py). InputError lists every bad row of every file.
    """
    options = fetched(options)
    if options.replay:
        from weitiao.data.replay import replayed

        own = load(options.model_copy(update={"replay": None}), task, generators=generators, seed=seed)
        return replayed(own, options, task, generators or {}, seed)
    if options.format == "crosswoz":
        from weitiao.data import crosswoz

        return crosswoz.load(options, task, seed)
    if not options.sources:
        raise InputError(t("data.train: names nothing; give a file of rows, such as data.train=rows.jsonl"))
    files = _Files(options, generators or {}, seed, task)
    drawn = [(place, row) for place, one in enumerate(options.sources) for row in files.rows(one.path)]
    held_out = {"validation": options.validation, "test": options.test}
    given = {part: files.rows(name) for part, name in held_out.items() if isinstance(name, str)}
    twice = _duplicates(files.sources[: len(options.sources)])
    files.report()
    if task == "sft":
        for row in itertools.chain((row for _, row in drawn), *given.values()):
            refuse_text(row)
    shares = {part: share for part, share in held_out.items() if isinstance(share, float) and share}
    said = [*files.said, *twice]
    if shares:
        rest = 1 - sum(shares.values())
        drawn, *parts = split(drawn, [rest, *shares.values()], group=lambda pair: group_of(pair[1]), seed=seed)
        given |= {name: [row for _, row in part] for name, part in zip(shares, parts, strict=True)}
        said += [_none(part, [row for _, row in drawn]) for part in shares if not given[part]]
    train, more = _mixed(drawn, options.sources, seed)
    return Splits(train, given.get("validation", []), given.get("test", []), said + more)


def _none(part: str, rows: Sequence[Row]) -> str:
    """Why a part has none of the ``rows``, and how to have it all the same."""
    message = (
        "{part}: none: the {rows} rows are too few to share ({groups} where those that say the same or belong to one "
        "dialogue count once); give data.{part}=FILE, or data.{part}=0"
    )
    return t(message, part=part, rows=len(rows), groups=len({group_of(row) for row in rows}))


def _duplicates(sources: Sequence[Source]) -> list[str]:
    """A notice of training rows that say exactly what an earlier one says; what a generator draws is its own affair."""
    placed = [(f"{one.path}:{line}", row) for one in sources for line, row in zip(one.lines, one.rows, strict=False)]
    twice = repeated([row for _, row in placed])
    if not twice:
        return []
    later, first = next(iter(twice.items()))
    message = "exact duplicates: {count} training rows, first {later} = {first}; to leave them out: {command}"
    clean = command("weitiao", "data", "clean", *dict.fromkeys(str(one.path) for one in sources if one.lines))
    return [t(message, count=len(twice), later=placed[later][0], first=placed[first][0], command=clean)]


def _mixed(
    drawn: Sequence[tuple[int, Row]], sources: Sequence[SourceOptions], seed: int
) -> tuple[list[Row], list[str]]:
    """The training rows with every source's repeat and weight, and what became of each source. What is held out is
    taken before, so that nothing is measured twice."""
    if all(one.repeat == 1 and one.weight is None for one in sources):
        return [row for _, row in drawn], []
    rows: list[list[Row]] = [[] for _ in sources]
    for place, row in drawn:
        rows[place].append(row)
    mixed = mix(rows, sources, seed)
    return [row for part in mixed for row in part], mixed_said(sources, [*map(len, rows)], [*map(len, mixed)])


def mixed_said(sources: Sequence[SourceOptions], rows: Sequence[int], taken: Sequence[int]) -> list[str]:
    """What became of each source, where there is one with a repeat or weight: of its ``rows`` so many were taken."""
    if all(one.repeat == 1 and one.weight is None for one in sources):
        return []
    message, total = "{path}: {rows} rows, seen {times} times: {taken} of {all}", sum(taken)
    return [
        t(message, path=one.path, rows=own, times=f"{got / max(1, own):.3g}", taken=got, all=total)
        for one, own, got in zip(sources, rows, taken, strict=True)
    ]


class _Files:
    """The sources of one recipe: read in turn, their problems told together."""

    def __init__(self, options: DataOptions, generators: Generators, seed: int, task: str = "", *, keep: bool = False):
        self.options, self.generators, self.seed, self.task, self.keep = options, generators, seed, task, keep
        self.tools = read_tools(options.tools)
        self.patch = Patch.read(options.patch)
        self.sources: list[Source] = []
        self.problems: list[str] = []

    @property
    def said(self) -> list[str]:
        return [line for source in self.sources for line in source.said] + self.patch.said

    def rows(self, name: str) -> list[Row]:
        try:
            if name.startswith(GENERATE):
                source = self._generated(name)
            else:
                source = scan(Path(name), self.options, self.tools, self.task, self.patch, keep=self.keep)
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
        if problems := [*self.problems, *self.patch.problems]:
            raise InputError(problems)


def refuse_text(row: Row, mark: str = "", path: Path = Path()) -> None:
    """InputError for plain text; a ``mark`` in the row's name stands for the path."""
    if isinstance(row, Text):
        where = row.id.replace(mark, str(path), 1) if mark else row.id
        message = "{where}: is plain text; task sft needs questions and answers, task pretrain takes text"
        raise InputError(t(message, where=where))
