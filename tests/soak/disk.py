"""A disk that fills up within a save, at random offsets: the checkpoint before stays whole, the bytes are named, no
part of the save is left, and once there is room the run goes on to the same bits.

One trial in two hits a write, flush or rename with ENOSPC; the other trains on a small file system of its own (a tmpfs,
if this user may mount one) that another file fills, without the program's own look at the free space beforehand.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

from tests.soak.harness import alike, done, ended, launch, references, soak, whole
from tests.soak.points import counted, full, points
from tests.soak.specs import SPECS, go
from weitiao.runs import Run
from weitiao.train import checkpoint

BLIND = namedtuple("BLIND", "total used free")(1 << 50, 0, 1 << 50)
SMALL_BYTES = 16 << 20
SAVES = 3  # the disk fills up after one to so many


def mounted(folder: Path) -> bool:
    """Whether ``folder`` is a small tmpfs now."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    library = ctypes.CDLL(None, use_errno=True)
    return library.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={SMALL_BYTES}".encode()) == 0


def prepare(folder: Path, specs: list[dict[str, Any]] = SPECS) -> dict[str, Any]:
    """Uninterrupted results and the points where a disk can be full."""
    specs, found = references(folder, specs)
    prepared: dict[str, Any] = {"references": found, "points": [], "specs": specs}
    for number, spec in enumerate(specs):
        own = folder / f"points-{number}"
        passes = done(lambda spec=spec, own=own: counted(lambda: go(spec, own / "run")), own)
        prepared["points"].append([at for at, where in enumerate(passes) if writes(where)])
    return prepared


def trial(n: int, draw: random.Random, folder: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    """Fill the disk once, make room, go on, compare."""
    number = draw.randrange(len(prepared["specs"]))
    spec, at = prepared["specs"][number], folder / "disk"
    at.mkdir()
    real = n % 2 == 1 and mounted(at)
    run, ballast = at / "run", at / "another file"
    try:
        if real:
            pid = launch(lambda: filled(spec, run, ballast, draw), folder)
        else:
            hit = draw.choice(prepared["points"][number])
            pid = launch(lambda: struck(spec, run, hit, draw), folder)
        code, kind = ended(pid), "tmpfs" if real else "ENOSPC"
        ballast.unlink(missing_ok=True)
        said = (folder / "errors").read_text()
        good, there = whole(run), checkpoint.listed(Run(run).checkpoints)
        left = [path.name for path in run.rglob("*") if path.name.endswith(".tmp")]
        named = code != 0 and "bytes needed" in said and "bytes free" in said
        same = alike(done(lambda: go(spec, run, resume=True), folder), prepared["references"][number])
    finally:
        if real:
            ctypes.CDLL(None).umount2(bytes(at), 2)  # 2: MNT_DETACH
    if code == 0:  # the room was enough after all
        shutil.rmtree(at)
        return trial(n, draw, folder, prepared)
    ok = named and good == there and not left and same
    found = {"ok": ok, "kind": kind, "spec": number, "code": code, "named": named, "whole": len(good), "same": same}
    return found if ok else found | {"said": said[-300:], "left": left}


def writes(where: str) -> bool:
    """Whether a point is one where a disk can be full: not a removal, nor a line that is written already."""
    return not any(word in where for word in ("unlink", "rmdir", "log"))


def struck(spec: dict[str, Any], run: Path, hit: int, draw: random.Random) -> dict[str, Any]:
    """A run whose disk is full at the point ``hit`` and from there on, until the run has ended."""
    with points(lambda at, where, half: full(half, draw) if at >= hit and writes(where) else None):
        return go(spec, run)


def filled(spec: dict[str, Any], run: Path, ballast: Path, draw: random.Random) -> dict[str, Any]:
    """A run on whose disk another file leaves so much room that the next save ends somewhere in its middle."""
    after, share = draw.randint(1, SAVES), draw.random()

    def tell(record: dict[str, Any], total: int) -> None:
        saved = checkpoint.listed(run / "checkpoints")
        if len(saved) >= min(after, spec["options"].get("keep", 2)) and not ballast.exists():
            size = sum(file.stat().st_size for file in saved[-1].iterdir())
            state = os.statvfs(run)
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail * state.f_frsize - int(share * size)))

    shutil.disk_usage = lambda path: BLIND  # type: ignore[assignment]
    return go(spec, run, progress=tell)


if __name__ == "__main__":
    sys.exit(bool(soak("disk", trial, prepare, count=200)))
