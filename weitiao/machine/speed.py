"""The processor's measured speed, and the dtype that is fastest with it.

Speeds are measured once for a processor and torch version (at most three seconds) and kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from weitiao.machine.hardware import cpu, gpus

DTYPES = ("float32", "bfloat16", "float16")
MEASURE_SECONDS = 0.5  # for each dtype, and for the bandwidth
BF16_GAIN = 1.2  # how much faster bfloat16 must be before its rounding is worth it


def gemm_gflops(dtype: str) -> float:
    """Measured matrix-product rate of the processor in 10^9 operations a second, for ``dtype``."""
    return _speeds()[dtype]


def bandwidth() -> float:
    """Measured memory bandwidth of the processor in bytes a second: what a large copy reads plus what it writes."""
    return _speeds()["bandwidth"]


def best_dtype() -> str:
    """The dtype of frozen weights that is fastest here; on a processor never float16.

    A GPU: bfloat16 from Ampere on, float16 before it. A processor: bfloat16 where it has the instructions for it and
    the measured product is clearly faster, else float32.
    """
    if cards := gpus():
        return "bfloat16" if all(card.bf16 for card in cards) else "float16"
    if not cpu().bf16:
        return "float32"
    return "bfloat16" if gemm_gflops("bfloat16") > BF16_GAIN * gemm_gflops("float32") else "float32"


def cache_folder() -> Path:
    """The user's cache folder for this project: XDG on Linux, Library/Caches on macOS, LOCALAPPDATA on Windows."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "weitiao"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "weitiao"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "weitiao"
    return Path.home() / ".cache" / "weitiao"


@cache
def _speeds() -> dict[str, float]:
    """The measured speeds, from the cache if this processor, thread count and torch were measured before."""
    return _kept().get(_speed_key()) or remeasure()


def remeasure() -> dict[str, float]:
    """Measure now and keep the result for later runs."""
    speeds, path = measure(), cache_folder() / "speeds.json"
    with contextlib.suppress(OSError):  # a read-only home only means that the next run measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps({**_kept(), _speed_key(): speeds}, indent=1), encoding="utf-8")
        partial.replace(path)
    _speeds.cache_clear()
    return speeds


def _kept() -> dict[str, dict[str, float]]:
    """The speeds in the cache, by processor, threads and torch."""
    try:
        values = json.loads((cache_folder() / "speeds.json").read_text(encoding="utf-8"))
        return {key: speeds for key, speeds in values.items() if {*DTYPES, "bandwidth"} == set(speeds)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _speed_key() -> str:
    import torch

    return f"{cpu().name} | {torch.get_num_threads()} threads | torch {torch.__version__}"


def measure(seconds: float = MEASURE_SECONDS) -> dict[str, float]:
    """Measure matrix products of each dtype (10^9 operations a second) and bandwidth (bytes a second)."""
    import torch

    speeds = {name: measured_gemm(name, seconds) for name in DTYPES}
    source = torch.ones(16 * 2**20)  # 64 MiB, beyond most caches
    target = torch.empty_like(source)
    speeds["bandwidth"] = 2 * source.nbytes / _seconds_each(lambda: target.copy_(source), seconds)
    return speeds


def measured_gemm(dtype: str, seconds: float = MEASURE_SECONDS) -> float:
    """10^9 operations a second of torch's matrix products in ``dtype``, at this moment."""
    import torch

    rows, width = 256, 1024  # a micro-batch of tokens through a layer of a small model
    left, right = (torch.ones(size, width, dtype=getattr(torch, dtype)) for size in (rows, width))
    return 2 * rows * width * width / _seconds_each(lambda: left @ right.T, seconds) / 1e9


def _seconds_each(work: Callable[[], object], seconds: float) -> float:
    """The fastest of the repetitions that fit into ``seconds`` (the first, which warms up, counts only if alone)."""
    end = time.perf_counter() + seconds
    taken: list[float] = []
    while len(taken) < 2 or (time.perf_counter() < end and len(taken) < 1000):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
        if taken[0] > seconds:
            break
    return max(min(taken), 1e-9)
