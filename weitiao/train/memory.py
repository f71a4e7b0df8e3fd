"""How a step is cut to fit the memory, and how memory is held; none of it changes a result beyond the last bits.

tokens = micro_batch_tokens("auto", longest=512)
recompute = recomputes("auto", model, tokens)
with held(lean=False): ...  # steps
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from weitiao import machine
from weitiao.methods.base import compute_dtype
from weitiao.models import modules, shape

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of malloc.h
USUAL = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}  # where glibc's own rule ends after large blocks
KEPT = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: (1 << 31) - 1}  # bytes: larger blocks come from the system and go back
LEAN = {MMAP_THRESHOLD: 128 << 10, TRIM_THRESHOLD: 128 << 10}
AUTO_TOKENS = 2048  # a CPU's matrix products run at full speed from about a thousand rows on


def micro_batch_tokens(wanted: int | Literal["auto"], longest: int) -> int:
    """Padded tokens computed at once; ``auto`` depends on the data alone, so that it is the same on every machine."""
    return max(longest, AUTO_TOKENS) if wanted == "auto" else wanted


def recomputes(wanted: str, model: nn.Module, batch_tokens: int) -> bool:
    """Whether layers forget their activations and compute them again in the backward pass (arXiv 1604.06174), where no
    plan says how many of them do (``train.memory``)."""
    if wanted in ("low", "fast"):
        return wanted == "low"
    limit = machine.memory().available_bytes // 2 if wanted == "auto" else size_bytes(wanted)
    return activation_bytes(model, batch_tokens) > limit


def size_bytes(size: str) -> int:
    """``4GiB`` or ``900MiB`` in bytes."""
    return int(float(size[:-3]) * (1 << {"MiB": 20, "GiB": 30}[size[-3:]]))


def activation_bytes(model: nn.Module, batch_tokens: int) -> int:
    """An estimate of what the layers keep for the backward pass: every product's input and output, twice over for the
    norms, activation functions and residual sums between them."""
    widths = shape.read(modules.inner(model).config).widths
    return 2 * widths * batch_tokens * max(compute_dtype(model).itemsize, 2)


def lean(wanted: str, padded: bool) -> bool:
    """Whether freed memory goes back to the system at once. Kept, it is at hand for the next step, but small blocks
    that stay cut it up, and a process grows to as much as twice what lives in it; returned, every page is cleared when
    it comes again, a seventh of a small model's step. Where blocks run in one piece there are few of them, so that it
    is done where memory is asked for; elsewhere always, since no plan could tell how far the process would grow."""
    return padded or wanted not in ("auto", "fast")


@contextmanager
def held(lean: bool) -> Iterator[None]:
    """While it is open, memory that is freed stays with the process, or goes back at once where it is ``lean``; before
    and behind it all of it goes back.

    Left alone, glibc does now the one and now the other. Other C libraries are left as they are, and so is whoever has
    set glibc's own variables.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    known = hasattr(library, "mallopt") and hasattr(library, "malloc_trim") and not chosen
    if known:
        library.malloc_trim(0)  # what loading has left behind
    for name, value in (LEAN if lean else KEPT).items() if known else ():
        library.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in USUAL.items() if known else ():
            library.mallopt(name, value)
        if known:
            library.malloc_trim(0)
