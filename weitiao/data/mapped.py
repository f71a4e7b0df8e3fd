"""Rows too large for memory: examples that lie on disk and are mapped, the same as ``sources.load`` and
``render.examples`` make in memory.

    if applies(options, "pretrain"):
        made = load(options, "pretrain", tokenizer, seed=0, max_positions=2048)
        made.train[4_000_000].ids, made.train.lengths        # what is not looked at is not in memory
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from weitiao.data.bad import BadRow
from weitiao.data.batch import Example
from weitiao.data.examples import KINDS, Work, complain, limit_of, told
from weitiao.data.mix import mix
from weitiao.data.options import DataOptions
from weitiao.data.patch import Patch
from weitiao.data.render import Renderer
from weitiao.data.rows import Row
from weitiao.data.sources import GENERATE, Reader, left_out, mixed_said, read_tools, refuse_bad
from weitiao.data.split import group_of, parts_of, place_of
from weitiao.data.tokenise import HERE, Job, State, ToolsMet, store
from weitiao.errors import InputError, first_of, t

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGE_BYTES = 64 << 20  # from here on ``data.memory_map: auto`` has rows on disk


def applies(options: DataOptions, task: str) -> bool:
    """Whether rows are tokenised to disk: where ``data.memory_map`` says so, or files are large. InputError where it
    was asked for and cannot be."""
    files = [Path(one.path) for one in options.sources]
    why_not = ""
    if task not in ("pretrain", "sft"):
        why_not = t("not for task {task}", task=task)
    elif options.replay or options.format == "crosswoz":
        why_not = t("not with data.replay or format crosswoz")
    elif not files or any(one.path.startswith(GENERATE) for one in options.sources):
        why_not = t("rows have to be in files")
    if options.memory_map == "on" and why_not:
        raise InputError(t("data.memory_map: {reason}", reason=why_not))
    if options.memory_map != "auto" or why_not:
        return options.memory_map == "on"
    return sum(path.stat().st_size for path in files if path.is_file()) >= LARGE_BYTES


@dataclass(frozen=True)
class Store:
    """What became of one file."""

    path: Path
    key: str
    columns: Mapping[str, np.ndarray]
    state: State

    def __len__(self) -> int:
        return len(self.columns["trained"])

    def example(self, number: int) -> Example:
        """One of its examples."""
        own = self.columns
        runs, ids = self._part("runs", number), self._part("ids", number).astype(np.int32)
        mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs) if len(runs) else np.ones(len(ids), bool)
        name = own["names"][slice(*self._span("names", number))].tobytes().decode("utf-8", "surrogatepass")
        return Example(ids, mask, name.replace(HERE, str(self.path), 1))

    def _span(self, name: str, number: int) -> tuple[int, int]:
        ends = self.columns[f"{name}_end"]
        return int(ends[number - 1]) if number else 0, int(ends[number])

    def _part(self, name: str, number: int) -> np.ndarray:
        start, end = self._span(name, number)
        return self.columns[name][start:end]

    def examples_of(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the examples of some rows, in the order of these."""
        ends = self.columns["row_end"]
        if np.array_equal(ends, np.arange(1, len(ends) + 1)):
            return rows  # one of each
        starts = np.concatenate([[0], ends[:-1]])[rows]
        counts = ends[rows] - starts
        return np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())

    def odd(self) -> np.ndarray:
        """(row, how often each of KINDS) of the rows where anything of it happened, int64 [rows, 7]."""
        return self.columns["odd"].reshape(-1, 1 + len(KINDS))


class Mapped(Sequence[Example]):
    """Examples by their numbers in several stores. Lengths and counts are at hand without looking at one; ``digest`` is
    the same for the same examples in the same order."""

    def __init__(self, stores: Sequence[Store], numbers: Sequence[np.ndarray], rows: int, work: Work, said: list[str]):
        """``numbers``: those of every store's examples that are here, in their order."""
        self.stores, self.rows, self.said = stores, rows, said
        self.truncated, self.masked_out = work.counts["cut"], work.counts["empty"]
        self.numbers = list(numbers)
        self.bounds = np.cumsum([0, *map(len, numbers)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        place = int(np.searchsorted(self.bounds, index, "right")) - 1
        return self.stores[place].example(int(self.numbers[place][index - self.bounds[place]]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every example, int32."""
        return self._each(lambda store: np.diff(store.columns["ids_end"], prepend=0))

    @cached_property
    def trained(self) -> np.ndarray:
        """Tokens of every example that are predicted, int32."""
        return self._each(lambda store: store.columns["trained"])

    def _each(self, column: Callable[[Store], np.ndarray]) -> np.ndarray:
        pairs = zip(self.stores, self.numbers, strict=True)
        return np.concatenate([column(one)[numbers].astype(np.int32) for one, numbers in pairs])

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def trained_tokens(self) -> int:
        """Tokens that are predicted."""
        return int(self.trained.sum(dtype=np.int64))

    @cached_property
    def digest(self) -> str:
        """What they are, by the files' hashes and the numbers of the examples."""
        found = hashlib.blake2b(digest_size=16)
        for one, numbers in zip(self.stores, self.numbers, strict=True):
            found.update(one.key.encode() + np.ascontiguousarray(numbers, np.int64).tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Loaded:
    """Examples to train and to validate on, the renderer, the tool schemas of the rows, what a person should be
    told."""

    train: Sequence[Example]
    validation: Sequence[Example]
    renderer: Renderer
    tools: list[Mapping[str, Any]]
    said: list[str] = field(default_factory=list)


def load(
    options: DataOptions,
    task: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    max_positions: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Loaded:
    """The examples of a recipe, made where they are not in the cache yet. InputError as for ``sources.load`` and
    ``render.examples``."""
    tools = read_tools(options.tools)
    shares, seeds = _seeds(options, seed)
    for expects in (True,) if tools else (False, True):
        renderer = Renderer.of(tokenizer, tools=expects, override=options.chat_template)
        limit = limit_of(renderer, options, max_positions)
        job = Job(options, task, renderer, limit, tools, *seeds, expects_tools=expects, progress=progress)
        try:
            train, given = _stores(options, job)
            break
        except ToolsMet:
            continue
    else:
        raise AssertionError("a renderer that expects tools meets none")
    said = [line.replace(HERE, str(one.path)) for one in (*train, *given.values()) for line in _said(one, options)]
    said += _patched(options, [*train, *given.values()])
    parts: dict[str, list[np.ndarray]] = {"train": [np.arange(one.state.rows) for one in train]}
    if shares:
        parts = _dealt(train, shares)
        for name in shares:
            if not sum(map(len, parts[name])):
                said.append(t("{part}: none, there are too few rows to share", part=name))
    rows = _mixed(parts["train"], train, options, seed)
    said += mixed_said(options.sources, [*map(len, parts["train"])], [*map(len, rows)])
    schemas = {key: schema for one in train for key, schema in one.state.tools.items()}
    held_out = ([given["validation"]], [np.arange(given["validation"].state.rows)]) if "validation" in given else None
    held_out = held_out or (train, parts.get("validation", []))
    validation = _examples(*held_out, job) if sum(map(len, held_out[1])) else []
    return Loaded(_examples(train, rows, job), validation, renderer, [*schemas.values()], said)


def texts(options: DataOptions, task: str, seed: int = 0) -> Iterator[Row]:
    """The rows to train on, read once more from the files and held nowhere; bad ones are passed over, and sources are
    not mixed: for a tokenizer that is to be trained."""
    shares, _ = _seeds(options, seed)
    bound = 1 - sum(shares.values())
    tools = read_tools(options.tools)
    for one in options.sources:
        for _, row, _ in Reader(Path(one.path), options, tools, task, Patch.read(options.patch)):
            if not isinstance(row, BadRow) and (not shares or place_of(group_of(row), seed) >= 1 - bound):
                yield row


def _seeds(options: DataOptions, seed: int) -> tuple[dict[str, float], tuple[int | None, int | None]]:
    """The shares that are split off, and the seeds of split and mixing where there is anything to draw."""
    held_out = {"validation": options.validation, "test": options.test}
    shares = {name: share for name, share in held_out.items() if isinstance(share, float) and share}
    plain = all(one.repeat == 1 and one.weight is None for one in options.sources)
    return shares, (seed if shares else None, None if plain else seed)


def _stores(options: DataOptions, job: Job) -> tuple[list[Store], dict[str, Store]]:
    """What became of every training file, and of the files given to validate and test on; one InputError with all that
    is wrong in them."""
    problems: list[str] = []
    found: list[Store] = []
    parts = {"validation": options.validation, "test": options.test}
    given = {name: path for name, path in parts.items() if isinstance(path, str)}
    for name in (*(one.path for one in options.sources), *given.values()):
        try:
            path = Path(name)
            found.append(Store(path, *store(path, job)))
        except InputError as error:
            problems += error.problems
    first = [[f"{one.path}:{line}: {reason}" for line, reason in one.state.first] for one in found]
    counts = [(one.state.rows, one.state.bad) for one in found]
    try:
        lines = first_of([line for part in first for line in part], count=sum(bad for _, bad in counts))
        refuse_bad(counts, lines, options.skip_bad)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    return found[: len(options.sources)], dict(zip(given, found[len(options.sources) :], strict=True))


def _said(one: Store, options: DataOptions) -> list[str]:
    return [*one.state.said, *left_out(one.path, one.state.rows, one.state.bad, options.skip_bad)]


def _patched(options: DataOptions, stores: Sequence[Store]) -> list[str]:
    """What the patch did in all files; InputError for decisions that met no row in any."""
    patch = Patch.read(options.patch)
    for one in stores:
        for key, times in one.state.met.items():
            patch.met[key] = patch.met.get(key, 0) + times
    if patch.problems:
        raise InputError(patch.problems)
    return patch.said


def _dealt(stores: Sequence[Store], shares: Mapping[str, float]) -> dict[str, list[np.ndarray]]:
    """The rows of every store by part."""
    names = ["train", *shares]
    places = np.concatenate([one.columns["place"] for one in stores])
    part_of = parts_of(places, [1 - sum(shares.values()), *shares.values()])
    bounds = np.cumsum([one.state.rows for one in stores])[:-1]
    split = np.split(part_of, bounds)
    return {name: [np.flatnonzero(own == part) for own in split] for part, name in enumerate(names)}


def _mixed(
    parts: Sequence[np.ndarray], stores: Sequence[Store], options: DataOptions, seed: int
) -> Sequence[np.ndarray]:
    """The training rows of every store with its repeat and weight."""
    if "content" not in stores[0].columns:
        return parts
    pairs = [[(place, int(row)) for row in rows] for place, rows in enumerate(parts)]
    taken = mix(pairs, options.sources, seed, place=lambda pair: float(stores[pair[0]].columns["content"][pair[1]]))
    return [np.array([row for _, row in rows], np.int64) for rows in taken]


def _examples(stores: Sequence[Store], rows: Sequence[np.ndarray], job: Job) -> Mapped:
    """The examples of some rows of every store; InputError with all that is wrong with these."""
    work = Work()
    for one, own in zip(stores, rows, strict=True):
        odd = one.odd()
        times = np.bincount(own, minlength=one.state.rows)[odd[:, 0]]
        for place, kind in enumerate(KINDS, 1):
            work.note(kind, count=int((odd[:, place] * times).sum()))
        here = {*odd[times > 0, 0].tolist()}
        for kind, messages in one.state.messages.items():
            for row, line in messages:
                if row in here:
                    work.note(kind, line.replace(HERE, str(one.path)), count=0)
    numbers = [one.examples_of(own) for one, own in zip(stores, rows, strict=True)]
    made = Mapped(stores, numbers, sum(map(len, rows)), work, [])
    work.trained = bool(len(made)) and bool((made.trained > 0).any())
    complain(work, job.options, job.limit, len(made))
    made.said = told(work, job.options, job.limit)
    return made
