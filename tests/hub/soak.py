"""Seeded schedules of faults against a fetch: does it end, with the right bytes, and how many bytes does it take?

    python -m tests.hub                          # make soak-fetch: what is not yet in runs/soak/fetch.jsonl
    python -m tests.hub --table                  # what was found, counted
    python -m tests.hub --client huggingface_hub --every 20

A schedule is drawn from its seed alone: the files, what goes wrong with which reply, whether there is a mirror, and
after how many bytes the client is killed (kill -9). A killed or failed client is started again, as a person would.
Clients are forked from a process that has imported everything, so a launch takes milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download

from tests.hub.server import BUFFER_BYTES, KINDS, Fault, Server, flipped, serving
from weitiao.weights import fetch
from weitiao.weights.transfer import Limits
from weitiao.weights.web import Web

SEEDS = range(1000)
RUNS = 12  # how often a person starts a client again, kills not counted
END_SECONDS = 300.0  # after which a client is said to go on for ever
TIMEOUT_SECONDS = 0.5
REPOSITORY, FILE = "org/soak", "model.safetensors"
LIMITS = Limits(smallest_part_bytes=256 << 10, part_bytes=2 << 20, wait_s=0.02, longest_wait_s=0.2)
MIB = 1 << 20
MEMORY = Path("/dev/shm")  # thousands of flushes are not what is measured


@dataclass(frozen=True)
class Plan:
    """One schedule. ``shape`` is its family; ``mirror`` is what the second place does, if there is one."""

    seed: int
    shape: str
    size: int
    faults: tuple[Fault, ...] = ()
    always: Fault | None = None
    mirror: str = ""
    kills: tuple[int, ...] = ()


def plan(seed: int) -> Plan:
    """The schedule of a seed."""
    draw = random.Random(seed)
    size = draw.randrange(MIB, 8 * MIB)
    kills = tuple(draw.randrange(1, size) for _ in range(draw.choice((0, 0, 1, 1, 2, 3))))
    match shape := draw.choices(("mixed", "kills", "cuts", "places", "no ranges"), (60, 12, 10, 12, 6))[0]:
        case "mixed":
            return Plan(seed, shape, size, _faults(draw, size, draw.randrange(1, 11)), kills=kills)
        case "kills":
            return Plan(seed, shape, size, kills=tuple(draw.randrange(1, size) for _ in range(draw.randrange(1, 6))))
        case "cuts":
            return Plan(
                seed, shape, size, always=Fault("every", draw.choice((64 << 10, draw.randrange(16 << 10, MIB))))
            )
        case "places":
            wrong = draw.choice((Fault("status", value=404), Fault("status", value=503), Fault("flip", 999)))
            faults = _faults(draw, size, draw.randrange(0, 4))
            return Plan(seed, shape, size, faults, wrong, draw.choice(("right", "right", "other")), kills[:1])
        case _:
            cuts = tuple(Fault("cut", draw.randrange(size)) for _ in range(draw.randrange(0, 3)))
            return Plan(seed, shape, size, cuts, Fault("ignore_range"), kills=kills[:1])


def _faults(draw: random.Random, size: int, count: int) -> tuple[Fault, ...]:
    values = {"status": (429, 500, 502, 503, 504, 408), "stall": (2 * TIMEOUT_SECONDS,), "trickle": (0.002,)}
    found = []
    for _ in range(count):
        kind = draw.choice(KINDS)
        found.append(Fault(kind, draw.randrange(size), draw.choice(values.get(kind, (0,)))))
    return tuple(found)


# ---- clients -------------------------------------------------------------------------------------------------------


def ours(url: str, mirror: str, cache: str) -> None:
    """weitiao's fetch, with short waits."""
    mirrors = [mirror] if mirror else []
    web = Web(timeout_s=TIMEOUT_SECONDS, wait_s=0.02)
    fetch.fetch(REPOSITORY, include=["*"], mirrors=mirrors, limits=LIMITS, web=web)


def theirs(url: str, mirror: str, cache: str) -> None:
    """huggingface_hub, which knows no mirrors and is given its own shortest time-outs."""
    hf_hub_download(REPOSITORY, FILE, endpoint=url, cache_dir=cache, etag_timeout=2)


CLIENTS = {"weitiao": ours, "huggingface_hub": theirs}


def run_client(name: str, url: str, mirror: str, cache: str) -> None:
    """What a client's process does; its exit code is 0 or 1."""
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = cache, False
    constants.HF_HUB_DISABLE_XET, constants.HF_HUB_DOWNLOAD_TIMEOUT = True, 1
    os.environ["HF_ENDPOINT"] = url
    connect = socket.socket.connect

    def narrow(self: socket.socket, *arguments: Any) -> Any:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        return connect(self, *arguments)

    socket.socket.connect = narrow  # type: ignore[method-assign]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the process's life)
    try:
        CLIENTS[name](url, mirror, cache)
    except Exception as error:
        Path(cache, f"error-{os.getpid()}").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


# ---- one schedule --------------------------------------------------------------------------------------------------


def play(seed: int, client: str = "weitiao") -> dict[str, Any]:
    """Run one schedule to its end and say what came of it."""
    this = plan(seed)
    content = random.Random(-1 - seed).randbytes(this.size)
    folder = Path(tempfile.mkdtemp(prefix="weitiao-soak-", dir=MEMORY if MEMORY.is_dir() else None))
    other = flipped(content, 12345) if this.mirror == "other" else content
    started = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            hub = stack.enter_context(serving({REPOSITORY: {FILE: content}}))
            hub.faults.extend(this.faults)
            hub.always = this.always
            if this.mirror == "other":  # then only the first place can help, so it must
                hub.always = None
            mirror = stack.enter_context(serving({REPOSITORY: {FILE: other}})) if this.mirror else None
            found = _play(this, client, hub, mirror, folder, hashlib.sha256(content).hexdigest())
            sent = hub.sent + (mirror.sent if mirror else 0)
            faults = hub.cuts + (mirror.cuts if mirror else 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found |= {"seed": seed, "client": client, "shape": this.shape, "size": this.size, "sent": sent, "faults": faults}
    return found | _judged(found, this) | {"seconds": round(time.monotonic() - started, 2)}


def _judged(found: dict[str, Any], this: Plan) -> dict[str, Any]:
    """Bytes against their bound: 1.05 × size + 1 MiB for each fault or kill. A fault that cannot be seen before the
    file is whole (a bit, another file) or that throws ranges away costs up to the file once more: counted apart."""
    bound = 1.05 * this.size + MIB * (found["faults"] + found["kills"])
    hidden = ("flip", "ignore_range", "gzip", "wrong_range")
    whole_again = sum(fault.kind in hidden for fault in this.faults) + 2 * (this.mirror == "other")
    if this.always is not None and this.always.kind in hidden:
        whole_again += found["kills"] + len(this.faults) + 2
    plain = whole_again == 0
    return {"plain": plain, "within": found["sent"] <= bound + this.size * whole_again}


def _play(this: Plan, client: str, hub: Server, mirror: Server | None, folder: Path, right: str) -> dict[str, Any]:
    """Start the client until it says that it has the file; look at the disk after every end."""
    context = multiprocessing.get_context("forkserver")
    kills, runs, killed, wrong, code = list(this.kills), 0, 0, 0, None
    while code != 0 and runs - killed < RUNS:
        runs += 1
        event = threading.Event()
        hub.watch = (hub.sent + kills.pop(0), event) if kills else None
        arguments = (client, hub.url, mirror.url if mirror else "", str(folder))
        process = context.Process(target=run_client, args=arguments, daemon=True)
        process.start()
        end = time.monotonic() + END_SECONDS
        while process.is_alive() and time.monotonic() < end and not (hub.watch and event.wait(0.005)):
            process.join(0.005 if hub.watch else 0.1)
        code = process.exitcode
        if process.is_alive():
            if time.monotonic() >= end:
                code = "endless"
            killed += code is None
            process.kill()
            process.join()
        wrong += _wrong(folder, right)
        if code == "endless":
            break
    errors = [path.read_text()[:300] for path in sorted(folder.glob("error-*"))]
    left = [path for pattern in (".weitiao/*.part", "blobs/*.incomplete") for path in folder.glob(f"*/{pattern}")]
    done = code == 0 and _wrong(folder, right) == 0 and _there(folder)
    return {"done": done, "runs": runs, "kills": killed, "wrong": wrong, "orphans": len(left), "end": code,
            "error": errors[-1] if errors and not done else ""}  # fmt: skip


def _there(folder: Path) -> bool:
    return any(path.is_file() for path in folder.glob(f"*/snapshots/*/{FILE}"))


def _wrong(folder: Path, right: str) -> int:
    """Files under a final name whose bytes are not the right ones."""
    found = [*folder.glob(f"*/snapshots/*/{FILE}"), *folder.glob("*/blobs/*")]
    found = [path for path in found if path.is_file() and path.suffix != ".incomplete"]
    return sum(hashlib.sha256(path.read_bytes()).hexdigest() != right for path in found)


# ---- all of them ---------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Let clients be forked from a process that has imported this module."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.hub.soak"])


def table(records: list[dict[str, Any]]) -> list[str]:
    """Counts, a line for each family of schedules and one for all."""
    lines = ["shape | schedules | finished | wrong bytes | endless | orphans | within bound | sent / size | kills"]
    for shape in [*sorted({record["shape"] for record in records}), "all"]:
        some = [record for record in records if shape in (record["shape"], "all")]
        count = Counter(
            {key: sum(bool(record[key]) for record in some) for key in ("done", "wrong", "orphans", "within")}
        )
        endless = sum(record["end"] == "endless" for record in some)
        ratio = sum(record["sent"] for record in some) / sum(record["size"] for record in some)
        kills = sum(record["kills"] for record in some)
        counts = (len(some), count["done"], count["wrong"], endless, count["orphans"], count["within"])
        lines.append(" | ".join(map(str, (shape, *counts, f"{ratio:.2f}", kills))))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/soak/fetch.jsonl"))
    parser.add_argument("--client", choices=sorted(CLIENTS), default="weitiao")
    parser.add_argument("--every", type=int, default=1, help="take only every n-th seed")
    parser.add_argument("--first", type=int, default=0, help="beginning with this one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; go on another time")
    parser.add_argument("--table", action="store_true", help="only count what was found")
    options = parser.parse_args()
    records = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    mine = [record for record in records if record["client"] == options.client]
    known = {record["seed"] for record in mine}
    end = time.monotonic() + options.seconds
    prepare()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in [] if options.table else SEEDS[options.first :: options.every]:
        if seed in known or time.monotonic() > end:
            continue
        mine.append(play(seed, options.client))
        with options.out.open("a") as file:
            file.write(json.dumps(mine[-1]) + "\n")
        if not mine[-1]["done"] or mine[-1]["wrong"] or not mine[-1]["within"]:
            print(json.dumps(mine[-1]), json.dumps(asdict(plan(seed)))[:400], flush=True)
    print("\n".join(table(mine)) if mine else "nothing yet")
    return 0
