"""Sound files with a few bytes changed, through the parsers of this project: read or refused, and nothing else.

    python -m tests.hostile.fuzz 200000             # so many cases; each follows from SEED and its number

Whatever error is not one of ours counts as a fault, so does a second of the processor; the process has a gigabyte of
memory beyond what it begins with.
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.hostile.case import OPENED
from tests.hostile.folders import folder_of
from tests.hostile.valid import valid
from weitiao.errors import WeitiaoError
from weitiao.weights import bounded, gguf, header, pickled, sentencepiece, tokenizer
from weitiao.weights.archive import Refused

SEED, SECONDS, ROOM_BYTES = 1, 1.0, 1 << 30
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
EXTREMES = (0, 1, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)


class Sound(NamedTuple):
    """A file as a program writes it, and what reads it."""

    name: str
    content: bytes
    read: Callable[[Path], object]


def sound() -> list[Sound]:
    """The files that are changed: some of every form."""
    found = []
    for case in valid(SEED):
        suffix, content = Path(case.opened).suffix, case.files.get(case.opened)
        if case.wanted == OPENED and isinstance(content, bytes) and len(content) < 8192:
            read = {".safetensors": header.read_whole, ".gguf": gguf.read_header}.get(suffix)
            found.append(Sound(f"x{suffix}", content, read or pickled.describe))
    base = folder_of()
    pieces = b"".join(
        b"\n" + _part(b"\n" + _part(f"▁p{n}".encode()) + b"\x15" + struct.pack("<f", -n)) for n in range(40)
    )
    found.append(Sound("tokenizer.model", pieces + b"\x12\x02\x18\x02\x1a\x02\x18\x01", _pieces))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        content = base[name]
        assert isinstance(content, bytes)
        read = bounded.json_object if name == "config.json" else lambda path: tokenizer.check(path.parent)
        found += 4 * [Sound(name, content, read)]
    return found


def _part(content: bytes) -> bytes:
    """Bytes of a protobuf with their length in front."""
    return bytes([len(content)]) + content


def _pieces(path: Path) -> object:
    return sentencepiece.build(sentencepiece.read(path))


def changed(content: bytes, draw: random.Random) -> bytes:
    """The file with one to six changes: bits, numbers, cuts, parts taken out, doubled or moved."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at, size = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 4, 8, 8, 32, 200))
        how = draw.randrange(7)
        if how == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1 and at < len(data):
            data[at] = draw.choice(b'\x00\x01\x7f\x80\xff"{}[],:.0')
        elif how == 2:
            form = draw.choice("BHIQ")
            number = draw.choice(EXTREMES) & ((1 << 8 * struct.calcsize(form)) - 1)
            data[at : at + struct.calcsize(form)] = struct.pack(draw.choice("<>") + form, number)
        elif how == 3:
            del data[at : at + size]
        elif how == 4:
            data[at:at] = data[at : at + size] * draw.choice((1, 1, 2, 30))
        elif how == 5:
            start = draw.randrange(len(data) + 1)
            data[at : at + size] = data[start : start + size]
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data)


def faults(numbers: range, folder: Path) -> Iterator[str]:
    """What went wrong with each case of ``numbers`` that is not as it must be."""
    files = sound()
    for number in numbers:
        draw = random.Random(f"fuzz {SEED} {number}")
        one = draw.choice(files)
        path = folder / one.name
        path.write_bytes(changed(one.content, draw))
        started = time.process_time()
        try:
            one.read(path)
        except (WeitiaoError, Refused):
            pass
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            yield f"{number} {one.name}: {type(error).__name__}: {str(error)[:200]}"
        if (seconds := time.process_time() - started) > SECONDS:
            yield f"{number} {one.name}: {seconds:.2f} s"
        path.unlink()


def main(count: int) -> int:
    """Try ``count`` cases; 1 if anything was wrong."""
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM_BYTES, held + ROOM_BYTES))
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for fault in faults(range(count), Path(folder)):
            found[fault.partition(" ")[2]] += 1
            print(fault, flush=True)
    print(f"{count} cases of seed {SEED}: {sum(found.values())} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(int((sys.argv[1:] or ["200000"])[0])))
