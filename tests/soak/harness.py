"""What the soaks share: tiny runs in forked children, and a log of results.

    python -m tests.soak.kill --jobs 2          (make soak-kill; likewise rot, disk, nan)

The process has imported everything and run every spec once, so that a launch is a fork. Trial ``n`` is drawn from the
soak's seed and ``n`` alone. Results go to runs/soak/NAME-SEED.jsonl, a line a trial; what is there already is not done
again, and what failed stays there. After a failure is mended the count starts again with the next seed, which is
committed first.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line has it: two threads on a busy core

import weitiao
from tests.soak.specs import built, go
from weitiao.errors import Interrupted
from weitiao.runs import Run
from weitiao.train import checkpoint

SEEDS = {"kill": 3, "rot": 2, "disk": 4, "nan": 4, "trainer": 2}  # one more at each start
RESULTS = Path("runs/soak")
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None
STOPPED = 3  # exit code of a child that was asked to stop and did
MOST_SECONDS = 900.0  # that a child may take
Trial = Callable[[int, random.Random, Path, Any], dict[str, Any]]


# ---- children --------------------------------------------------------------------------------------------------------


def launch(work: Callable[[], Any], folder: Path) -> int:
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


def ended(pid: int, seconds: float = MOST_SECONDS) -> int:
    """The exit code of a child, minus the number of the signal that ended it."""
    started = time.monotonic()
    while (waited := time.monotonic() - started) < seconds:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(max(0.002, waited / 50), 0.5))  # on a busy machine the child has need of the processor
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a child ran longer than {seconds} s")


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def done(work: Callable[[], Any], folder: Path) -> dict[str, Any]:
    """What a child gives that is left in peace."""
    folder.mkdir(parents=True, exist_ok=True)
    if ended(launch(work, folder)):
        raise AssertionError((folder / "errors").read_text()[-500:])
    return result(folder)


def passed(pid: int, seconds: float) -> None:
    """Wait until a child has had ``seconds`` of the processor, which a busy machine does not stretch; seconds of the
    clock where the system does not say."""
    clock, started = Path(f"/proc/{pid}/schedstat"), time.monotonic()
    while True:
        try:
            had = int(clock.read_text().split()[0]) / 1e9
        except (OSError, IndexError):  # not Linux
            had = time.monotonic() - started
        if had >= seconds or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(max(0.001, (seconds - had) / 2))


def warm(folder: Path, specs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Import and look up once what every child would, and build the models, of which every child has its own copy."""
    for number, spec in enumerate(specs):
        go({**spec, "threads": 1}, folder / f"warm-{number}")
    models = [built(spec) for spec in specs]
    gc.collect()
    gc.freeze()
    return models


def references(folder: Path, specs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The specs with their models, and the uninterrupted result of each, from a child; run twice, since all else
    compares with it."""
    specs, found = warm(folder, specs), []
    for number, spec in enumerate(specs):
        one, two = (done(lambda o=own, s=spec: go(s, o / "run"), own) for own in twins(folder, number))
        if not alike(one, two):
            raise AssertionError(f"two runs of one spec differ: {spec}")
        found.append(two)
    return specs, found


def twins(folder: Path, number: int) -> tuple[Path, Path]:
    """Where the two uninterrupted runs of a spec lie."""
    return folder / f"reference-{number}a", folder / f"reference-{number}b"


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs had the same losses and left the same weights, bit for bit."""
    return all(one[key] == other[key] for key in ("losses", "weights"))


def whole(run: Path) -> list[Path]:
    """The checkpoints of ``run`` that verify, oldest first."""
    from weitiao.weights.folders import problems

    return [path for path in checkpoint.listed(Run(run).checkpoints) if not problems(path)]


# ---- a soak ----------------------------------------------------------------------------------------------------------


def soak(name: str, trial: Trial, prepare: Callable[[Path], Any], count: int) -> int:
    """Run the trials that have no result yet; each returns ``{"ok": bool, "kind": str, …}``. Prints the tally; the
    number that failed."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.soak.{name}")
    parser.add_argument("--count", type=int, default=count, help="trials in all")
    parser.add_argument("--seed", type=int, default=SEEDS.get(name, 1), help="trial n is drawn from it and n")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    file, version = RESULTS / f"{name}-{options.seed}.jsonl", code()
    there = {line["n"] for line in lines_of(file)}
    todo = [n for n in range(options.count) if n not in there]
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        prepared = prepare(Path(scratch)) if todo else None

        def one(n: int, folder: Path) -> None:
            draw = random.Random(f"{name} {options.seed} {n}")
            line = {"n": n, "version": version, **attempted(trial, n, draw, folder, prepared)}
            with file.open("a") as log:
                log.write(json.dumps(line) + "\n")

        play(todo, options.jobs, one, Path(scratch))
    return tally(name, lines_of(file))


def play(todo: Sequence[int], jobs: int, one: Callable[[int, Path], None], scratch: Path) -> None:
    """Call ``one`` with every number and an empty folder, in ``jobs`` children."""

    def work(job: int, own: Path) -> None:
        for n in todo[job::jobs]:
            (folder := own / str(n)).mkdir()
            one(n, folder)
            shutil.rmtree(folder, ignore_errors=True)

    crew = []
    for job in range(min(jobs, len(todo))):
        own = Path(tempfile.mkdtemp(dir=scratch))
        crew.append((launch(lambda job=job, own=own: work(job, own), own), own))
    for pid, own in crew:
        if ended(pid, float("inf")):
            raise AssertionError((own / "errors").read_text()[-500:])


def attempted(trial: Trial, n: int, draw: random.Random, folder: Path, prepared: Any) -> dict[str, Any]:
    """What a trial gives, or the error that it ended with."""
    try:
        return trial(n, draw, folder, prepared)
    except Interrupted:  # the soak itself is to stop, which is no result
        raise
    except Exception as error:
        return {"ok": False, "kind": "error", "why": f"{type(error).__name__}: {error}"}


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def code() -> str:
    """What tells this version of the program and of its trials from another."""
    digest = hashlib.sha256()
    for root in (Path(weitiao.__file__).parent, Path(__file__).parent):
        for file in sorted([*root.rglob("*.py"), *root.rglob("*.c")]):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def tally(name: str, lines: list[dict[str, Any]]) -> int:
    """Print how many of each kind passed, and of which version of the program."""
    for kind in sorted({line["kind"] for line in lines}):
        own = [line for line in lines if line["kind"] == kind]
        print(f"{name} {kind}: {sum(line['ok'] for line in own)} of {len(own)}")
    print("version of the program:", *sorted({line["version"] for line in lines}))
    failed = [line for line in lines if not line["ok"]]
    for line in failed[:20]:
        print("  failed:", json.dumps(line))
    return len(failed)
