"""kill -9 and SIGTERM at random instants and within saves: what is resumed is what was never stopped.

Of thirteen trials seven are killed at an instant uniform in the run's time on the processor, three at a random flush,
rename, removal or half-written file, and three get SIGTERM; one run in twenty-four goes through the command line, from
recipe to saved adapter. A trial whose run ended before it was hit begins again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.soak.harness import STOPPED, alike, done, ended, launch, passed, references, result, soak, whole
from tests.soak.points import counted, die, points
from tests.soak.specs import SPECS, go, interval
from weitiao import cli
from weitiao.errors import Interrupted
from weitiao.models import tiny
from weitiao.runs import Run, is_run
from weitiao.train import checkpoint

Work = Callable[[Path], dict[str, Any]]
ATTEMPTS = 6  # launches that one run may take
KINDS = ("time", "point", "term", "time", "time", "point", "term", "time", "time", "point", "term", "time", "time")
LOSES = (-signal.SIGKILL, -signal.SIGTERM, STOPPED)  # ends after which a run is gone on with


def prepare(folder: Path, specs: list[dict[str, Any]] = SPECS, line: bool = True) -> dict[str, Any]:
    """Uninterrupted results, and the points that each run passes; the last run goes through the command line."""
    specs, found = references(folder, specs)
    runs: list[Work] = [partial(go, spec, resume=True) for spec in specs]
    prepared: dict[str, Any] = {"references": found, "most": [*map(interval, specs)], "runs": runs}
    if line:
        tiny.make("llama", folder / "base")
        rows = ({"prompt": f"问题{n}", "answer": f"回答{n}，好的"} for n in range(12))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        runs.append(partial(by_line, folder))
        runs[-1](folder / "warm-line")
        prepared["references"].append(done(lambda: by_line(folder, folder / "line" / "run"), folder / "line"))
        prepared["most"].append(1)
    prepared["points"] = [
        done(lambda run=run, own=own: counted(lambda: run(own / "run")), own)
        for run, own in ((run, folder / f"points-{number}") for number, run in enumerate(runs))
    ]
    return prepared


def by_line(folder: Path, run: Path) -> dict[str, Any]:
    """The run through the command line, begun or gone on with."""
    words = [f"model.path={folder / 'base'}", "model.dtype=float32", f"data.train={folder / 'rows.jsonl'}"]
    words += ["data.validation=0.2", "train.save_every=1", "train.epochs=2", "train.batch_size=4", f"output={run}"]
    words += ["method.dropout=0.2"]
    code = cli.main(["train", "--resume", str(run)] if is_run(run) else ["train", *words])
    if code:
        raise Interrupted("stopped") if checkpoint.listed(Run(run).checkpoints) else RuntimeError(f"exit code {code}")
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (run / "report.md").is_file()
    steps = [line["loss"] for line in Run(run).metrics() if "loss" in line]
    return {"losses": steps, "weights": hashlib.sha256(adapter).hexdigest(), "seconds": time.thread_time()}


def trial(n: int, draw: random.Random, folder: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    """Hit one run once or twice, go on until it ends, compare."""
    kind, number = KINDS[n % len(KINDS)], draw.randrange(len(prepared["runs"]))
    wanted, run, work = prepared["references"][number], folder / "run", prepared["runs"][number]
    line: dict[str, Any] = {"kind": kind, "spec": number, "codes": [], "where": [], "lost": 0}
    hits = draw.choice((1, 1, 1, 2))
    while len(line["codes"]) < ATTEMPTS:
        places = prepared["points"][number]
        pid, where = struck(kind if hits else "", partial(work, run), folder, wanted["seconds"], places, draw)
        code = ended(pid)
        if code == 0 and not line["codes"]:
            shutil.rmtree(run)  # the run was quicker than the hit
            continue
        line["codes"].append(code)
        if code == 0:
            break
        if code not in LOSES:
            return line | {"ok": False, "why": (folder / "errors").read_text()[-500:]}
        hits -= 1
        line["where"].append(where)
        line["lost"] = max(line["lost"], steps_lost(run))
    same = alike(result(folder), wanted)
    return line | {"ok": same and line["lost"] <= prepared["most"][number], "same": same}


def struck(
    kind: str, work: Callable[[], Any], folder: Path, seconds: float, places: list[str], draw: random.Random
) -> tuple[int, Any]:
    """A child that does ``work``, and is or will be hit as ``kind`` says; its pid, and where."""
    if kind == "point":
        at = draw.randrange(len(places))

        def aimed() -> Any:
            with points(lambda number, where, half: die(half, draw) if number == at else None):
                return work()

        return launch(aimed, folder), places[at]
    pid = launch(work, folder)
    if kind:
        share = draw.random()
        passed(pid, share * seconds)
        os.kill(pid, signal.SIGTERM if kind == "term" else signal.SIGKILL)  # not reaped yet, so the pid is its own
        return pid, round(share, 3)
    return pid, None


def steps_lost(run: Path) -> int:
    """Steps that were logged and are not in the newest checkpoint that verifies. One that is newer but does not verify
    would be a failure: saves are whole or absent."""
    if not is_run(run):
        return 0
    good = whole(run)
    assert len(good) == len(checkpoint.listed(Run(run).checkpoints)), "a checkpoint that does not verify"
    logged = max((line["step"] for line in Run(run).metrics() if "loss" in line), default=0)
    return logged - (int(good[-1].name.removeprefix(checkpoint.PREFIX)) if good else 0)


if __name__ == "__main__":
    sys.exit(bool(soak("kill", trial, prepare, count=1300)))
