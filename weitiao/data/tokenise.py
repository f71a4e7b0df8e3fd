"""A file of rows to columns of tokens on disk, in pieces, while the next piece is read.

    folder = store(Path("rows.jsonl"), job)             # made now, or there already
    columns, facts = read(folder, job.kinds())

What came of a file lies in the cache folder under the hash of all that it depends on: the file's bytes, tokenizer, chat
template, options. A killed run goes on behind the last commit. What is stored is what ``sources.load`` and
``render.examples`` have in memory, row by row, with all that mapped.py needs to split, mix and complain as they do.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weitiao import __version__
from weitiao.data.columns import Writer, read
from weitiao.data.examples import KINDS, SHOWN, worked
from weitiao.data.options import DataOptions
from weitiao.data.patch import Patch
from weitiao.data.rows import Chat, Row, Text, text_of
from weitiao.data.sources import BadRow, Reader, refuse_text
from weitiao.data.spans import encode_texts
from weitiao.data.split import content_of, group_of, place_of
from weitiao.errors import say
from weitiao.machine.lock import Lock
from weitiao.machine.speed import cache_folder
from weitiao.runs import write_atomic
from weitiao.weights.cache import digest

if TYPE_CHECKING:
    from weitiao.data.render import Renderer

ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 4096, 1 << 20  # whichever comes first: the library takes 150 bytes for a token
ROWS_A_COMMIT, TOKENS_A_COMMIT = 16 * ROWS_AT_ONCE, 1 << 22
WORKERS = 2  # while one is at what holds the interpreter's lock, the library has both cores for the other
MESSAGES = 200  # of a kind that a store keeps: which part a row falls to is not known yet
HERE = "\0"  # stands for the file's path in what is stored: the same file may lie elsewhere next time
UNCHANGED_NS = 2_000_000_000  # a file younger than this may change again within one tick of its clock

# By example: where its tokens, the runs of its mask and its name end, and how many tokens are trained. A mask is the
# lengths of its runs, untrained first; no run: all is trained. By row: where its examples end, the place of its group
# and of what it says in [0, 1). ``odd``: (row, how often each of KINDS) of those rows where anything of it happened.
KINDS_OF = {
    "runs": "u4", "names": "u1", "ids_end": "i8", "runs_end": "i8", "names_end": "i8", "trained": "u4",
    "row_end": "i8", "place": "f8", "content": "f8", "odd": "i8",
}  # fmt: skip


class ToolsMet(Exception):
    """Rows bring tools, and the renderer was made for rows without."""


@dataclass(frozen=True)
class Job:
    """How rows become tokens. ``seed``: of the split, None where nothing is split off; ``mix_seed``: of mixing, None
    where every row is taken once; ``expects_tools``: what the renderer was made for; ``progress`` is called with the
    number of rows done."""

    options: DataOptions
    task: str
    renderer: Renderer
    limit: int | None
    tools: tuple[Mapping[str, Any], ...]
    seed: int | None
    mix_seed: int | None
    expects_tools: bool
    progress: Callable[[int, int | None], None] | None = None

    def kinds(self) -> dict[str, str]:
        """The columns, and the kind of number of each."""
        kinds = {"ids": "u2" if len(self.renderer.tokenizer) <= 1 << 16 else "u4"} | KINDS_OF
        unused = {"place": self.seed is None, "content": self.mix_seed is None}
        return {name: kind for name, kind in kinds.items() if not unused.get(name)}

    def key(self, path: Path) -> str:
        """The hash of all that the stored columns of a file depend on."""
        from tokenizers import __version__ as library

        options, renderer = self.options, self.renderer
        parts: list[Any] = [1, __version__, library, file_digest(path), path.suffix, self.task, self.seed]
        parts += [
            self.mix_seed,
            self.limit,
            self.tools,
            options.model_dump(include={"format", "columns", "template", "train_on"}),
        ]
        parts += [options.patch and file_digest(Path(options.patch)), renderer.template, renderer.folds_system]
        parts += [renderer.ends_turns, renderer.tokenizer.backend_tokenizer.to_str()]
        parts += [renderer.tokenizer.special_tokens_map, sorted(renderer.marker.end_ids)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """sha256 of a file, remembered for as long as its name, size, times and place on the disk stay."""
    status = path.stat()
    now = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    name = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    memory = cache_folder() / "tokens" / "files" / f"{name}.json"
    try:
        known = json.loads(memory.read_text())
        if known["status"] == now:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    began = time.time_ns()
    found = digest(path)
    if max(status.st_mtime_ns, status.st_ctime_ns) < began - UNCHANGED_NS:
        write_atomic(memory, json.dumps({"status": now, "sha256": found}))
    return found


# ---- one file to columns ---------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """What came of some rows: columns whose ends count from the piece's own start, tool schemas, what to report."""

    columns: dict[str, np.ndarray]
    rows: int
    messages: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    tools: dict[str, Any] = field(default_factory=dict)


def piece_of(rows: Sequence[Row], job: Job) -> Piece:
    """Some rows as columns."""
    if job.task == "pretrain" and all(isinstance(row, Text) for row in rows):
        texts = [row.text for row in rows if isinstance(row, Text)]
        ids, lengths = encode_texts(job.renderer.tokenizer, texts)
        if lengths.min() > 1:  # a single token has nothing to predict it from: that is to be said
            return _of_texts(rows, ids, lengths, job.limit)
    works = list(worked(rows, job.renderer, job.options, job.task, job.limit))
    examples = [example for work in works for example in work.items]
    counts = np.array([[work.counts[kind] for kind in KINDS] for work in works], np.int64)
    odd = np.flatnonzero(counts.any(1))
    runs = [_runs(example.mask) for example in examples]
    names = [example.id.encode("utf-8", "surrogatepass") for example in examples]
    columns = {
        "ids": np.concatenate([example.ids for example in examples] or [np.empty(0, np.int32)]),
        "runs": np.concatenate(runs or [np.empty(0, np.int64)]),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "ids_end": _ends(map(len, examples)),
        "runs_end": _ends(map(len, runs)),
        "names_end": _ends(map(len, names)),
        "trained": np.array([example.trained_tokens for example in examples], np.uint32),
        "row_end": _ends(len(work.items) for work in works),
        "odd": np.column_stack([odd, counts[odd]]).reshape(-1),
    }
    messages: dict[str, list[tuple[int, str]]] = {}
    for place in odd.tolist():
        for kind, said in works[place].messages.items():
            messages.setdefault(kind, []).extend((place, line) for line in said)
    schemas = (schema for row in rows if isinstance(row, Chat) for schema in row.tools)
    tools = {json.dumps(schema, sort_keys=True, ensure_ascii=False): schema for schema in schemas}
    return Piece(columns, len(rows), messages, tools)


def _of_texts(rows: Sequence[Row], ids: np.ndarray, lengths: np.ndarray, limit: int | None) -> Piece:
    """Texts of which every token is trained; one that is too long is several examples, as even as can be."""
    parts = -(-lengths // limit) if limit is not None else np.ones_like(lengths)
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    sizes = np.repeat(lengths // parts, parts) + (number < np.repeat(lengths % parts, parts))
    names = [row.id.encode("utf-8", "surrogatepass") for row in rows]
    if len(sizes) > len(rows):
        pairs = zip(names, parts.tolist(), strict=True)
        names = [b"%s:%d" % (name, n) if count > 1 else name for name, count in pairs for n in range(1, count + 1)]
    empty = np.empty(0, np.int64)
    columns = {
        "ids": ids, "runs": empty, "names": np.frombuffer(b"".join(names), np.uint8), "ids_end": np.cumsum(sizes),
        "runs_end": np.zeros_like(sizes), "names_end": _ends(map(len, names)), "trained": sizes - 1,
        "row_end": np.cumsum(parts), "odd": empty,
    }  # fmt: skip
    return Piece(columns, len(rows))


def _ends(lengths: Iterable[int]) -> np.ndarray:
    return np.cumsum(np.fromiter(lengths, np.int64))


def _runs(mask: np.ndarray) -> np.ndarray:
    """The lengths of a mask's runs, untrained first."""
    turns = np.flatnonzero(np.diff(mask, prepend=False, append=~mask[-1:]))
    return np.diff(turns, prepend=0)


# ---- the file, piece by piece ----------------------------------------------------------------------------------------


@dataclass
class State:
    """How far a file has been read: records ``read``, good ``rows`` and ``bad`` ones of these, the ``first`` of the bad
    as (line, reason), and what is to be said of the rows so far. It is what a commit keeps."""

    read: int = 0
    rows: int = 0
    bad: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)
    messages: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    tools: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    met: dict[str, int] = field(default_factory=dict)

    def put(self, piece: Piece, writer: Writer, rows: Sequence[Row], job: Job) -> None:
        """Append a piece, and the places of its rows."""
        columns, start = dict(piece.columns), self.rows
        for name, of in (("ids_end", "ids"), ("runs_end", "runs"), ("names_end", "names"), ("row_end", "trained")):
            columns[name] = columns[name] + writer.length(of)
        odd = columns["odd"].reshape(-1, 1 + len(KINDS)).copy()
        odd[:, 0] += start
        columns["odd"] = odd.reshape(-1)
        if job.seed is not None:
            columns["place"] = np.array([place_of(group_of(row), job.seed) for row in rows], np.float64)
        if job.mix_seed is not None:
            columns["content"] = np.array([place_of(content_of(row), job.mix_seed) for row in rows])
        writer.append(**columns)
        self.rows += piece.rows
        self.tools |= piece.tools
        for kind, found in piece.messages.items():
            kept = self.messages.setdefault(kind, [])
            kept += [(start + place, line) for place, line in found[: MESSAGES - len(kept)]]


@dataclass
class Chunk:
    """Rows that come next, and how far the file has been read behind them."""

    rows: list[Row] = field(default_factory=list)
    read: int = 0
    bad: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)


def store(path: Path, job: Job) -> tuple[str, dict[str, np.ndarray], State]:
    """The key of a file, its columns and what is to be said of it, made now where they are not there. Where bad rows
    are not to be skipped and there are any, no more rows are made than stand before them: the caller refuses them."""
    key = job.key(path)
    folder = cache_folder() / "tokens" / key
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        if (found := read(folder, job.kinds())) is None:
            state = _build(path, job, folder)
            found = read(folder, job.kinds())
            if found is None:
                return key, {}, state
    columns, facts = found
    state = State(**facts)
    if state.tools and not job.expects_tools:
        raise ToolsMet
    return key, columns, state


def _build(path: Path, job: Job, folder: Path) -> State:
    """Read, render and tokenise a file into the columns of ``folder``, from where a killed process left off."""
    patch = Patch.read(job.options.patch)
    with Writer(folder, job.kinds()) as writer, ThreadPoolExecutor(WORKERS) as pool:
        state = State(**writer.facts)
        if state.tools and not job.expects_tools:
            raise ToolsMet
        _say_begin(path, state, folder)
        reader = Reader(path, job.options, job.tools, job.task, patch, named=HERE)
        deque(islice(reader.stream, state.read), maxlen=0)
        reader.layout.unused |= {*state.unused}
        reader.layout.numbers |= {*state.numbers}
        pending: deque[tuple[Chunk, Future[Piece]]] = deque()
        committed, whole = (state.rows, writer.length("ids")), True

        def put() -> None:
            nonlocal committed
            chunk, future = pending.popleft()
            state.put(future.result(), writer, chunk.rows, job)
            state.read, state.bad, state.first = chunk.read, chunk.bad, chunk.first
            if job.progress:
                job.progress(state.rows, None)
            now, met = (state.rows, writer.length("ids")), bool(state.tools) and not job.expects_tools
            if met or now[0] - committed[0] >= ROWS_A_COMMIT or now[1] - committed[1] >= TOKENS_A_COMMIT:
                committed = now
                state.unused, state.numbers = sorted(reader.layout.unused), sorted(reader.layout.numbers)
                writer.commit(asdict(state))
            if met:
                raise ToolsMet

        last = before = Chunk(read=state.read, bad=state.bad, first=state.first)
        for last in _chunks(reader, before, job.task):
            whole = whole and (job.options.skip_bad or not last.bad)
            if not whole:  # the rest is only read, so that all bad rows are counted
                last.rows.clear()
            elif last.rows:
                pending.append((last, pool.submit(piece_of, last.rows, job)))
            while len(pending) > WORKERS:
                put()
        while pending:
            put()
        if not whole:
            state.unused, state.numbers = sorted(reader.layout.unused), sorted(reader.layout.numbers)
            writer.commit(asdict(state))
            return replace(state, bad=last.bad, first=last.first, rows=last.read - last.bad)
        state.read, state.bad, state.first = last.read, last.bad, last.first
        state.said = [line.replace(str(path), HERE) for line in (*reader.said, *reader.told(state.rows, state.bad))]
        state.met = patch.met
        writer.finish(asdict(state))
    return state


def _chunks(reader: Reader, before: Chunk, task: str) -> Iterator[Chunk]:
    """The rows of a file, some at once, behind those that were read before."""
    chunk, characters = replace(before, rows=[]), 0
    for line, row, _ in reader:
        chunk.read += 1
        if isinstance(row, BadRow):
            chunk.bad += 1
            if len(chunk.first) < SHOWN:
                chunk.first = [*chunk.first, (line, row.reason)]
            continue
        if task == "sft":
            refuse_text(row, HERE, reader.path)
        chunk.rows.append(row)
        characters += len(row.text if isinstance(row, Text) else text_of(row))
        if len(chunk.rows) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = replace(chunk, rows=[]), 0
    yield chunk


def _say_begin(path: Path, state: State, folder: Path) -> None:
    if state.read:
        say("{path}: going on behind row {rows}, as kept in {folder}", path=path, rows=state.read, folder=folder)
    else:
        say("{path}: rows to tokens, once; they are kept in {folder}", path=path, folder=folder)
