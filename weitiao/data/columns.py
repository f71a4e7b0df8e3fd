"""Columns of numbers in files that grow, survive a kill, and are mapped instead of read.

    with Writer(folder, {"ids": "u2", "ends": "i8"}) as writer:     # goes on behind what a killed one had committed
        writer.append(ids=ids, ends=ends)
        writer.commit({"rows": 4096})
        writer.finish({"rows": 8192})
    columns, facts = read(folder, {"ids": "u2", "ends": "i8"})      # None where it is not whole, or damaged

A column is a file of one kind of number. The journal states how long every file is, its crc32 up to there, and what the
caller wants to know again; it is replaced when the files are on the disk, so what is behind that in them is no part of
anything, and is cut off by the next writer. Files found sound are not summed again for as long as their sizes, times
and places on the disk stay.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from weitiao.runs import disk_error, write_atomic

JOURNAL, SOUND = "journal", "sound"
READ_BYTES = 1 << 22


class Writer:
    """Appends to the columns ``kinds`` (name to dtype) of ``folder``. ``facts`` are those of the last commit, {} in a
    new folder and in one whose files are not what the journal says: that is begun again. RunError for a full disk."""

    def __init__(self, folder: Path, kinds: Mapping[str, str]):
        self.folder, self.kinds = folder, {name: np.dtype(kind) for name, kind in kinds.items()}
        folder.mkdir(parents=True, exist_ok=True)
        last = _journal(folder)
        if last and (last["sizes"].keys() != kinds.keys() or not _sound(folder, last)):
            last = None
        self.facts: dict[str, Any] = last["facts"] if last else {}
        self.sizes: dict[str, int] = last["sizes"] if last else dict.fromkeys(kinds, 0)
        self.sums: dict[str, int] = last["sums"] if last else dict.fromkeys(kinds, 0)
        self.files = {name: self._opened(name) for name in kinds}

    def _opened(self, name: str) -> BinaryIO:
        file = _path(self.folder, name).open("ab")
        file.truncate(self.sizes[name])
        return file

    def length(self, name: str) -> int:
        """How many numbers a column has."""
        return self.sizes[name] // self.kinds[name].itemsize

    def append(self, **arrays: np.ndarray) -> None:
        """Numbers behind those of some columns."""
        for name, array in arrays.items():
            content = np.ascontiguousarray(array, dtype=self.kinds[name]).data.cast("B")
            try:
                self.files[name].write(content)
            except OSError as error:
                raise disk_error(error, self.folder, len(content)) from error
            self.sizes[name] += len(content)
            self.sums[name] = zlib.crc32(content, self.sums[name])

    def commit(self, facts: Mapping[str, Any], whole: bool = False) -> None:
        """What was appended so far is there for good, with these facts."""
        state = {"whole": whole, "sizes": self.sizes, "sums": self.sums, "facts": dict(facts)}
        text = json.dumps(state, ensure_ascii=True).encode()
        try:
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self.folder, len(text)) from error
        write_atomic(self.folder / JOURNAL, b"%08x %s" % (zlib.crc32(text), text))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """The last commit: there is no more."""
        self.commit(facts, whole=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            file.close()


def read(folder: Path, kinds: Mapping[str, str]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The mapped columns and the facts of a folder that was finished; None where it was not, or a bit of it differs."""
    last = _journal(folder)
    if not last or not last["whole"] or last["sizes"].keys() != kinds.keys():
        return None
    if (now := _status(folder, last)) is None:
        return None
    if _found_sound(folder) != now:
        if not _sound(folder, last):
            return None
        write_atomic(folder / SOUND, json.dumps(now))
    return {name: _mapped(_path(folder, name), kind) for name, kind in kinds.items()}, last["facts"]


def facts_of(folder: Path) -> dict[str, Any]:
    """The facts of the last commit, whatever became of the columns; {} without any."""
    last = _journal(folder)
    return last["facts"] if last else {}


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _mapped(path: Path, kind: str) -> np.ndarray:
    """A file as an array: a plain one, since slices of a memmap cost more than what is done with them."""
    return np.asarray(np.memmap(path, kind, "r")) if path.stat().st_size else np.empty(0, kind)


def _journal(folder: Path) -> dict[str, Any] | None:
    """What the journal says; None where there is none, or a damaged one."""
    try:
        content = (folder / JOURNAL).read_bytes()
    except OSError:
        return None
    return json.loads(content[9:]) if content[:9] == b"%08x " % zlib.crc32(content[9:]) else None


def _sound(folder: Path, journal: Mapping[str, Any]) -> bool:
    """Whether the files begin as the journal says."""

    def sound(name: str) -> bool:
        try:
            return _sum(_path(folder, name), journal["sizes"][name]) == journal["sums"][name]
        except OSError:
            return False

    with ThreadPoolExecutor(2) as pool:  # crc32 leaves the interpreter's lock
        return all(pool.map(sound, journal["sizes"]))


def _status(folder: Path, journal: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """What changes with a file of the journal, however it is changed, and the sum it should have; None if one is not
    there."""
    try:
        found = {name: _path(folder, name).stat() for name in journal["sizes"]}
    except OSError:
        return None
    return {
        name: [journal["sums"][name], one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino]
        for name, one in found.items()
    }


def _found_sound(folder: Path) -> Any:
    """The status of the files when they were last found sound; None where they were not, or that cannot be read."""
    try:
        return json.loads((folder / SOUND).read_text())
    except (OSError, ValueError):
        return None


def _sum(path: Path, size: int) -> int | None:
    """The crc32 of the first ``size`` bytes; None if there are fewer."""
    found = 0
    with path.open("rb") as file:
        while size:
            content = file.read(min(size, READ_BYTES))
            if not content:
                return None
            found, size = zlib.crc32(content, found), size - len(content)
    return found
