"""Plan against fact of every run on this machine, in a file of the user's cache.

append(run, ready, measured_bytes, seconds)
print(table(lines()))                          # weitiao plan --history
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from weitiao.errors import redact, t
from weitiao.machine.speed import cache_folder
from weitiao.plan.need import Plan
from weitiao.plan.report import duration, padded, size

SHOWN = 30


def file() -> Path:
    """Where the lines are."""
    return cache_folder() / "plan-history.jsonl"


def append(run: Path, facts: Mapping[str, Any], plan: Plan, peak_bytes: int | None, seconds: float) -> None:
    """A line for a run that took all of its steps in this process. None where the peak says nothing of it, since what
    was planned in the process before took more, and none for a run in the system's folder for temporary files, which is
    thrown away. A cache that cannot be written is no harm."""
    before = next((phase.host_peak_bytes for phase in plan.phases if phase.name == "tokenise"), 0)
    if peak_bytes is None or (plan.device == "cpu" and peak_bytes <= before):
        return
    if run.resolve().is_relative_to(Path(tempfile.gettempdir()).resolve()):
        return
    line = {
        "time": round(time.time()),
        "run": str(run.absolute()),
        **facts,
        "device": plan.device,
        "dtype": plan.dtype,
        "parameters": plan.parameters,
        "planned_bytes": plan.host_peak_bytes,
        "measured_bytes": peak_bytes,
        "planned_seconds": plan.total_seconds,
        "measured_seconds": round(seconds, 3),
    }
    with contextlib.suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        with file().open("a", encoding="utf-8") as lines:
            lines.write(redact(json.dumps(line, ensure_ascii=False)) + "\n")


def lines() -> list[dict[str, Any]]:
    """Every whole line with its ``memory_error`` and ``time_error`` (0.1: planned ten per cent too high; None for no
    time planned), the worst in memory first."""
    found = []
    with contextlib.suppress(OSError):
        for text in file().read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, ZeroDivisionError):
                found.append(_with_errors(json.loads(text)))
    return sorted(found, key=lambda line: -abs(line["memory_error"]))


def _with_errors(line: dict[str, Any]) -> dict[str, Any]:
    planned, took = line["planned_seconds"], line["measured_seconds"]
    time_error = planned / took - 1 if planned and took else None
    return {**line, "memory_error": line["planned_bytes"] / line["measured_bytes"] - 1, "time_error": time_error}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """For a person: the worst misses, and how large they are on the whole."""
    if not found:
        return t("no run has been noted here yet: {path}", path=file())
    errors = sorted(abs(line["memory_error"]) for line in found)
    message = "{count} runs: memory off by {median} at the median, {most} at most; {low} planned more than 5 % too low"
    low = sum(line["memory_error"] < -0.05 for line in found)
    rows = [t(message, count=len(found), median=f"{median(errors):.1%}", most=f"{errors[-1]:.1%}", low=low)]
    rows.append(_row([t("planned"), t("measured"), t("error"), t("planned"), t("measured"), t("run")]))
    for line in found[:SHOWN]:
        planned = "–" if line["planned_seconds"] is None else duration(line["planned_seconds"])
        memory = [size(line["planned_bytes"]), size(line["measured_bytes"]), f"{line['memory_error']:+.1%}"]
        rows.append(_row([*memory, planned, duration(line["measured_seconds"]), f"{line['method']}  {line['run']}"]))
    return "\n".join(rows)


def _row(words: Sequence[str]) -> str:
    return "".join(padded(word, width) for word, width in zip(words, (12, 12, 9, 9, 10, 0), strict=True)).rstrip()
