"""A clock that stands still while the machine sleeps and that nobody sets.

started = awake_seconds()
took = awake_seconds() - started        # a laptop closed for the night in between adds nothing
"""

from __future__ import annotations

import sys
import time


def awake_seconds() -> float:
    """Seconds from some moment on, without those that the machine slept. Python's own counters do that on Linux
    (CLOCK_MONOTONIC) and macOS (mach_absolute_time); on Windows they count sleep, and the system has another clock."""
    if sys.platform != "win32":
        return time.perf_counter()
    import ctypes

    ticks = ctypes.c_ulonglong()  # of 100 ns
    ctypes.WinDLL("api-ms-win-core-realtime-l1-1-1").QueryUnbiasedInterruptTimePrecise(ctypes.byref(ticks))
    return ticks.value / 1e7
