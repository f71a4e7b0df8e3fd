"""One bit flipped, a file removed or cut in copies of a run: noticed before a step, and the one before is used."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.soak.harness import alike, done, references, soak, twins
from tests.soak.specs import SPECS, go
from weitiao.train import checkpoint

KINDS = ("bit", "bit", "bit", "removed", "cut")
RESUMED = 10  # one trial in so many is resumed to its end


def prepare(folder: Path, specs: list[dict[str, Any]] = SPECS) -> dict[str, Any]:
    """Finished runs with all their checkpoints."""
    specs = [{**spec, "options": {**spec["options"], "keep": 9}} for spec in specs]
    specs, found = references(folder, specs)
    return {"references": found, "folder": folder, "specs": specs}


def trial(n: int, draw: random.Random, folder: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    """Damage the newest checkpoint of a copy."""
    kind = KINDS[n % len(KINDS)]
    number = draw.randrange(len(prepared["specs"]))
    run = folder / "run"
    shutil.copytree(twins(prepared["folder"], number)[1] / "run", run)
    *_, before, newest = checkpoint.listed(run / "checkpoints")
    files = sorted(newest.iterdir())
    sizes = [file.stat().st_size for file in files]
    file = draw.choices(files, sizes)[0] if kind == "bit" and draw.random() < 0.5 else draw.choice(files)
    data = bytearray(file.read_bytes())
    if kind == "removed":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: draw.randrange(len(data))])
    else:
        place = draw.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
    path, skipped = checkpoint.newest(run / "checkpoints")
    ok = path == before and len(skipped) == 1 and str(newest) in skipped[0]
    found = {"ok": ok, "kind": kind, "spec": number, "file": file.name}
    if draw.randrange(RESUMED) == 0:
        again = done(lambda: go(prepared["specs"][number], run, resume=True), folder)
        found |= {"ok": ok and alike(again, prepared["references"][number]), "resumed": True}
    return found


if __name__ == "__main__":
    sys.exit(bool(soak("rot", trial, prepare, count=2000)))
