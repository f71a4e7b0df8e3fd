"""Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, the second leaves at once.

with Stop() as stop:
    while not stop.asked: ...

Of several processes the signal may reach any, at any time, and all must stop after the same step: there ``asked`` waits
until they have agreed.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stop:
    """``heard`` turns true at the first signal, and ``asked`` too where this process is ``alone``. Handlers are set in
    the main thread only, and put back on leaving."""

    def __init__(self, alone: bool = True) -> None:
        self.asked = self.heard = False
        self.alone = alone
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        self.asked = self.asked or self.alone
        self._restore()  # so that a second signal does what it did before

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
