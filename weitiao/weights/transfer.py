"""The bytes of one file: in parallel parts, from several places, resumed after a kill, hashed as they come.

    partial = Partial(folder, size, "sha256:…")
    Download("model.safetensors", partial, [Line("huggingface.co", url), Line("hf-mirror.com", other)], web).run()
    partial.finish()                       # the path of a file whose hash is right

Why not huggingface_hub's own transfer: it deletes what it has when a call fails, so a killed download begins anew; it
compares sizes and not content; and where a server ignores ranges it may fetch a file hundreds of times.

Progress is counted in bytes: a place that gives no new one, several times in a row, is given up, so nothing goes on for
ever. A wrong hash does not say where the wrong bytes are: part after part is fetched again, from another place where
there is one, until the hash is right; parts behind the wrong one are left alone.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial as bound
from typing import Any

from weitiao.errors import InputError, RunError, WeitiaoError, say, t
from weitiao.weights.partial import Partial
from weitiao.weights.web import Fault, Refused, Web, chunks, origin

PIECE_BYTES = 64 << 10  # what a kill may cost each connection, and as much again that was just read
SAID_SECONDS = 10.0  # waits from this on are said


@dataclass(frozen=True)
class Limits:
    """How a file is cut, and when patience ends."""

    connections: int = 4
    part_bytes: int = 64 << 20  # what one request asks for, at most
    smallest_part_bytes: int = 4 << 20
    tries: int = 8  # without a new byte, before a place is given up
    wait_s: float = 1.0  # after the first such try; it doubles
    longest_wait_s: float = 60.0
    slow_bytes: int = 16 << 10  # less than this within the time-out is a stall
    looks: int = 3  # how often a file whose hash is wrong is gone through


@dataclass
class Line:
    """One place that has the file, and how it has behaved."""

    label: str
    url: str = field(repr=False)
    failures: int = 0  # in a row, without a new byte
    noted: float = 0.0  # when the last was
    ready: float = 0.0  # when it may be asked again
    ignored: int = 0  # ranges, in a row
    odd: int = 0  # replies with the wrong range, in a row
    wasted: int = 0  # bytes that were there already
    tags: list[str] = field(default_factory=list)
    gone: str = ""  # why it is not asked any more
    refused: str = ""  # its own word for it: GatedRepo, EntryNotFound, …

    @property
    def ranged(self) -> bool:
        """Whether it is believed to serve ranges."""
        return self.ignored < 2 and self.odd < 2


class Unreachable(RunError):
    """No place is left to ask: what holds for one file will hold for the next."""


class Download:
    """One file from several places; ``tick`` is told of every new byte, ``stop`` ends everything early."""

    def __init__(
        self,
        name: str,
        partial: Partial,
        lines: Sequence[Line],
        web: Web,
        limits: Limits = Limits(),
        tick: Callable[[int], None] = lambda count: None,
        stop: threading.Event | None = None,
    ):
        self.name, self.partial, self.lines, self.web, self.limits = name, partial, list(lines), web, limits
        self.tick, self.stop = tick, stop or threading.Event()
        self.halt = threading.Event()  # one of this file's connections has failed for good
        self.answered = threading.Event()  # the first connection has shown what the place can do
        self.whole = threading.Lock()  # held by the one connection that reads a file without ranges
        self.lock = threading.Lock()
        wanted = -(-partial.size // limits.connections)
        self.unit = max(1, min(limits.part_bytes, max(limits.smallest_part_bytes, wanted)))

    def run(self) -> None:
        """Fetch until the file is whole and its hash is right; RunError says what each place did, and what is kept."""
        self._fill()
        if self.stop.is_set() or self.partial.sound():
            return
        window = self.unit * self.limits.connections
        unchanged = 0
        for _ in range(self.limits.looks):
            with self.lock:
                self.lines.append(self.lines.pop(0))  # another place looks first
            changed = False
            for start in range(0, self.partial.size, window):
                end = min(start + window, self.partial.size)
                before = self.partial.checksum(start, end)
                self.partial.drop(start, end)
                self.tick(start - end)
                self._fill()
                if self.stop.is_set():
                    return
                if self.partial.checksum(start, end) != before:
                    changed = True
                    if self.partial.sound():
                        return
            unchanged += not changed
            if unchanged >= sum(not line.gone for line in self.lines):
                break
        self.partial.close()
        shutil.rmtree(self.partial.folder, ignore_errors=True)
        message = "{name}: no place gives bytes whose hash is {digest}; what came was removed"
        raise RunError(t(message, name=self.name, digest=self.partial.digest))

    def _over(self) -> bool:
        return self.stop.is_set() or self.halt.is_set()

    def _fill(self) -> None:
        """Fetch whatever is missing, with several connections once one has shown that ranges are served."""
        units = deque(
            (start, min(start + self.unit, stop))
            for first, stop in self.partial.missing()
            for start in range(first, stop, self.unit)
        )
        if not units:
            return

        def work(number: int) -> None:
            while number and not self.answered.wait(0.05) and not self._over():
                pass
            with contextlib.suppress(IndexError):
                while not self._over():
                    self._carry(*units.popleft())
            self.answered.set()

        together([bound(work, number) for number in range(min(self.limits.connections, len(units)))], self.halt)

    def _carry(self, start: int, stop: int) -> None:
        """Fetch a range, from whichever place is ready, until nothing of it is missing."""
        while (gap := self.partial.gap(start, stop)) and not self._over():
            line = self._line()
            if line is None:
                return
            asked = time.monotonic()
            try:
                self._ask(line, *gap)
            except Fault as fault:
                self._note(line, fault, asked)
            except Refused as refused:
                line.gone, line.refused = str(refused), refused.code or "-"

    def _line(self) -> Line | None:
        """The first place that may be asked now, waiting for it; RunError when none is left."""
        while not self._over():
            with self.lock:
                left = [line for line in self.lines if not line.gone]
                now = time.monotonic()
                ready = [line for line in left if line.ready <= now]
            if not left:
                raise self._failed()
            if ready:
                return min(ready, key=lambda line: not line.ranged)
            self.stop.wait(min(0.5, min(line.ready for line in left) - now))
        return None

    def _failed(self) -> WeitiaoError:
        """Why no place is left to ask."""
        if any(line.refused == "GatedRepo" for line in self.lines):
            message = "{name}: access must be asked for on its page; then log in (hf auth login)"
            return InputError(t(message, name=self.name))
        reasons = "; ".join(f"{line.label}: {line.gone}" for line in self.lines)
        kept = self.partial.size - sum(stop - start for start, stop in self.partial.missing())
        message = "{name}: not fetched ({reasons}); {kept} of {size} bytes are kept, run again"
        kind = RunError if all(line.refused for line in self.lines) else Unreachable
        return kind(t(message, name=self.name, reasons=reasons, kept=kept, size=self.partial.size))

    def _note(self, line: Line, fault: Fault, asked: float) -> None:
        """Remember a fault: what gave new bytes may be asked again at once, the rest after a wait, or not at all.
        Faults of requests that were under way at the last fault are one with it."""
        limits = self.limits
        with self.lock:
            if asked < line.noted:
                return
            backoff = min(limits.wait_s * 2 ** (line.failures - 1), limits.longest_wait_s) if line.failures else 0.0
            line.failures += 1
            line.noted = time.monotonic()
            line.ready = line.noted + max(fault.wait, backoff)
            if line.failures > limits.tries or fault.wait > 10 * limits.longest_wait_s:
                line.gone = str(fault)
            elif line.wasted > 8 * self.partial.size + (64 << 20):
                line.gone = t("it serves no ranges and is cut too often")
        if fault.wait >= SAID_SECONDS and not line.gone:
            say(
                "{place}: {reason}; asked again in {seconds} s",
                place=line.label,
                reason=fault,
                seconds=round(fault.wait),
            )

    def _ask(self, line: Line, start: int, stop: int) -> None:
        """One request for a range, and what its reply brings. Without ranges a file comes from its beginning, so only
        one connection reads it."""
        with contextlib.ExitStack() as held:
            if alone := not line.ranged:
                held.enter_context(self.whole)
                if (gap := self.partial.gap(start, stop)) is None:
                    return
                start = gap[0]
            headers = {} if line.odd >= 2 else {"Range": f"bytes={start}-{stop - 1}"}
            reply = held.enter_context(self.web.open(line.url, headers))
            first = self._first_byte(line, reply, start)
            self.answered.set()
            if reply.status == 200 and not alone:
                held.enter_context(self.whole)
                if self.partial.gap(start, stop) is None:
                    return  # the one before has read it meanwhile
            part = reply.status == 206
            self._take(line, reply, first, lambda: stop if part or line.ranged else self.partial.size)

    def _first_byte(self, line: Line, reply: Any, start: int) -> int:
        """Where a reply begins; Fault if it is not what was asked for, or of another file."""
        self._same_file(line, reply)
        size, packed = self.partial.size, reply.headers.get("Content-Encoding", "identity") not in ("identity", "")
        if reply.status == 206:
            found = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)", reply.headers.get("Content-Range") or "")
            if not found or packed or int(found[1]) != start or found[2] not in ("*", str(size)):
                line.odd += 1
                self.answered.set()
                raise Fault(t("it sends another range than it was asked for"))
            line.ignored = line.odd = 0
            return start
        length = reply.headers.get("Content-Length") or ""
        if not packed and length.isdigit() and int(length) != size:
            raise Fault(t("its file has {found} bytes, not {right}", found=length, right=size))
        line.ignored += 1
        if start and (line.ranged or any(other.ranged and not other.gone for other in self.lines)):
            self.answered.set()
            raise Fault(t("it does not serve ranges"))
        return 0

    def _same_file(self, line: Line, reply: Any) -> None:
        """Fault if a tag says that this is another file than before. A tag that comes again is taken where a hash will
        decide: machines behind one name may each have their own, and what looks like a hash may be none."""
        tag = (reply.headers.get("ETag") or "").removeprefix("W/").strip('"')
        known = self.partial.digest.partition(":")[2]
        if not tag or tag == known or tag in (line.tags if known else line.tags[-1:]):
            return
        line.tags.append(tag)
        at_home = origin(reply.url) == origin(line.url)
        if known and at_home and len(tag) == len(known) and re.fullmatch(r"[0-9a-f]+", tag):
            raise Fault(t("it has another file ({tag})", tag=tag[:12]))
        if len(line.tags) > 1:
            if not known:  # nothing else would tell old bytes from new ones
                self.partial.drop(0, self.partial.size)
            raise Fault(t("the file was changed meanwhile"))

    def _take(self, line: Line, reply: Any, at: int, stop: Callable[[], int]) -> None:
        """Write a reply's bytes, piece by piece, up to ``stop``; Fault if it ends before, or comes too slowly."""
        piece, since, came = bytearray(), time.monotonic(), 0
        try:
            for chunk in chunks(reply):
                if self._over():
                    return
                piece += chunk[: max(0, stop() - at - len(piece))]
                came += len(chunk)
                if len(piece) >= PIECE_BYTES or at + len(piece) >= stop():
                    at = self._keep(line, at, piece)
                    piece = bytearray()
                    if at >= stop():
                        return
                if time.monotonic() - since > self.web.timeout_s:
                    if came < self.limits.slow_bytes:
                        raise Fault(t("it is too slow"), self.limits.wait_s)
                    since, came = time.monotonic(), 0
        finally:
            self._keep(line, at, piece)
        raise Fault(t("cut after {found} of {size} bytes", found=at, size=self.partial.size))

    def _keep(self, line: Line, at: int, piece: bytearray) -> int:
        """Write a piece; where the next begins."""
        if piece:
            new = self.partial.add(at, piece)
            line.wasted += len(piece) - new
            if new:
                line.failures = 0
                self.tick(new)
        return at + len(piece)


def together(works: Sequence[Callable[[], None]], halt: threading.Event) -> None:
    """Run ``works`` side by side; an error sets ``halt``, and the first is raised here. Their threads are daemons, so
    that an interrupted program does not wait for the network."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
            halt.set()

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        halt.set()
        raise
    if errors:
        raise errors[0]
