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

from tests.soak.harness import SPECS, counted, ended, full, go, launch, points, references, result, soak, whole
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
    """Uninterrupted results and the number of points of every run."""
    prepared: dict[str, Any] = {"references": references(folder, specs), "points": [], "specs": specs}
    for number, spec in enumerate(specs):
        own = folder / f"points-{number}"
        own.mkdir()
        assert ended(launch(lambda spec=spec, own=own: {"points": counted(lambda: go(spec, own / "run"))}, own)) == 0
        prepared["points"].append(result(own)["points"])
    return prepared


def trial(seed: int, folder: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    """Fill the disk once, make room, go on, compare."""
    draw = random.Random(seed)
    number = draw.randrange(len(prepared["specs"]))
    spec, wanted, at = prepared["specs"][number], prepared["references"][number], folder / "disk"
    at.mkdir()
    real = seed % 2 == 1 and mounted(at)
    run, ballast = at / "run", at / "another file"
    try:
        if real:
            pid = launch(lambda: filled(spec, run, ballast, draw), folder)
        else:
            hit = draw.choice([n for n, where in enumerate(prepared["points"][number]) if writes(where)])
            pid = launch(lambda: struck(spec, run, hit, draw), folder)
        code, kind = ended(pid), "tmpfs" if real else "ENOSPC"
        ballast.unlink(missing_ok=True)
        said = (folder / "errors").read_text()
        good, there = whole(run), checkpoint.listed(Run(run).checkpoints)
        left = [path.name for path in run.rglob("*") if path.name.endswith(".tmp")]
        named = code == 0 or ("bytes needed" in said and "bytes free" in said)
        assert ended(launch(lambda: go(spec, run, resume=True), folder)) == 0, (folder / "errors").read_text()[-500:]
        same = {key: result(folder)[key] == wanted[key] for key in ("losses", "weights")}
    finally:
        if real:
            ctypes.CDLL(None).umount2(bytes(at), 2)  # 2: MNT_DETACH
    ok = named and good == there and not left and all(same.values())
    why = {} if ok else {"said": said[-300:], "left": left}
    return {"ok": ok, "kind": kind, "spec": number, "code": code, "named": named, "whole": len(good), **same, **why}


def writes(where: str) -> bool:
    """Whether a point is one where a disk can be full: nothing that only removes."""
    return "unlink" not in where and "rmdir" not in where


def struck(spec: dict[str, Any], run: Path, hit: int, draw: random.Random) -> dict[str, Any]:
    """A run whose disk is full at the point ``hit`` and from there on, until the run has ended."""
    with points(lambda at, where, path: full(path, draw) if at >= hit and writes(where) else None):
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
