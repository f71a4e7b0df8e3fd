"""One bit flipped, a file removed or cut in copies of a run: noticed before a step, and the one before is used."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.soak.harness import SPECS, ended, go, launch, references, result, soak
from weitiao.train import checkpoint

KINDS = ("bit", "bit", "bit", "removed", "cut")
RESUMED = 50  # one trial in so many is resumed to its end


def prepare(folder: Path, specs: list[dict[str, Any]] = SPECS) -> dict[str, Any]:
    """Finished runs with all their checkpoints."""
    specs = [{**spec, "options": {**spec["options"], "keep": 9}} for spec in specs]
    return {"references": references(folder, specs), "folder": folder, "specs": specs}


def trial(seed: int, folder: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    """Damage the newest checkpoint of a copy."""
    draw, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    number = draw.randrange(len(prepared["specs"]))
    run = folder / "run"
    shutil.copytree(prepared["folder"] / f"reference-{number}b" / "run", run)
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
    if seed % RESUMED == 0:
        assert ended(launch(lambda: go(prepared["specs"][number], run, resume=True), folder)) == 0
        wanted, again = prepared["references"][number], result(folder)
        found["ok"] = ok and all(again[key] == wanted[key] for key in ("losses", "weights"))
    return found


if __name__ == "__main__":
    sys.exit(bool(soak("rot", trial, prepare, count=2000)))
