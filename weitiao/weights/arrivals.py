"""Files arrive: all that are missing of a listing, one after another or side by side, with a bar for each and for all.

moved_bytes = get(web, target, listing, missing, bases, place, Limits())
to_safetensors(place, listing.commit, ["pytorch_model.bin"])
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from weitiao.errors import RunError, say, t
from weitiao.machine import disk
from weitiao.weights import inspect, sources, tensors
from weitiao.weights.cache import Place
from weitiao.weights.partial import Partial
from weitiao.weights.sources import Entry, Listing, Target
from weitiao.weights.transfer import Download, Limits, Line, Unreachable, together
from weitiao.weights.web import Web, shown

PICKLES = (inspect.BIN, "pytorch_model-*.bin", inspect.BIN_INDEX)
LINE_EVERY_SECONDS = 30.0


def get(
    web: Web, target: Target, listing: Listing, missing: list[Entry], bases: Sequence[str], place: Place, limits: Limits
) -> int:
    """Fetch files that are missing, small ones side by side, large ones in parallel parts; how many bytes came."""
    by_content: dict[str, list[Entry]] = {}
    for entry in missing:
        by_content.setdefault(entry.digest or entry.path, []).append(entry)
    groups = sorted(by_content.values(), key=lambda group: group[0].size)
    whole = sum(group[0].size for group in groups)
    rewritten = sum(entry.size for entry in missing if any(fnmatch(entry.path, one) for one in PICKLES))
    kept = sum(place.kept_bytes(group[0]) for group in groups)
    _check_disk(listing.name, whole + rewritten - kept, place.root)
    say("{name}: fetching {count} files, {size} MB", name=listing.name, count=len(missing), size=whole // 10**6)
    if kept:
        say("{size} MB of them are here from before", size=kept // 10**6)
    stop, problems = threading.Event(), []
    small = deque(group for group in groups if group[0].size <= limits.smallest_part_bytes)
    with Bar(whole) as bar:

        def one(group: list[Entry], limits: Limits) -> None:
            entry = group[0]
            lines = [Line(shown(base), sources.address(target, listing, entry, base)) for base in bases]
            try:
                _file(place, listing.commit, group, lines, web, limits, bar, stop)
            except Unreachable:
                raise
            except RunError as error:
                problems.extend(error.problems)

        def next_small() -> None:
            with suppress(IndexError):
                while not stop.is_set():
                    one(small.popleft(), replace(limits, connections=1))

        try:
            together([next_small] * limits.connections, stop)
            for group in groups:
                if group[0].size > limits.smallest_part_bytes:
                    one(group, limits)
        except KeyboardInterrupt:
            stop.set()
            say("what came is kept; the same command goes on from there")
            raise
    if problems:
        raise RunError(problems)
    return bar.moved


def _file(
    place: Place, commit: str, group: list[Entry], lines: list[Line], web: Web, limits: Limits, bar: Bar,
    stop: threading.Event,
) -> None:  # fmt: skip
    """Fetch one file, under all its names; if another process does so already, wait for it."""
    entry, waiting = group[0], False
    while (folder := place.claim(entry)) is None:
        if not waiting:
            say("{name}: another process fetches it; waiting", name=entry.path)
        waiting = True
        if stop.wait(0.5):
            return
        if all(place.holds(commit, one, verify=True) for one in group):
            return
    partial = Partial(folder, entry.size, entry.digest)
    try:
        tick = bar.file(entry.path, entry.size, entry.size - sum(b - a for a, b in partial.missing()))
        Download(entry.path, partial, lines, web, limits, tick, stop).run()
        if not stop.is_set():
            place.arrive(commit, group, partial.finish())
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        partial.close()


def _check_disk(name: str, needed: int, folder: Path) -> None:
    """RunError before the first byte if the disk cannot hold what would come."""
    free = disk(folder).free_bytes
    if needed > free:
        message = "{path}: {needed} bytes are needed for {name} and {free} are free"
        raise RunError(t(message, path=folder, needed=needed, name=name, free=free))


def to_safetensors(place: Place, commit: str, names: list[str]) -> None:
    """Rewrite weights that came as pickles, and forget those."""
    folder = place.folder(commit)
    if not any((folder / name).is_file() for name in names):
        return
    say("{path}: its .bin weights become safetensors", path=folder)
    temporary = place.scratch()
    try:
        tensors.write(temporary, _apart(tensors.read(folder)))
        made = []
        for path in sorted(temporary.iterdir()):
            path.chmod(0o644)
            made.append(path.replace(folder / path.name))
        place.rewritten(commit, names, made)
    except OSError as error:
        raise RunError(t("{path}: {reason}", path=folder, reason=error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _apart(found: tensors.Tensors) -> tensors.Tensors:
    """Tensors that share memory, as tied weights do in a pickle, each with its own: safetensors refuses shared ones."""
    seen: set[int] = set()
    for name, tensor in found:
        place = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if place in seen else tensor
        seen.add(place)


class Bar:
    """Counts bytes as they come: ``moved`` over the network, ``done`` of ``total``; threads may share it."""

    def __init__(self, total: int):
        self.total, self.done, self.moved = total, 0, 0
        self.lock, self.spoken = threading.Lock(), time.monotonic()
        self.progress: Any = None
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
            columns = (progress.TextColumn("{task.description}"), *columns, progress.TimeRemainingColumn())
            self.progress = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self.tasks[""] = self.progress.add_task(t("in all"), total=self.total)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def file(self, name: str, size: int, kept: int) -> Callable[[int], None]:
        """A counter for one file, of which ``kept`` bytes are there already."""
        with self.lock:
            self.done += kept
            if self.progress is not None:
                self.tasks[name] = self.progress.add_task(name, total=size, completed=kept)
                self.progress.update(self.tasks[""], completed=self.done)
        return lambda count: self._count(name, count)

    def _count(self, name: str, count: int) -> None:
        """``count`` new bytes; less than none are bytes that are fetched again."""
        with self.lock:
            self.done += count
            self.moved += max(0, count)
            if self.progress is not None:
                self.progress.advance(self.tasks[name], count)
                self.progress.update(self.tasks[""], completed=self.done)
                if self.progress.tasks[self.tasks[name]].finished:
                    self.progress.update(self.tasks[name], visible=False)
            elif time.monotonic() - self.spoken > LINE_EVERY_SECONDS:
                self.spoken = time.monotonic()
                say("{done} of {total} MB", done=self.done // 10**6, total=self.total // 10**6)
