"""Every hostile and every valid file through the program's own entry points, each in a process that is watched.

    python -m tests.hostile.soak runs/soak-files    # resumable; results in results.jsonl, failures kept

The libraries are imported once; each case is opened in a fork, in which an audit hook notes what a file may not cause
(programs started, connections, files written elsewhere, modules and code from the case, pickle itself) and a payload
that runs leaves a file. A refusal is one line for each problem, within 2 s of the processor and 1.5 × the files +
256 MiB of memory beyond what the libraries take.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile import raw
from tests.hostile.case import CANARY, EITHER, OPENED, REFUSED, Case
from tests.hostile.corpus import hostile
from tests.hostile.valid import valid

SECONDS, ROOM_BYTES = 2.0, 256 << 20
PATIENCE_SECONDS = 1200  # of the clock, only so that nothing waits for ever
SEED = 20261126
STARTED = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn", "webbrowser.open")
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "ftplib.connect", "smtplib.connect")
UNSAFE = ("pickle.find_class", "ctypes.dlopen", "os.remove", "os.rename", "os.chmod", "os.link", "os.symlink")


# ---- how a person opens a file ---------------------------------------------------------------------------------------


def _cli(*words: object) -> int:
    from weitiao.cli import main

    return main([str(word) for word in words])


def _load(path: Path) -> int:
    from weitiao.models.load import ModelOptions, load

    load(ModelOptions(path=str(path), dtype="float32"))
    return 0


def _tokenizer(path: Path) -> int:
    from weitiao.models.load import load_tokenizer

    load_tokenizer(path)("你好, world")
    return 0


def _render(path: Path) -> int:
    from weitiao.data.messages import as_dicts
    from weitiao.data.render import Renderer
    from weitiao.data.rows import Message
    from weitiao.models.load import load_tokenizer

    Renderer.of(load_tokenizer(path)).text(as_dicts([Message("user", "hi"), Message("assistant", "yes")]))
    return 0


def _open(path: Path) -> int:
    from weitiao.methods.io import open_model

    open_model(path, dtype="float32")
    return 0


OPENERS: dict[str, Callable[[Path], int]] = {
    "inspect": lambda path: _cli("inspect", path),
    "convert": lambda path: _cli("convert", path, path.parent / "out" / "made.safetensors"),
    "load": _load,
    "tokenizer": _tokenizer,
    "render": _render,
    "open": _open,
}


# ---- one case --------------------------------------------------------------------------------------------------------


def run(case: Case) -> dict[str, Any]:
    """Open the case in a fork: what was said, what was noted, what it took, and what is wrong with that."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        folder = Path(place).resolve() / "case"
        folder.mkdir()
        path = case.write(folder)
        size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            _inside(case, path, folder, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            said = file.read()
        _, status = os.waitpid(child, 0)
        found = json.loads(said) if said else {"ended": f"status {status}"}
        found["canary"] = [str(file) for file in folder.rglob(CANARY)]
    found |= {"name": case.name, "wanted": case.wanted, "how": case.how, "bytes": size}
    return found | {"wrong": wrong(found, size)}


def wrong(found: dict[str, Any], size: int) -> list[str]:
    """What is not as it must be."""
    said = []
    if "ended" in found:
        return [f"the process ended: {found['ended']}"]
    said += [f"canary: {file}" for file in found["canary"]] + [f"noted: {event}" for event in found["events"]]
    if found["wanted"] == OPENED and not found["opened"]:
        said.append(f"false alarm: {found['text'][:300]}")
    if found["wanted"] == REFUSED and found["opened"]:
        said.append("was opened")
    if found["wanted"] != OPENED and not found["opened"]:
        said += [] if found["foreseen"] else [f"not foreseen: {found['text'][:300]}"]
        said += [f"{found['seconds']:.2f} s"] if found["seconds"] > SECONDS else []
        most = size * 3 // 2 + ROOM_BYTES
        said += [f"{found['memory'] >> 20} MiB"] if found["memory"] > most else []
        lines = found["text"].splitlines()
        said += [] if lines and all(len(line) < 2000 for line in lines) and len(lines) < 30 else ["no line says why"]
    return said


def _inside(case: Case, path: Path, folder: Path, writer: int) -> None:
    """In the fork: open the case under the hook and write what came of it."""
    import signal

    signal.alarm(PATIENCE_SECONDS)
    events: list[str] = []
    out, err = io.StringIO(), io.StringIO()
    before, start = _memory(), _seconds()
    (folder / "out").mkdir()
    os.chdir(folder)
    watching = [True]
    sys.addaudithook(lambda event, values: watching[0] and _note(events, event, values, folder))
    found: dict[str, Any] = {"opened": False, "foreseen": True, "text": ""}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = OPENERS[case.how](path)
            found["opened"] = code == 0
            found["text"] = "\n".join(line for line in err.getvalue().splitlines() if line.startswith("error:"))
            found["foreseen"] = code in (0, 2) and "not foreseen" not in found["text"]
        except BaseException as error:
            from weitiao.errors import WeitiaoError

            found |= {"text": str(error), "foreseen": isinstance(error, WeitiaoError)}
    watching[0] = False
    found |= {"seconds": round(_seconds() - start, 3), "memory": _memory() - before, "events": events[:20]}
    os.write(writer, json.dumps(found).encode())
    os._exit(0)


def _note(events: list[str], event: str, values: tuple[Any, ...], folder: Path) -> None:
    """The audit hook: what a file may not cause."""
    from weitiao.weights import child

    if event in STARTED or event in NETWORK or event in UNSAFE:
        if event == "os.remove" and str(values[0]).startswith(str(folder / "out")):
            return
        if event == "os.rename" and str(values[1]).startswith(str(folder / "out")):
            return
        events.append(f"{event} {str(values)[:100]}")
    elif event == "subprocess.Popen" and child.__file__ not in map(str, values[1]):
        events.append(f"{event} {str(values[1])[:100]}")
    elif event == "open" and isinstance(values[1], str) and set(values[1]) & set("wax+"):
        if not str(values[0]).startswith((str(folder / "out"), "/dev/null")) and not isinstance(values[0], int):
            events.append(f"open {values[0]} {values[1]}")
    elif event in ("exec", "import"):
        name = getattr(values[0], "co_filename", None) if event == "exec" else values[1]
        evil = event == "exec" and CANARY in str(getattr(values[0], "co_consts", ""))
        if str(name or "").startswith(str(folder)) or evil:
            events.append(f"{event} {name}")


def _memory() -> int:
    """The most bytes that this process has held. The one that reads pickles is kept below the same bound by the system
    (RLIMIT_AS in weights/child.py); what the system counts for it includes this process at the moment of the fork."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seconds() -> float:
    """Seconds of the processor, of this process and those that it started."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def warm() -> None:
    """Import what the entry points use, so that a fork has it and is measured without it."""
    import peft  # noqa: F401
    import torch
    from rich.table import Table  # noqa: F401

    torch.set_num_threads(1)
    for case in (case for case in valid(SEED) if case.name in ("valid, folder llama", "valid, template llama")):
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
            OPENERS[case.how](case.write(Path(place)))
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        (file := Path(place) / "x.bin").write_bytes(raw.saved({"a": torch.ones(1)}))
        with contextlib.redirect_stderr(io.StringIO()):
            OPENERS["convert"](file), OPENERS["inspect"](file)


# ---- all of them -----------------------------------------------------------------------------------------------------


def todo(cases: list[Case], results: Path) -> Iterator[Case]:
    """The cases that have no result yet."""
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    return (case for case in cases if case.name not in done)


def main(folder: Path, seed: int = SEED) -> int:
    """Run what has no result yet; say the counts; 1 if anything is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    warm()
    cases = [*hostile(seed), *valid(seed)]
    with results.open("a") as file:
        for number, case in enumerate(todo(cases, results)):
            file.write(json.dumps(run(case), ensure_ascii=False) + "\n")
            file.flush()
            if number % 50 == 0:
                print(f"{number} …", file=sys.stderr, flush=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    bad = [row for row in rows if row["wrong"]]
    refused = [row for row in rows if row["wanted"] != OPENED]
    for row in bad:
        print(row["name"], *row["wrong"], sep="\n    ")
    may, canaries = sum(row["wanted"] == EITHER for row in refused), [row for row in rows if row.get("events")]
    print(f"hostile {len(refused)} ({may} of them may open), valid {len(rows) - len(refused)}, seed {seed}")
    print(f"wrong {len(bad)}, canaries {len(canaries) + sum(bool(row.get('canary')) for row in rows)}")
    slowest, largest = (max(row.get(key, 0) for row in refused) for key in ("seconds", "memory"))
    print(f"slowest refusal {slowest:.2f} s of the processor, largest {largest >> 20} MiB beyond the libraries")
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", LC_ALL="C.UTF-8")
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/soak-files")))
