"""kill -9 and SIGTERM at random instants and within saves: what is resumed is what was never stopped.

Of ten trials five are killed at an instant uniform in time, two at a random flush, rename, removal or half-written
file, and three get SIGTERM; one trial in twelve goes through the command line, from recipe to saved adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.soak.harness import SPECS, STOPPED, counted, ended, go, launch, points, references, result, soak, whole
from weitiao import cli
from weitiao.errors import Interrupted
from weitiao.models import tiny
from weitiao.runs import Run, is_run
from weitiao.train import checkpoint

CLI = len(SPECS)  # the number of the run through the command line
ATTEMPTS = 6
KINDS = ("time", "time", "point", "time", "term", "time", "point", "term", "time", "term")


def prepare(folder: Path, specs: list[dict[str, Any]] = SPECS, line: bool = True) -> dict[str, Any]:
    """Uninterrupted results, and how many points each run passes."""
    prepared: dict[str, Any] = {"references": references(folder, specs), "points": [], "specs": specs}
    for number, spec in enumerate(specs):
        own = folder / f"points-{number}"
        own.mkdir()
        work = launch(lambda spec=spec, own=own: {"points": counted(lambda: go(spec, own / "run"))}, own)
        assert ended(work) == 0
        prepared["points"].append(result(own)["points"])
    if line:
        tiny.make("llama", folder / "base")
        rows = ({"prompt": f"问题{n}", "answer": f"回答{n}，好的"} for n in range(12))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        own = folder / "line"
        own.mkdir()
        started = time.monotonic()
        assert ended(launch(lambda: by_line(folder, own / "run"), own)) == 0, (own / "errors").read_text()
        prepared["references"].append(result(own) | {"seconds": time.monotonic() - started})
    return prepared | {"folder": folder}


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
    return {"losses": steps, "weights": hashlib.sha256(adapter).hexdigest()}


def trial(seed: int, folder: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    """Hit one run once or twice, go on until it ends, compare."""
    draw, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    through_line = seed % 12 == 11 and len(prepared["references"]) > len(prepared["specs"]) and kind != "point"
    number = len(prepared["specs"]) if through_line else draw.randrange(len(prepared["specs"]))
    wanted, run = prepared["references"][number], folder / "run"

    def work(hit: int | None = None) -> dict[str, Any]:
        if through_line:
            return by_line(prepared["folder"], run)
        if hit is None:
            return go(prepared["specs"][number], run, resume=True)
        with points(lambda at, where, path: strike(path, draw) if at == hit else None):
            return go(prepared["specs"][number], run, resume=True)

    hits, lost, signs = draw.choice((1, 1, 1, 2)), 0, []
    for _attempt in range(ATTEMPTS):
        aimed = draw.randrange(len(prepared["points"][number])) if kind == "point" and hits else None
        pid = launch(lambda aimed=aimed: work(aimed), folder)
        if hits and kind != "point":
            time.sleep(draw.uniform(0.0, wanted["seconds"]))
            os.kill(pid, signal.SIGTERM if kind == "term" else signal.SIGKILL)  # not reaped yet, so the pid is its own
        code, hits = ended(pid), max(0, hits - 1)
        signs.append(code)
        if code == 0:
            break
        if code not in (-signal.SIGKILL, -signal.SIGTERM, STOPPED):
            return {"ok": False, "kind": kind, "spec": number, "why": (folder / "errors").read_text()[-500:]}
        lost = max(lost, steps_lost(run))
    found = result(folder)
    same = {key: found[key] == wanted[key] for key in ("losses", "weights")}
    most = interval(prepared["specs"][number]) if not through_line else 1
    return {
        "ok": all(same.values()) and lost <= most,
        "kind": kind,
        "spec": number,
        "codes": signs,
        "lost": lost,
        **same,
    }


def strike(path: Path | None, draw: random.Random) -> None:
    """kill -9 of this process; a file that is being written is cut first, as if it had been half written."""
    if path is not None:
        os.truncate(path, draw.randrange(path.stat().st_size + 1))
    os.kill(os.getpid(), signal.SIGKILL)


def interval(spec: dict[str, Any]) -> int:
    """Steps between two saves: 14 rows, 4 a step, so that an epoch has 4 (packed: about 5)."""
    every = spec["options"].get("save_every", "epoch")
    return (5 if "task" in spec else 4) if every == "epoch" else int(every)


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
