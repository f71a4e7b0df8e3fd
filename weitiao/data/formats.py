"""File formats: a jsonl, json, csv, tsv, parquet or txt file becomes records, one at a time, each with its line number.

    for line, record in records(Path("rows.jsonl"), "jsonl"): ...

A record that cannot be read comes as :class:`Unreadable` in its place, so that reading goes on and all are reported.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from weitiao.data.broken import explained
from weitiao.data.encodings import is_gbk
from weitiao.errors import InputError, t
from weitiao.runs import command

BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
SNIFFED_BYTES = 4096
UNCLOSED_QUOTE = "unexpected end of data"  # what the csv module says
SEPARATORS = {"csv": ",", "tsv": "\t"}
OTHER_SEPARATORS = (";", "\t", ",", "|")  # what stands between cells where spreadsheets write no comma


@dataclass(frozen=True)
class Unreadable:
    """A line that is no record, and why; ``raw`` is the line where it is known, its bytes that are no text escaped."""

    reason: str
    raw: str = ""


Numbered = Iterator[tuple[int, Any]]


def format_of(path: Path, asked: str = "auto") -> str:
    """One of FORMATS, as ``asked`` or by the file's name; json and jsonl, often mixed up, are told by their start."""
    found = asked if asked in FORMATS else path.suffix.lower().lstrip(".")
    found = "jsonl" if found == "ndjson" else found
    if found not in FORMATS:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise InputError(
            t("{path}: unknown kind of file; known: {known} (data.format names one)", path=path, known=known)
        )
    if found in ("json", "jsonl"):
        with path.open("rb") as file:
            start = file.read(SNIFFED_BYTES).removeprefix(BOM).lstrip()
        return "json" if start.startswith(b"[") else "jsonl"
    return found


def rows_in(path: Path) -> bool:
    """Whether a file is one of rows by its name; of json, which may be anything, by its being an array."""
    kind = path.suffix.lower().lstrip(".")
    return kind in (*FORMATS, "ndjson") and (kind != "json" or format_of(path) == "json")


def records(path: Path, format: str) -> Numbered:
    """(line number from 1, record or Unreadable) of every record of a file; blank lines are passed over."""
    if path.stat().st_size == 0:
        raise InputError(t("{path}: the file is empty", path=path))
    with path.open("rb") as file:
        if file.read(2) in UTF_16:
            raise InputError(t("{path}: is UTF-16; save it as UTF-8", path=path))
        file.seek(0)
        yield from FORMATS[format](path, file)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, raw in enumerate(file, 1):
        yield number, raw.removeprefix(BOM) if number == 1 else raw


def _not_utf8(path: Path, raw: bytes) -> str:
    """What is wrong with bytes that are not UTF-8, and the command that mends it where they are GBK."""
    if is_gbk(raw):
        convert = command("iconv", "-f", "GB18030", "-t", "UTF-8", path)
        new = command(path.with_stem(f"{path.stem}.utf8"))
        return t("GBK, not UTF-8; convert the file: {convert} > {new}", convert=convert, new=new)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = "not UTF-8: byte 0x{value:02x} at column {column}; save the file as UTF-8"
        return t(message, value=raw[error.start], column=error.start + 1)
    return ""


def _text_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str | Unreadable]]:
    """Lines that are not blank, decoded, without their line end."""
    for number, raw in _lines(file):
        try:
            text = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            shown = raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
            yield number, Unreadable(_not_utf8(path, raw), shown)
            continue
        if text and not text.isspace():
            yield number, text


def _txt(path: Path, file: BinaryIO) -> Numbered:
    for number, line in _text_lines(path, file):
        yield number, line if isinstance(line, Unreadable) else {"text": line}


def _jsonl(path: Path, file: BinaryIO) -> Numbered:
    for place, (number, line) in enumerate(_text_lines(path, file)):
        if isinstance(line, str):
            if place == 0 and line.strip() == "{":
                message = (
                    "{path}:{line}: an object goes on over several lines; write each on one line, or all in a list []"
                )
                raise InputError(t(message, path=path, line=number))
            try:
                yield number, _whole(_decoded(line), line)
            except ValueError as error:
                yield number, Unreadable(_not_json(error), line)
            except RecursionError:
                yield number, Unreadable(t("not JSON: nested too deeply"), line)
        else:
            yield number, line


def _no_constant(name: str) -> Any:
    raise ValueError(t("{name} is not JSON", name=name))


def _decoded(line: str) -> Any:
    """What ``DECODER.decode`` has, twice as fast for a line that is an object and nothing else."""
    if line[0] == "{":
        value, end = DECODER.raw_decode(line)
        if end == len(line):
            return value
    return DECODER.decode(line)


DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _not_json(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return t("not JSON: {problem} at column {column}", problem=explained(error), column=error.colno)
    return t("not JSON: {problem}", problem=error)


def _whole(value: Any, source: str) -> Any:
    """``value``; ValueError if an escape of its ``source`` made half a character, which no encoding can write."""
    if "\\" in source and "\\ud" in source.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(t("an escape such as \\ud83d is half a character")) from None
    return value


def _json(path: Path, file: BinaryIO) -> Numbered:
    """The elements of one array, decoded one by one. InputError at a break in it: nothing behind can be trusted."""
    raw = file.read().removeprefix(BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        start = raw.rfind(b"\n", 0, error.start) + 1
        problem = _not_utf8(path, raw[start : raw.find(b"\n", error.start) + 1 or None])
        raise InputError(f"{path}:{line}: {problem}") from None
    del raw
    spaces = re.compile(r"\s*")
    place = spaces.match(text).end() + 1  # type: ignore[union-attr]  # behind the opening bracket
    line, counted = 1, 0

    def skip(place: int) -> int:
        return spaces.match(text, place).end()  # type: ignore[union-attr]

    def broken(place: int, problem: object) -> InputError:
        number = text.count("\n", 0, place) + 1
        return InputError(
            t("{path}:{line}: the JSON array breaks off: {problem}", path=path, line=number, problem=problem)
        )

    place = skip(place)
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = DECODER.raw_decode(text, place)
            value = _whole(value, text[place:end])
        except json.JSONDecodeError as error:
            raise broken(error.pos, explained(error)) from None
        except (ValueError, RecursionError) as error:
            raise broken(place, error) from None
        yield line, value
        place = skip(end)
        if text[place : place + 1] == ",":
            place = skip(place + 1)
        elif text[place : place + 1] != "]":
            raise broken(place, t("expected a comma or ]"))
    if skip(place + 1) != len(text):
        raise broken(place + 1, t("there is more text behind the array"))


def separator(path: Path, format: str) -> str:
    """What stands between the cells of a table: its format's own, or another if only that makes its header several
    names."""
    own = SEPARATORS[format]
    with path.open("rb") as file:
        first = next((raw for _, raw in _lines(file) if raw.strip()), b"")[:SNIFFED_BYTES]
    header = first.decode("utf-8", "surrogateescape")
    candidates = (own, *(other for other in OTHER_SEPARATORS if other != own))
    return next((one for one in candidates if len(next(csv.reader([header], delimiter=one), [])) > 1), own)


def _table(format: str) -> Callable[[Path, BinaryIO], Numbered]:
    def read(path: Path, file: BinaryIO) -> Numbered:
        # A byte that is not UTF-8 becomes a lone surrogate here, so that its record alone is refused and not the file.
        text = (raw.decode("utf-8", "surrogateescape") for _, raw in _lines(file))
        reader = csv.reader(text, delimiter=separator(path, format), strict=True)
        limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            header = _header(path, reader)
            yield from _table_rows(path, reader, header)
        finally:
            csv.field_size_limit(limit)

    return read


def _header(path: Path, reader: Any) -> list[str]:
    try:
        header = [name.strip() for name in next((row for row in reader if row), [])]
    except csv.Error as error:
        raise InputError(f"{path}:1: {t('not a table row: {problem}', problem=error)}") from None
    if not header:
        raise InputError(t("{path}: has no header line with column names", path=path))
    if any(_surrogate(name) for name in header):
        problem = _not_utf8(path, ",".join(header).encode("utf-8", "surrogateescape"))
        raise InputError(t("{path}:1: the header is {problem}", path=path, problem=problem))
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(t("{path}:1: the header names a column twice: {names}", path=path, names=", ".join(twice)))
    return header


def _table_rows(path: Path, reader: Any, header: list[str]) -> Numbered:
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if str(error) == UNCLOSED_QUOTE:
                message = "{path}:{line}: a quote opens here and is never closed: the rest of the file is inside it"
                raise InputError(t(message, path=path, line=line)) from None
            yield line, Unreadable(t("not a table row: {problem}", problem=error))
            continue
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if any(map(_surrogate, row)):
            reason = _not_utf8(path, ",".join(row).encode("utf-8", "surrogateescape"))
            cells = [cell.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for cell in row]
            yield line, Unreadable(reason, json.dumps(cells, ensure_ascii=False))
        elif len(row) != len(header):
            reason = t("{found} cells, the header has {expected}", found=len(row), expected=len(header))
            yield line, Unreadable(reason, json.dumps(row, ensure_ascii=False))
        else:
            yield line, dict(zip(header, row, strict=True))


def _surrogate(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= char <= "\udcff" for char in text)


def _parquet(path: Path, file: BinaryIO) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        for batch in table.iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        message = "{path}: damaged, or not a parquet file (it breaks off behind row {number}): {error}; get it anew"
        raise InputError(t(message, path=path, number=number, error=" ".join(str(error).split()).rstrip("."))) from None


FORMATS: dict[str, Callable[[Path, BinaryIO], Numbered]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _table("csv"),
    "tsv": _table("tsv"),
    "parquet": _parquet,
    "txt": _txt,
}
