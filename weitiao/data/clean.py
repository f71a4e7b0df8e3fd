"""Cleaning: rows that would teach the wrong thing are taken out, and a file says why for each of them.

    weitiao data clean rows.jsonl --against test.jsonl --encodings repair

Writes ``rows.clean.jsonl`` (the rows as they are, or repaired) and ``rows.rejects.jsonl``: for every row taken out
``{"where", "kinds", "why", "row"}``. The file itself stays.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import Field

from weitiao.config import Options, build
from weitiao.data.encodings import CONTROLS, broken
from weitiao.data.near import THRESHOLD, index, near
from weitiao.data.patch import Patch
from weitiao.data.rows import Chat, Labelled, Row, Text, text_of
from weitiao.data.sources import BadRow, DataOptions, Source, arguments, read_all, scan
from weitiao.data.split import content_of
from weitiao.errors import InputError, t
from weitiao.runs import write_atomic


class CleanOptions(Options):
    """What is wrong with a row, and what may be repaired instead."""

    controls: Literal["reject", "remove", "keep"] = Field(
        default="reject", description="control characters, byte order marks and zero-width spaces in a row"
    )
    encodings: Literal["reject", "repair", "keep"] = Field(
        default="reject", description="text that was decoded wrongly (ä½\xa0å¥½, 浣犲ソ, 锟斤拷) or has lost characters"
    )
    min_characters: int = Field(default=2, ge=0, description="characters of a row at least")
    max_characters: int = Field(default=100_000, ge=1, description="characters of a row at most")
    min_answer: int = Field(default=1, ge=1, description="characters of an answer at least")
    max_answer: int = Field(default=20_000, ge=1, description="characters of an answer at most")
    duplicates: Literal["reject", "keep"] = Field(
        default="reject", description="rows that say exactly what an earlier one says"
    )
    near: float = Field(
        default=THRESHOLD, ge=0, le=1, description="how alike an earlier row makes a row a near duplicate; 0 keeps them"
    )
    seed: int = Field(default=0, ge=0, description="seed of the search for near duplicates")


@dataclass(frozen=True)
class Reject:
    """A row that was taken out: where it stands, the ``kinds`` of what is wrong, each in words, and what it says."""

    where: str
    kinds: tuple[str, ...]
    why: tuple[str, ...]
    row: Any

    def to_dict(self) -> dict[str, Any]:
        """The reject as a line of the file."""
        return {"where": self.where, "kinds": self.kinds, "why": "; ".join(self.why), "row": self.row}


@dataclass(frozen=True)
class Kept:
    """A row that stays, where it stands, and its record."""

    where: str
    row: Row
    record: Any


def clean(
    sources: Sequence[Source], options: CleanOptions, against: Sequence[Source] = ()
) -> tuple[list[Kept], list[Reject]]:
    """The rows of ``sources`` (which hold their records) that have nothing wrong, and the others; what is, or almost
    is, in ``against`` is taken out."""
    kept: list[Kept] = []
    rejects: list[Reject] = []
    others = {content_of(row): row.id for source in against for row in source.rows}
    seen: dict[str, str] = {}
    for source in sources:
        rejects += (Reject(bad.where, (_kind(bad),), (bad.reason,), bad.record) for bad in source.bad)
        for line, row, record in zip(source.lines, source.rows, source.records, strict=True):
            where, content = f"{source.path}:{line}", content_of(row)
            wrong = list(problems(row, options))
            if content in others:
                wrong.append(("leak", t("the same as {row}", row=others[content])))
            if (before := seen.setdefault(content, where)) != where and options.duplicates == "reject":
                wrong.append(("duplicate", t("the same as {row}", row=before)))
            if wrong:
                rejects.append(Reject(where, tuple(kind for kind, _ in wrong), tuple(why for _, why in wrong), record))
            else:
                kept.append(Kept(where, row, record))
    if options.near:
        alike = _alike(kept, options, [row for source in against for row in source.rows])
        rejects += (Reject(kept[n].where, (kind,), (why,), kept[n].record) for n, (kind, why) in alike.items())
        kept = [one for n, one in enumerate(kept) if n not in alike]
    return kept, rejects


def _alike(kept: Sequence[Kept], options: CleanOptions, others: Sequence[Row]) -> dict[int, tuple[str, str]]:
    """The places of rows that are much like one of ``others`` or an earlier one: kind and sentence."""
    own = index([one.row for one in kept], options.seed)
    message = "much like {row} ({similarity:.2f})"
    found = {
        one.row: ("near_duplicate", t(message, row=kept[one.like].where, similarity=one.similarity))
        for one in near(own, threshold=options.near)
        if options.duplicates == "reject" or content_of(kept[one.row].row) != content_of(kept[one.like].row)
    }
    leaked = near(own, index(others, options.seed), options.near) if others else []
    return found | {
        one.row: ("near_leak", t(message, row=others[one.like].id, similarity=one.similarity)) for one in leaked
    }


def problems(row: Row, options: CleanOptions) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of everything that is wrong with a row by itself."""
    texts = list(_texts(row))
    wrong = [(text, was) for text in texts if (was := broken(text)) is not None]
    sound = [text for text in texts if broken(text) is None]  # in the others control characters are parts of letters
    if options.controls != "keep" and (char := next((c for text in sound for c in CONTROLS.findall(text)), None)):
        yield "control_characters", t("has the control character U+{code:04X}", code=ord(char))
    if options.encodings != "keep":
        if lost := next((text for text, was in wrong if not was), None):
            yield "encoding", t("characters are lost: {text}", text=_short(lost))
        elif wrong:
            yield "encoding", t("decoded wrongly: {text} was {was}", text=_short(wrong[0][0]), was=_short(wrong[0][1]))
    size = len(text_of(row))
    if not options.min_characters <= size <= options.max_characters:
        bounds = {"low": options.min_characters, "high": options.max_characters}
        kind = "too_short" if size < options.min_characters else "too_long"
        yield kind, t("{size} characters, not {low} to {high}", size=size, **bounds)
    for message in row.messages if isinstance(row, Chat) else ():
        size = len(message.content.strip())
        if message.role != "assistant" or message.calls or options.min_answer <= size <= options.max_answer:
            continue
        kind = "answer_too_short" if size < options.min_answer else "answer_too_long"
        bounds = {"low": options.min_answer, "high": options.max_answer}
        yield kind, t("an answer of {size} characters, not {low} to {high}", size=size, **bounds)


def _texts(row: Row) -> Iterator[str]:
    """Every text of a row."""
    if isinstance(row, Text | Labelled):
        yield row.text
    for message in getattr(row, "messages", ()):
        yield message.content
        yield from (
            json.dumps(value, ensure_ascii=False) for call in message.calls for value in call.arguments.values()
        )


def _short(text: str) -> str:
    return text if len(text) <= 30 else text[:29] + "…"


def _kind(bad: BadRow) -> str:
    if not isinstance(bad.record, Mapping):
        return "unreadable"
    return "empty_answer" if t("empty answer") in bad.reason else "invalid"


def mended(value: Any, options: CleanOptions) -> Any:
    """A record with what may be repaired put right in every text of it."""
    if isinstance(value, Mapping):
        return {key: mended(one, options) for key, one in value.items()}
    if isinstance(value, list):
        return [mended(one, options) for one in value]
    if not isinstance(value, str):
        return value
    was = broken(value)
    if was and options.encodings == "repair":
        value, was = was, None
    return CONTROLS.sub("", value) if was is None and options.controls == "remove" else value


def read(files: Sequence[str], options: DataOptions, how: CleanOptions) -> tuple[list[Source], list[str]]:
    """The sources of ``files`` with what can be repaired put right, bad rows among them, and what should be said."""
    patch = Patch.read(options.patch)
    sources, wrong = [], []
    for name in files:
        try:
            sources.append(scan(Path(name), options, patch=patch, keep=True, mend=lambda record: mended(record, how)))
        except InputError as error:
            wrong += error.problems
    if wrong or patch.problems:
        raise InputError([*wrong, *patch.problems])
    return sources, [line for source in sources for line in source.said] + patch.said


# ---- the verb --------------------------------------------------------------------------------------------------------


def verb(
    words: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="files of rows, and data options such as patch=FILE")
    ],
    output: Annotated[Path | None, typer.Option(help="the rows that stay; FILE.clean.jsonl")] = None,
    rejects: Annotated[Path | None, typer.Option(help="the others, and why; FILE.rejects.jsonl")] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="take out what is, or almost is, in this file; repeatable")
    ] = None,
    controls: Annotated[str, typer.Option(help="control characters: reject, remove or keep")] = "reject",
    encodings: Annotated[str, typer.Option(help="text decoded wrongly: reject, repair or keep")] = "reject",
    min_characters: Annotated[int, typer.Option(help="characters of a row at least")] = 2,
    max_characters: Annotated[int, typer.Option(help="characters of a row at most")] = 100_000,
    min_answer: Annotated[int, typer.Option(help="characters of an answer at least")] = 1,
    max_answer: Annotated[int, typer.Option(help="characters of an answer at most")] = 20_000,
    duplicates: Annotated[str, typer.Option(help="rows that say what an earlier one says: reject or keep")] = "reject",
    threshold: Annotated[float, typer.Option("--near", help="how alike near duplicates are; 0 keeps them")] = THRESHOLD,
    seed: Annotated[int, typer.Option(help="seed of the search for near duplicates")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output and the rejects")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Write the rows of FILEs that have nothing wrong to one file, and the others, with the reasons, to another."""
    files, options = arguments(words)
    if not files:
        raise InputError(t("name at least one file of rows"))
    values = {"controls": controls, "encodings": encodings, "duplicates": duplicates, "near": threshold, "seed": seed}
    values |= {"min_characters": min_characters, "max_characters": max_characters}
    how = build(CleanOptions, values | {"min_answer": min_answer, "max_answer": max_answer})
    first = Path(files[0])
    output = output or first.with_name(f"{first.stem}.clean.jsonl")
    rejects = rejects or first.with_name(f"{first.stem}.rejects.jsonl")
    if (held := [str(path) for path in (output, rejects) if path.exists()]) and not overwrite:
        raise InputError(t("{path}: is there already; --overwrite replaces it", path=", ".join(held)))
    others = read_all(against or [], options.model_copy(update={"patch": None, "skip_bad": True}))
    sources, said = read(files, options, how)
    for line in [*said, *(line for source in others for line in source.said)]:
        print(line, file=sys.stderr)
    kept, rejected = clean(sources, how, others)
    _write(output, [one.record for one in kept])
    _write(rejects, [one.to_dict() for one in rejected])
    counts = dict(Counter(kind for one in rejected for kind in one.kinds).most_common())
    if as_json:
        report = {"kept": len(kept), "rejected": len(rejected), "kinds": counts}
        print(json.dumps(report | {"output": str(output), "rejects": str(rejects)}, ensure_ascii=False))
        return
    for kind, count in counts.items():
        print(f"{kind}\t{count}")
    print(f"{output}\t{len(kept)}")
    print(f"{rejects}\t{len(rejected)}")


def _write(path: Path, records: Sequence[Any]) -> None:
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records))
