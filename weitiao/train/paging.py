"""Paged optimiser state: it lies in a file while a CPU trains, in the host's memory while a GPU does, and is where the
weights are for one parameter at a time (Dettmers et al., arXiv 2305.14314, section 3, by hand and on a CPU too).

    paged = Paged(optimizer, Home.file(run.path, size))
    paged.step()                     # bit for bit optimizer.step()
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weitiao import machine
from weitiao.errors import RunError, t
from weitiao.runs import disk_error
from weitiao.train.optim import kept_bytes

ALIGNMENT = 64  # bytes that a tensor's place is a multiple of: a cache line, and every dtype's size divides it
PIECE_BYTES = 1 << 20


@dataclass(eq=False)
class Home:
    """Where state lies between steps: ``memory`` [bytes], mapped from a file if there is a ``mapping``."""

    memory: Tensor
    mapping: mmap.mmap | None = None
    used: int = 0

    @classmethod
    def file(cls, folder: Path, size: int) -> Home:
        """``size`` bytes of a file in ``folder``, all of them taken from the disk now: RunError names them if it is too
        full. The file has no name (on Windows it goes with its last handle), so that even a killed process leaves
        nothing behind."""
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                _reserve(file, folder, size)
                mapping = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise disk_error(error, folder / "optimizer", size) from error
        return cls(torch.frombuffer(mapping, dtype=torch.uint8), mapping)

    @classmethod
    def pinned(cls, size: int) -> Home:
        """``size`` bytes of the host's memory that a GPU copies to and from directly; RunError if there are fewer.

        They are registered with CUDA and not asked of torch, which would round them up to a power of two.
        """
        message = "train.paged_optimizer: the state needs {needed} bytes of the host's memory, {free} are free"
        free = machine.memory().available_bytes
        cudart: Any = torch.cuda.cudart()
        if free < size:
            raise RunError(t(message, needed=size, free=free))
        memory = torch.empty(size, dtype=torch.uint8)
        if int(cudart.cudaHostRegister(memory.data_ptr(), size, 1)) != 0:  # 1: for every context
            raise RunError(t(message, needed=size, free=free))
        home = cls(memory)
        weakref.finalize(home, cudart.cudaHostUnregister, memory.data_ptr())
        return home

    def place(self, like: Tensor) -> Tensor:
        """The next free place, with the dtype, shape and strides of ``like``."""
        flat = self.memory[self.used : self.used + like.nbytes].view(like.dtype)
        self.used += aligned(like.nbytes)
        return flat.as_strided(like.shape, like.stride())

    def rest(self, tensor: Tensor) -> None:
        """Give the pages of ``tensor`` back, if it lies here; what they hold stays the file's."""
        start = tensor.data_ptr() - self.memory.data_ptr()
        if self.mapping is not None and 0 <= start < len(self.mapping) and hasattr(mmap, "MADV_DONTNEED"):
            first = start - start % mmap.PAGESIZE
            self.mapping.madvise(mmap.MADV_DONTNEED, first, start + tensor.nbytes - first)


def _reserve(file: Any, folder: Path, size: int) -> None:
    """Make ``file`` ``size`` bytes long with its blocks allocated: a mapped page that finds no block kills."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, PIECE_BYTES):
        file.write(bytes(min(PIECE_BYTES, size - start)))
    file.flush()


class Paged:
    """``optimizer`` with its state in ``home``. ``copies``: the optimiser cannot reach into ``home``, so that a
    parameter's state is copied to the parameter's device and back around its update."""

    def __init__(self, optimizer: torch.optim.Optimizer, home: Home, copies: bool = False):
        self.optimizer, self.home, self.copies, self.size = optimizer, home, copies, home.memory.numel()
        self.places: dict[tuple[int, str], Tensor] = {}  # by the parameter's id

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, name: str, folder: Path) -> Paged:
        """The optimiser called ``name`` with its state in a file in ``folder``, or in the host's memory if its
        parameters are on a GPU."""
        size = home_bytes(name, optimizer.param_groups)
        if optimizer.param_groups[0]["params"][0].is_cuda:
            return cls(optimizer, Home.pinned(size), copies=True)
        return cls(optimizer, Home.file(folder, size))

    def step(self) -> None:
        """One step over every parameter with a gradient, one after another."""
        groups = self.optimizer.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.optimizer.param_groups = [{**group, "params": [parameter]}]
                        self._update(parameter)
        finally:
            self.optimizer.param_groups = groups
        if any(parameter.is_cuda for group in groups for parameter in group["params"]):
            torch.cuda.synchronize()  # what was copied home may be read now

    def _update(self, parameter: Tensor) -> None:
        """Step the only parameter that the optimiser sees, its state brought in before and put back after."""
        state = self.optimizer.state[parameter]
        if self.copies:
            for kind, tensor in state.items():
                if tensor.ndim:
                    state[kind] = tensor.to(parameter.device, non_blocking=True, copy=True)
        self.optimizer.step()
        for kind, tensor in state.items():
            if tensor.ndim:  # a count of steps stays where it is
                self.keep(parameter, kind, tensor)

    def keep(self, parameter: Tensor, kind: str, tensor: Tensor) -> None:
        """Make ``tensor`` the ``kind`` of state of ``parameter``, at home."""
        place = self.places.get((id(parameter), kind))
        if place is None:
            place = self.places[id(parameter), kind] = self.home.place(tensor)
        self.optimizer.state[parameter][kind] = place
        if place is not tensor:
            place.copy_(tensor, non_blocking=True)
        self.home.rest(place)

    def close(self) -> None:
        """Forget the state, and with it the file or memory that it lies in."""
        self.optimizer.state.clear()
        self.places.clear()
        self.home = Home(torch.empty(0, dtype=torch.uint8))


def home_bytes(name: str, groups: Iterable[dict[str, Any]]) -> int:
    """What the state of the optimiser called ``name`` takes at home."""
    return sum(
        aligned(size)
        for group in groups
        for parameter in group["params"]
        for size in kept_bytes(name, parameter.numel(), group.get("linear", False))
    )


def aligned(size: int) -> int:
    """``size`` up to the next place."""
    return -(-size // ALIGNMENT) * ALIGNMENT
