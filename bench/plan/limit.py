"""Solved plans under a hard limit: is a run stopped that was planned to fit?

    python bench/plan/limit.py FOLDER [CELLS]

A cell of the grid is given a budget between the least that it can be trained with and what it would like to have, drawn
by its number; ``--solve`` finds its micro-batch, and it is trained in a fresh process whose data (RLIMIT_DATA: heap and
private maps, not files) may be no more than the plan and SPARE. The next larger value is trained too, without a limit.
Each result is a line of FOLDER/limits.jsonl; cells that are there already are not run again.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import grid
from cells import Cell, cells

SPARE = 1.05
SECONDS = 1800  # after which a process is given up
WEITIAO = [sys.executable, "-m", "weitiao"]


def words(cell: Cell, scratch: Path) -> list[str]:
    """The cell's recipe as a command line; what is solved for is left to the plan."""
    values = cell.recipe(str(scratch / grid.MODEL), str(scratch / grid.ROWS), str(scratch / "run"))
    values["train"] |= {"memory": "auto", "micro_batch_tokens": "auto"}
    lines = [f"output={values.pop('output')}"]
    for section, options in values.items():
        lines += [f"{section}.{name}={'null' if value is None else value}" for name, value in options.items()]
    return lines


def told(*arguments: str, limit_bytes: int = 0) -> tuple[int, dict[str, Any], str]:
    """A command of weitiao in a fresh process: its exit code, its JSON, and the end of what it said."""
    bound = (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))) if limit_bytes else None
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*WEITIAO, *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
                          preexec_fn=bound)  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return done.returncode, found, " ".join(done.stderr.split())[-300:]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Solve, run under the limit, and run the next value without one."""
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix="limit-"))
    try:
        grid.apart(lambda: grid.base(cell, scratch))
        recipe = words(cell, scratch)
        most = told("plan", *recipe, "train.memory=fast", f"train.micro_batch_tokens={cell.parts * cell.tokens}")[1]
        least = told("plan", *recipe, "train.memory=low", "train.micro_batch_tokens=1")[1]
        low, high = least["host_peak_bytes"], most["host_peak_bytes"]
        budget = f"{-(-int(low + random.Random(cell.number).uniform(0.02, 0.9) * (high - low)) >> 20)}MiB"
        code, solved, said = told("plan", *recipe, "--fit", budget, "--solve", "micro_batch_tokens")
        if code:
            return {"budget": budget, "error": said}
        planned = solved["host_peak_bytes"]
        code, run, said = told("train", *recipe, *solved["overrides"], limit_bytes=int(planned * SPARE))
        found = {"budget": budget, "value": solved["value"], "planned": planned, "stopped": code != 0, "said": said}
        found["measured"] = run.get("host_peak_bytes")
        if (following := solved["next"]) is not None:
            larger = f"train.micro_batch_tokens={following['value']}"
            found["next"] = told("train", *recipe, *solved["overrides"], larger, "--overwrite")[1].get(
                "host_peak_bytes"
            )
        return found
    except (subprocess.TimeoutExpired, KeyError) as error:
        return {"error": type(error).__name__}
    finally:
        shutil.rmtree(scratch)


def summary(lines: list[dict[str, Any]]) -> str:
    """How many were stopped, and how many of the next values went over the budget."""
    good = [line for line in lines if "error" not in line]
    tried = [line for line in good if line.get("next")]
    over = sum(line["next"] > int(line["budget"][:-3]) << 20 for line in tried)
    stopped = sum(line["stopped"] for line in good)
    return (
        f"{len(good)} solved plans: {stopped} stopped at plan x {SPARE}; the next over budget: {over} of {len(tried)}"
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    start, _, end = (sys.argv[2] if len(sys.argv) > 2 else ":100").partition(":")
    file = folder / "limits.jsonl"
    known = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
    done = {line["name"] for line in known}
    for cell in cells()[int(start or 0) : int(end or 100)]:
        if cell.name not in done:
            line = {"name": cell.name, **measure(cell, folder)}
            known.append(line)
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            print(cell.number, json.dumps(line), flush=True)
    print(summary(known))
