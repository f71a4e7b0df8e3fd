"""What the soaks share: tiny runs of every kind in forked children, places where a run can be hit, a log of results.

    python -m tests.soak.kill --count 1000          (make soak-kill; likewise rot, disk, nan)

The process has imported everything, so that a launch is a fork. Trial ``n`` is drawn from seed ``n`` alone. Results go
to runs/soak/NAME.jsonl, a line a trial; what is there already is not done again, and what failed stays there.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors import SafetensorError

from tests.train.support import losses, model_with, rows, train, weights_hash
from weitiao.errors import Interrupted
from weitiao.runs import Run, is_run
from weitiao.train import checkpoint

RESULTS = Path("runs/soak")
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None
STOPPED = 3  # exit code of a child that was asked to stop and did

# Method, task and options of the runs: dropout, accumulation, packing, paged state, several epochs, every cadence.
SPECS: list[dict[str, Any]] = [
    {"method": {"name": "full"}, "options": {"epochs": 3, "save_every": 2}},
    {"method": {"name": "lora", "rank": 4, "dropout": 0.3}, "options": {"epochs": 3, "save_every": "epoch"}},
    {"method": {"name": "full"}, "options": {"save_every": 1, "micro_batch_tokens": 30, "keep": 1}},
    {"method": {"name": "lora", "dropout": 0.1}, "options": {"micro_batch_tokens": 40, "save_every": 3, "epochs": 2.5}},
    {"method": {"name": "full"}, "task": {"name": "pretrain", "pack_tokens": 12}, "options": {"save_every": 4}},
    {"method": {"name": "adalora"}, "options": {"epochs": 3, "save_every": 2}},
    {"method": {"name": "full"}, "options": {"optimizer": "adamw8bit", "save_every": 2, "paged_optimizer": True}},
    {"method": {"name": "full"}, "dtype": "bfloat16", "options": {"optimizer": "muon", "save_every": 2}},
    {"method": {"name": "prefix_tuning"}, "options": {"optimizer": "lion", "save_every": 2}},
    {"method": {"name": "freeze", "blocks": 1}, "options": {"epochs": 3, "save_every": 2}},
]


def go(spec: dict[str, Any], folder: Path, resume: bool = False, **more: Any) -> dict[str, Any]:
    """Train as ``spec`` says; losses and a hash of the final weights."""
    torch.set_num_threads(1)
    resume = resume and is_run(folder)
    model = model_with(spec["method"], dtype=spec.get("dtype", "float32"))
    for module in model[0].modules() if "dropout" in spec["method"] else ():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2  # type: ignore[assignment]
    given = {"task": spec.get("task", {}), "options": spec["options"], "validation": rows(3, seed=5)}
    _, tuned, run = train(folder, rows(14), spec["method"], model=model, resume=resume, **given | more)
    return {"losses": losses(run), "weights": weights_hash(tuned)}


def launch(work: Callable[[], dict[str, Any]], folder: Path) -> int:
    """Fork a child that does ``work`` and writes what it gives to ``folder``/result.json; its pid. The child ends with
    0, STOPPED after a signal, 1 after an error, whose words are in ``folder``/errors."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        words = os.open(folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 2)
        (folder / "result.json").write_text(json.dumps(work()))
        code = 0
    except Interrupted:
        code = STOPPED
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def ended(pid: int, seconds: float = 900.0) -> int:
    """The exit code of a child, minus the number of the signal that ended it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a child ran longer than {seconds} s")


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


# ---- places where a run can be hit ---------------------------------------------------------------------------------

CALLS = ("fsync", "replace", "mkdir", "unlink", "rmdir", "chmod")


@contextmanager
def points(hit: Callable[[int, str, Path | None], None]) -> Iterator[None]:
    """Inside the block ``hit(number, where, half_written)`` is called before and after every flush, rename, removal
    and folder, and in the middle of every file that is written: tensors, JSON, text."""
    count = iter(range(1 << 30))
    before = {name: getattr(os, name) for name in CALLS}
    saved = checkpoint.save_file

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            hit(next(count), f"before {name}", None)
            found = before[name](*args, **options)
            hit(next(count), f"after {name}", None)
            return found

        return call

    def save(tensors: Any, path: Any, *rest: Any, **options: Any) -> None:
        saved(tensors, path, *rest, **options)
        hit(next(count), "in save_file", Path(path))

    def text(self: Path, data: Any, *rest: Any, **options: Any) -> int:
        written = texts[type(data)](self, data, *rest, **options)
        hit(next(count), "in write", self)
        return written

    texts = {str: Path.write_text, bytes: Path.write_bytes}
    for name in CALLS:
        setattr(os, name, wrapped(name))
    checkpoint.save_file = save
    Path.write_text = Path.write_bytes = text  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(os, name, function)
        checkpoint.save_file = saved
        Path.write_text, Path.write_bytes = texts[str], texts[bytes]  # type: ignore[method-assign]


def counted(work: Callable[[], Any]) -> list[str]:
    """The points that ``work`` passes."""
    found: list[str] = []
    with points(lambda number, where, path: found.append(where)):
        work()
    return found


def full(path: Path | None, draw: random.Random) -> None:
    """Fail as a full disk does, with a file cut somewhere."""
    if path is not None:
        os.truncate(path, draw.randrange(path.stat().st_size + 1))
        if path.suffix == ".safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- a soak --------------------------------------------------------------------------------------------------------


def references(folder: Path, specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The uninterrupted result of every spec with its seconds, from a child; run twice, since all else compares with
    it."""
    found = []
    for number, spec in enumerate(specs):
        twice = []
        for again in "ab":
            own = folder / f"reference-{number}{again}"
            own.mkdir(parents=True)
            started = time.monotonic()
            assert ended(launch(lambda spec=spec, own=own: go(spec, own / "run"), own)) == 0, (
                own / "errors"
            ).read_text()
            twice.append(result(own))
            twice[-1]["seconds"] = time.monotonic() - started
        assert twice[0]["weights"] == twice[1]["weights"] and twice[0]["losses"] == twice[1]["losses"], spec
        found.append(twice[1])
    return found


def soak(
    name: str, trial: Callable[[int, Path, Any], dict[str, Any]], prepare: Callable[[Path], Any], count: int
) -> int:
    """Run the trials that have no result yet; each returns ``{"ok": bool, …}``. Prints the tally; the number that
    failed."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.soak.{name}")
    parser.add_argument("--count", type=int, default=count, help="trials in all; trial n is drawn from seed n")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after so long")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {line["seed"] for line in lines}
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch, file.open("a") as log:
        prepared, end = prepare(Path(scratch)), time.monotonic() + options.seconds
        for seed in range(options.count):
            if seed in done or time.monotonic() > end:
                continue
            folder = Path(scratch) / str(seed)
            folder.mkdir()
            lines.append({"seed": seed, **attempted(trial, seed, folder, prepared)})
            print(json.dumps(lines[-1]), file=log, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    failed = tally(name, lines)
    return failed


def attempted(
    trial: Callable[[int, Path, Any], dict[str, Any]], seed: int, folder: Path, prepared: Any
) -> dict[str, Any]:
    """What a trial gives, or the error that it ended with."""
    try:
        return trial(seed, folder, prepared)
    except Exception as error:
        return {"ok": False, "kind": "error", "why": f"{type(error).__name__}: {error}"}


def tally(name: str, lines: list[dict[str, Any]]) -> int:
    """Print how many of each kind passed."""
    for kind in sorted({line["kind"] for line in lines}):
        own = [line for line in lines if line["kind"] == kind]
        print(f"{name} {kind}: {sum(line['ok'] for line in own)} of {len(own)}")
    failed = [line for line in lines if not line["ok"]]
    for line in failed[:20]:
        print("  failed:", json.dumps(line))
    return len(failed)


def whole(run: Path) -> list[Path]:
    """The checkpoints of ``run`` that verify, oldest first."""
    from weitiao.weights.folders import problems

    return [path for path in checkpoint.listed(Run(run).checkpoints) if not problems(path)]
