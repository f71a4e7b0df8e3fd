"""The directory of a zip archive as torch writes it, checked against the file before anything in it is believed.

    entries = directory(path)                       # name -> Entry(start, bytes)

torch.save writes an archive whose entries are stored as they are, one after another from the first byte, none encrypted
(APPNOTE.TXT 6.3.10 describes the format). Whatever else a directory says is refused: compressed entries (a bomb),
entries that overlap, lie outside, are there twice or under a name that leads elsewhere, a second archive before or
behind, and local headers that tell another story than the directory. Nothing but this module's own reading is used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

END, END64, LOCATOR, CENTRAL, LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
END_BYTES, END64_BYTES, LOCATOR_BYTES, CENTRAL_BYTES, LOCAL_BYTES = 22, 56, 20, 46, 30
ENTRIES = 500_000  # tensors of the largest published checkpoint in one file: some 50,000
NAME_BYTES = 512
VALUE_CHARACTERS = 120  # of what a file says, in a message
WIDE, WIDE16 = 0xFFFFFFFF, 0xFFFF  # "look in the zip64 field"
DESCRIPTOR, ENCRYPTED = 8, 0x2041


class Refused(ValueError):
    """A file that is not what it says: the reason in English, and the values of its slots."""

    def __init__(self, english: str, **values: object):
        super().__init__(english)
        self.english = english
        self.values = {name: str(value)[:VALUE_CHARACTERS] for name, value in values.items()}

    def said(self) -> str:
        """The reason in the person's language."""
        from weitiao.errors import t

        return t(self.english, **self.values)


@dataclass(frozen=True)
class Entry:
    """Where an entry's bytes lie in the file."""

    start: int
    bytes: int


def directory(path: Path) -> dict[str, Entry]:
    """The entries of an archive by name, without the folder that torch puts all of them into. Refused says why not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        count, length, offset = _end(file, size)
        if count > ENTRIES or count * CENTRAL_BYTES > length:
            raise Refused("its directory of {length} bytes is said to list {count} entries", length=length, count=count)
        if file.read(0) or offset + length > size:
            raise Refused("its directory lies outside of the file")
        file.seek(offset)
        listed = _listed(file.read(length), count)
        entries = {name: _local(file, name, *place) for name, place in listed.items()}
        _check_places(entries, listed, offset)
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1 or any("/" not in name for name in entries):
        raise Refused("its entries do not lie in one folder, as torch writes them")
    return {name.partition("/")[2]: entry for name, entry in entries.items()}


def _end(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Count, bytes and offset of the directory, from the record that ends the file."""
    if size < END_BYTES:
        raise Refused("cut short")
    file.seek(size - END_BYTES)
    record = file.read(END_BYTES)
    if record[:4] != END:
        raise Refused("cut short, or something follows the archive")
    disk, disk2, here, count, length, offset, comment = struct.unpack("<4x4H2LH", record)
    if disk or disk2 or here != count or comment:
        raise Refused("it has a comment or lies on several disks")
    end = size - END_BYTES
    if WIDE in (length, offset) or count == WIDE16 or _has_locator(file, end):
        count, length, offset, end = _end64(file, end)
    if offset + length != end:
        raise Refused("its directory does not end where the archive does")
    return count, length, offset


def _has_locator(file: BinaryIO, end: int) -> bool:
    file.seek(max(end - LOCATOR_BYTES, 0))
    return file.read(4) == LOCATOR


def _end64(file: BinaryIO, end: int) -> tuple[int, int, int, int]:
    """The same of an archive with 64-bit sizes, and where its own record begins."""
    place = end - LOCATOR_BYTES - END64_BYTES
    file.seek(max(place, 0))
    record, locator = file.read(END64_BYTES), file.read(LOCATOR_BYTES)
    if place < 0 or record[:4] != END64 or locator[:4] != LOCATOR:
        raise Refused("its 64-bit record is missing")
    if struct.unpack("<4xLQL", locator) != (0, place, 1):
        raise Refused("its 64-bit record is said to be elsewhere")
    _, disk, disk2, here, count, length, offset = struct.unpack("<4xQ4x2L4Q", record)
    if disk or disk2 or here != count:
        raise Refused("it lies on several disks")
    return count, length, offset, place


def _listed(data: bytes, count: int) -> dict[str, tuple[int, int]]:
    """Name -> (offset of the local header, bytes) of every entry of the directory."""
    found: dict[str, tuple[int, int]] = {}
    place = 0
    for _ in range(count):
        head = data[place : place + CENTRAL_BYTES]
        if len(head) < CENTRAL_BYTES or head[:4] != CENTRAL:
            raise Refused("its directory is broken")
        flags, method, _, packed, size, name_bytes, extra_bytes, comment_bytes, disk, offset = struct.unpack(
            "<8x2H4xL2L3HH6xL", head
        )
        name_at = place + CENTRAL_BYTES
        name = _name(data[name_at : name_at + name_bytes])
        extra = data[name_at + name_bytes : name_at + name_bytes + extra_bytes]
        packed, size, offset = _wide(extra, size, packed, offset)
        if method or packed != size:
            raise Refused(
                "its entry {name} is compressed, which torch never does ({packed} bytes for {size})",
                name=name,
                packed=packed,
                size=size,
            )
        if flags & ENCRYPTED or disk:
            raise Refused("its entry {name} is encrypted or lies elsewhere", name=name)
        if name in found:
            raise Refused("its entry {name} is there twice", name=name)
        found[name] = offset, size
        place = name_at + name_bytes + extra_bytes + comment_bytes
    if place != len(data):
        raise Refused("its directory is longer than its entries")
    return found


def _name(raw: bytes) -> str:
    """An entry's name; Refused for one that leads out of the archive or is no plain text."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused("the name of an entry is no text") from None
    parts = name.split("/")
    plain = name.isprintable() and 0 < len(raw) <= NAME_BYTES and "\\" not in name and ":" not in name
    if not plain or any(part in ("", ".", "..") for part in parts):
        raise Refused("the name of an entry leads elsewhere: {name}", name=repr(name[:80]))
    return name


def _wide(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """(packed, size, offset) with those that did not fit into 32 bits from the extra field."""
    place, wide = 0, b""
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        wide = extra[place + 4 : place + 4 + length] if kind == 1 else wide
        place += 4 + length
    numbers = [value for (value,) in struct.iter_unpack("<Q", wide[: len(wide) // 8 * 8])]
    values = []
    for value in (size, packed, offset):
        if value == WIDE and not numbers:
            raise Refused("a 64-bit size is missing")
        values.append(numbers.pop(0) if value == WIDE else value)
    return values[1], values[0], values[2]


def _local(file: BinaryIO, name: str, offset: int, size: int) -> Entry:
    """Where the bytes of an entry begin, by the header before them, which must agree with the directory."""
    file.seek(offset)
    head = file.read(LOCAL_BYTES)
    if len(head) < LOCAL_BYTES or head[:4] != LOCAL:
        raise Refused("there is no entry {name} where the directory has it", name=name)
    flags, method, packed, plain, name_bytes, extra_bytes = struct.unpack("<6x2H8x2L2H", head)
    if file.read(name_bytes) != name.encode() or method or flags & ENCRYPTED:
        raise Refused("the entry {name} tells another story than the directory", name=name)
    told = {packed, plain} - {WIDE} - ({0} if flags & DESCRIPTOR else set())
    if told - {size}:
        raise Refused("the entry {name} has another size than the directory says", name=name)
    return Entry(offset + LOCAL_BYTES + name_bytes + extra_bytes, size)


def _check_places(entries: dict[str, Entry], listed: dict[str, tuple[int, int]], end: int) -> None:
    """Entries must follow each other from the file's first byte, up to the directory at ``end``."""
    free = 0
    for name in sorted(listed, key=lambda name: listed[name]):
        if listed[name][0] < free:
            raise Refused("the entry {name} overlaps another", name=name)
        if not free and listed[name][0]:
            raise Refused("something stands before the archive")
        free = entries[name].start + entries[name].bytes
        if free > end:
            raise Refused("the entry {name} lies outside of the file", name=name)
