"""Progress on stderr: of a run (step, loss, tokens per second, time left), and of anything that is counted.

    with Bar() as bar:
        fit(..., progress=bar)
    with counting(t("answering")) as progress:
        progress(3, 100)                           # done, all

Where stderr is no terminal (a log file, a pipe) it is a line every half minute instead of a bar.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from weitiao.errors import say, t

LINE_EVERY_SECONDS = 30.0
SPEED_OVER_STEPS = 50


class Bar:
    """Called with every line of metrics.jsonl and the number of all steps."""

    def __init__(self) -> None:
        self.progress: Any = None
        self.task: Any = None
        self.recent: deque[tuple[int, float]] = deque(maxlen=SPEED_OVER_STEPS)
        self.spoken = 0.0

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.progress = Progress(*columns, console=console())
            self.task = self.progress.add_task("", total=None)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def __call__(self, record: Mapping[str, Any], total_steps: int) -> None:
        """Show one line."""
        if "validation" in record:
            self._print(self._validated(record))
            return
        self.recent.append((record["tokens"], record["seconds"]))
        if self.progress is not None:
            self.progress.update(
                self.task, total=total_steps, completed=record["step"], description=self._described(record)
            )
        elif time.monotonic() - self.spoken > LINE_EVERY_SECONDS or record["step"] == total_steps:
            self.spoken = time.monotonic()
            left = clock(self._seconds_a_step() * (total_steps - record["step"]))
            message = "step {step}/{total}  {described}  {left} left"
            described = self._described(record)
            self._print(t(message, step=record["step"], total=total_steps, described=described, left=left))

    def _print(self, line: str) -> None:
        """A line above the bar, if there is one."""
        if self.progress is not None:
            self.progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _described(self, record: Mapping[str, Any]) -> str:
        tokens, seconds = (sum(values) for values in zip(*self.recent, strict=True))
        return t(
            "loss {loss}  {speed} tokens/s", loss=_number(record["loss"]), speed=f"{tokens / max(seconds, 1e-9):,.0f}"
        )

    def _validated(self, record: Mapping[str, Any]) -> str:
        measures = "  ".join(f"{name} {_number(value)}" for name, value in record["validation"].items())
        return t("step {step}  validation: {measures}", step=record["step"], measures=measures)

    def _seconds_a_step(self) -> float:
        return sum(seconds for _, seconds in self.recent) / len(self.recent)


@contextmanager
def counting(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar for anything that is counted: call what is yielded with (done, all), all being None where it is not known,
    as often as you like."""
    if not sys.stderr.isatty():
        yield _Lines(label)
        return
    from rich.progress import Progress

    with Progress(console=console(), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Lines:
    """The same in a log."""

    def __init__(self, label: str) -> None:
        self.label, self.began = label, time.monotonic()
        self.spoken = self.began

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.spoken <= LINE_EVERY_SECONDS:
            return
        self.spoken = now
        left = clock((now - self.began) * (total - done) / done) if done and total else "–"
        say("{what}: {done} of {total}  {left} left", what=self.label, done=done, total=total or "–", left=left)


@cache
def console() -> Any:
    """The one console of stderr: a bar inside another (an evaluation within training) needs the same one."""
    from rich.console import Console

    return Console(stderr=True)


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
