"""Plan against fact on every cell of the grid.

    python bench/plan/grid.py FOLDER [CELLS [SECONDS [--forked]]]
    python bench/plan/grid.py --table FOLDER

A cell is a training run in a fresh process: base from a folder, plan, rehearsal, two steps, checkpoint, result. Its
truth is the highest resident size that the kernel saw of that process (VmHWM). Each result is a line of
FOLDER/cells.jsonl; cells that are there already are not run again. CELLS is a range such as 0:40; after SECONDS no
other cell is begun. With --forked a cell's process begins with the libraries that its parent has imported, which saves
half of the time; what it holds before a weight is there is then less, since of the libraries' files it has only those
pages that it touches itself.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cells import Cell, cells

SECONDS = 600  # after which a cell is given up
MODEL, ROWS = "model", "rows.jsonl"


def measure(cell: Cell, folder: Path, forked: bool) -> dict[str, Any]:
    """Write the cell's base, and run it in a process of its own."""
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix="cell-"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, __file__, "--run", str(cell.number), str(scratch)]
    try:
        apart(lambda: base(cell, scratch))
        if forked:
            apart(lambda: (scratch / "found").write_text(json.dumps(run(cell, scratch))))
            return json.loads((scratch / "found").read_text()) | {"forked": True}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            return {"error": " ".join(done.stderr.split())[-400:]}
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        return {"error": f"{type(error).__name__}"}
    finally:
        shutil.rmtree(scratch)


def apart(work: Callable[[], Any]) -> None:
    """Do ``work`` in a fork of this process, which has imported what it needs."""
    for name in ("recipe", "plan.prepare", "train.rehearsal", "train.loop", "methods.io", "models.tiny"):
        importlib.import_module(f"weitiao.{name}")
    if (child := os.fork()) == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)


def base(cell: Cell, folder: Path) -> None:
    """Write the cell's model and rows into ``folder``."""
    from weitiao.models import tiny

    tiny.make(cell.family, folder / MODEL, **cell.sizes)
    rows = (json.dumps({"text": text}) for text in cell.texts())
    (folder / ROWS).write_text("\n".join(rows), encoding="utf-8")


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """The cell itself, in this process."""
    from weitiao import recipe

    values = cell.recipe(str(folder / MODEL), str(folder / ROWS), str(folder / "run"))
    found = recipe.run(recipe.load(values)[0])
    plan = found.plan.to_dict()
    return {
        "planned": found.plan.host_peak_bytes,
        "measured": found.peak_bytes,
        "seconds": found.seconds,
        "planned_seconds": plan["total_seconds"],
        **{key: plan[key] for key in ("phases", "parts", "parameters", "trainable_parameters", "peak_phase")},
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    """What has been measured so far."""
    path = folder / "cells.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def error(line: dict[str, Any]) -> float:
    """The plan's error as a share of the truth; below 0 it said too little."""
    return line["planned"] / line["measured"] - 1


def table(found: list[dict[str, Any]]) -> str:
    """Every cell, the worst first, beside what rules of thumb say; and the figures of them all."""
    good = sorted((line for line in found if "error" not in line), key=lambda line: -abs(error(line)))
    errors = sorted(abs(error(line)) for line in good)
    mib = 2**20
    heads = ["cell", "measured, MiB", "planned, MiB", "error", "parameters x 4 (float32)", "6 x batch x parameters"]
    rows = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for line in good:
        batch = line["cell"]["tokens"] / line["cell"]["length"]
        counts = (line["measured"], line["planned"], 16 * line["parameters"], 6 * batch * line["parameters"])
        measured, planned, four, six = (f"{count / mib:.0f}" for count in counts)
        name = line["name"] + (", forked" if line.get("forked") else "")
        rows.append(f"| {name} | {measured} | {planned} | {error(line):+.1%} | {four} | {six} |")
    low = [line for line in good if error(line) < -0.05]
    figures = (
        f"{len(good)} cells; |error|: median {errors[len(errors) // 2]:.1%}, 95th percentile "
        f"{errors[int(0.95 * (len(errors) - 1))]:.1%}, largest {errors[-1]:.1%}; within 5 %: "
        f"{sum(one <= 0.05 for one in errors)}; more than 5 % too low: {len(low)}"
    )
    failed = [f"- {line['name']}: {line['error']}" for line in found if "error" in line]
    return "\n".join([figures, "", *rows, *(["", "Not measured:", *failed] if failed else [])])


def main(words: list[str]) -> None:
    """Measure, or show."""
    everything = cells()
    if words[0] == "--run":
        print(json.dumps(run(everything[int(words[1])], Path(words[2]))))
    elif words[0] == "--table":
        print(table(lines(Path(words[1]))))
    else:
        folder = Path(words[0])
        folder.mkdir(parents=True, exist_ok=True)
        start, _, end = (words[1] if len(words) > 1 else ":").partition(":")
        known = {line["name"] for line in lines(folder)}
        until = time.monotonic() + (float(words[2]) if len(words) > 2 else math.inf)
        for cell in everything[int(start or 0) : int(end or len(everything))]:
            if cell.name not in known and time.monotonic() < until:
                line = {"name": cell.name, "cell": asdict(cell), **measure(cell, folder, "--forked" in words)}
                with (folder / "cells.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                told = line.get("error") or f"{error(line):+.1%} of {line['measured'] >> 20} MiB"
                print(f"{cell.number}: {cell.name}: {told}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
