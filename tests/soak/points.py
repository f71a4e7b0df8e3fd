"""Places where a run can be hit: before and after every flush, rename, removal and folder, and in every file that is
half written.

counted(work)                                               # ["before mkdir", "after mkdir", "in save_file", …]
with points(lambda number, where, half: die(half, draw) if number == 17 else None):
    work()
"""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from weitiao.runs import METRICS, Run
from weitiao.train import checkpoint

Half = tuple[Path, int]  # a file that is being written, and the byte where that began
Hit = Callable[[int, str, Half | None], None]
CALLS = ("fsync", "replace", "mkdir", "unlink", "rmdir", "chmod")


@contextmanager
def points(hit: Hit) -> Iterator[None]:
    """Inside the block ``hit(number, where, half)`` is called before and after every flush, rename, removal and folder,
    and in every file that is written: tensors, JSON, text, a line of the metrics."""
    count = iter(range(1 << 30))
    before = {name: getattr(os, name) for name in CALLS}
    saved, logged = checkpoint.save_file, Run.log

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            hit(next(count), f"before {name}", None)
            found = before[name](*args, **options)
            hit(next(count), f"after {name}", None)
            return found

        return call

    def save(tensors: Any, path: Any, *rest: Any, **options: Any) -> None:
        saved(tensors, path, *rest, **options)
        hit(next(count), "in save_file", (Path(path), 0))

    def text(self: Path, data: Any, *rest: Any, **options: Any) -> int:
        written = texts[type(data)](self, data, *rest, **options)
        hit(next(count), "in write", (self, 0))
        return written

    def log(self: Run, record: Any) -> None:
        file = self.path / METRICS
        start = file.stat().st_size if file.exists() else 0
        logged(self, record)
        hit(next(count), "in log", (file, start))

    texts = {str: Path.write_text, bytes: Path.write_bytes}
    for name in CALLS:
        setattr(os, name, wrapped(name))
    checkpoint.save_file, Run.log = save, log
    Path.write_text = Path.write_bytes = text  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(os, name, function)
        checkpoint.save_file, Run.log = saved, logged
        Path.write_text, Path.write_bytes = texts[str], texts[bytes]  # type: ignore[method-assign]


def counted(work: Callable[[], Any]) -> list[str]:
    """The points that ``work`` passes."""
    found: list[str] = []
    with points(lambda number, where, half: found.append(where)):
        work()
    return found


def cut(half: Half | None, draw: random.Random) -> None:
    """Leave so much of a file as if it had been half written."""
    if half:
        file, start = half
        os.truncate(file, draw.randint(start, file.stat().st_size))


def die(half: Half | None, draw: random.Random) -> None:
    """kill -9 of this process."""
    cut(half, draw)
    os.kill(os.getpid(), signal.SIGKILL)


def full(half: Half | None, draw: random.Random) -> None:
    """Fail as a full disk does, with a file cut somewhere."""
    cut(half, draw)
    if half and half[0].suffix == ".safetensors":
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
