"""A file that is on its way: its bytes where they belong, and a journal of which of them are there.

    partial = Partial(folder, size, "sha256:…")
    partial.add(0, b"first bytes")
    partial.gap(0, size)                   # what is missing first
    partial.sound()                        # whole, and with the right hash?

Every piece is noted with its checksum. A journal line counts only if the bytes on the disk still match it, so a kill, a
power cut or a bad sector costs the pieces that it touched and no more, and nothing has to be flushed on the way.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from weitiao.runs import disk_error
from weitiao.weights.folders import flush

READ_BYTES = 1 << 20
JOURNAL_LINE = re.compile(rb"(\d{1,15}) (\d{1,10}) ([0-9a-f]{8})\n")
Range = tuple[int, int]  # first byte, and the one behind the last


def hasher(kind: str, size: int) -> Any:
    """A new hash: ``sha256`` of the bytes, or ``sha1`` as git counts a blob of ``size`` bytes."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if kind == "sha1" else hashlib.sha256()


class Partial:
    """A file that is on its way, in a folder of its own: ``data``, and ``journal`` with a line for each piece."""

    def __init__(self, folder: Path, size: int, digest: str):
        self.folder, self.size, self.digest = folder, size, digest
        self.path = folder / "data"
        self.lock, self.hashing = threading.Lock(), threading.Lock()
        self.changed = 0  # counts what was overwritten behind the hash
        self._anew()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self.data = self.path.open("r+b")
            self.have = self._kept(folder / "journal")
            self.journal = (folder / "journal").open("ab", buffering=0)
        except OSError as error:
            raise disk_error(error, self.path, size) from error

    def _kept(self, journal: Path) -> list[Range]:
        """The ranges whose bytes still match their journal lines. A torn last line is closed, so the next is whole."""
        text = journal.read_bytes() if journal.is_file() else b""
        if text and not text.endswith(b"\n"):
            with journal.open("ab") as file:
                file.write(b"\n")
        found = []
        for line in text.splitlines(keepends=True):
            if (match := JOURNAL_LINE.fullmatch(line)) and int(match[1]) + int(match[2]) <= self.size:
                self.data.seek(int(match[1]))
                piece = self.data.read(int(match[2]))
                if len(piece) == int(match[2]) and zlib.crc32(piece) == int(match[3], 16):
                    found.append((int(match[1]), int(match[1]) + len(piece)))
        return joined(found)

    def add(self, start: int, piece: bytes | bytearray) -> int:
        """Write what is missing of a piece; how many bytes were new."""
        new = 0
        try:
            with self.lock:
                for first, last in gaps(self.have, start, start + len(piece)):
                    part = bytes(piece[first - start : last - start])
                    self.data.seek(first)
                    self.data.write(part)
                    self.data.flush()
                    self.journal.write(b"%d %d %08x\n" % (first, len(part), zlib.crc32(part)))
                    new += len(part)
                    self.have = joined([*self.have, (first, last)])
                    self.changed += first < self.hashed
        except OSError as error:
            raise disk_error(error, self.path, self.size) from error
        if self.hashing.acquire(blocking=False):  # one thread hashes, the others go on
            try:
                self._hash()
            finally:
                self.hashing.release()
        return new

    def drop(self, start: int, stop: int) -> None:
        """Forget a range, so that it is fetched again; its bytes stay until others take their place."""
        with self.lock:
            before = ((first, min(last, start)) for first, last in self.have)
            behind = ((max(first, stop), last) for first, last in self.have)
            self.have = joined(span for span in (*before, *behind) if span[0] < span[1])

    def gap(self, start: int, stop: int) -> Range | None:
        """The first missing range between two bytes."""
        with self.lock:
            return next(gaps(self.have, start, stop), None)

    def missing(self) -> list[Range]:
        """Every missing range."""
        with self.lock:
            return list(gaps(self.have, 0, self.size))

    def checksum(self, start: int, stop: int) -> int:
        """Of the bytes on the disk between two places."""
        found = 0
        for chunk in self._read(start, stop):
            found = zlib.crc32(chunk, found)
        return found

    def sound(self) -> bool:
        """Whether the file is whole and has its hash (its size, where none is known)."""
        with self.hashing:
            if self.missing():
                return False
            if self.changed:
                self._anew()
            self._hash()
            return not self.digest or self.hash.hexdigest() == self.digest.partition(":")[2]

    def _anew(self) -> None:
        self.hash, self.hashed, self.changed = hasher(self.digest.partition(":")[0], self.size), 0, 0

    def _hash(self) -> None:
        """Hash on to the first missing byte, from the disk's cache, so that what was written is what is hashed."""
        while True:
            with self.lock:
                end = self.have[0][1] if self.have and self.have[0][0] == 0 else 0
            if end <= self.hashed:
                return
            for chunk in self._read(self.hashed, end):
                self.hash.update(chunk)
            self.hashed = end

    def _read(self, start: int, stop: int) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(READ_BYTES, stop - start))):
                start += len(chunk)
                yield chunk

    def close(self) -> None:
        """Close the files; what is there stays for the next time."""
        self.data.close()
        self.journal.close()

    def finish(self) -> Path:
        """The whole file, on the disk."""
        self.close()
        os.truncate(self.path, self.size)
        flush(self.path)
        return self.path


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order, those that touch made one."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif start < stop:
            found.append((start, stop))
    return found


def gaps(have: Sequence[Range], start: int, stop: int) -> Iterator[Range]:
    """What ``have``, ranges in order, lacks between two bytes."""
    for first, last in have:
        if first >= stop or start >= stop:
            break
        if first > start:
            yield start, first
        start = max(start, last)
    if start < stop:
        yield start, stop
