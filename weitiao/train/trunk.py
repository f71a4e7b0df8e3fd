"""The trunk, that is, the lowest blocks, of which nothing trains: what they make of a row is computed once and kept.

    with Trunk.of(model, course, options, run) as trunk:      # None where there is nothing to keep
        with fused(model, True, trunk):
            for rows in ...:
                trunk.rows = trunk.numbers(rows)              # those of the next pass
                loss.backward()

The states lie in a file of the run folder, which is mapped, not read: a later epoch takes them from there and begins
at the first block that trains. Beside it lies a digest of all that they depend on (weights, rows, code, versions), so
that a resumed run takes it up only if nothing has changed; it goes when the run is through.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from weitiao import machine
from weitiao.data.batch import Example, lengths_of
from weitiao.errors import say
from weitiao.methods.base import compute_dtype
from weitiao.methods.virtual import leading
from weitiao.models import adapted, anatomy, attention, block, kernels, modules, products, quantized, whole
from weitiao.runs import Run, write_atomic
from weitiao.train.course import Course
from weitiao.train.options import TrainOptions

FOLDER, STATES, FACTS = "trunk", "states.bin", "trunk.json"
SHARE = 0.5  # of the free disk that it may take


class Trunk:
    """The states of all rows behind the lowest ``blocks`` blocks. ``rows``: the numbers of the rows of the next pass,
    in their order; none where a pass is not to be kept."""

    def __init__(self, blocks: int, lengths: Sequence[int], width: int, dtype: torch.dtype, run: Run, digest: str):
        self.blocks, self.dtype, self.run = blocks, dtype, run
        self.rows: list[int] = []
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.kept = np.zeros(len(lengths), dtype=bool)
        self.facts = {"digest": digest, "tokens": int(self.starts[-1]), "width": width, "dtype": str(dtype)}
        self.path = run.path / FOLDER
        self.numbers_by_id: dict[int, int] = {}
        self.open()

    @classmethod
    def of(cls, model: nn.Module, course: Course, options: TrainOptions, run: Run, reserved: int = 0) -> Trunk | None:
        """What can be kept in this run, whose disk has ``reserved`` bytes that are for others; None where every epoch
        differs or is the only one, where something below the first block trains, where blocks do not run in one piece,
        or where the disk has no room, which is said."""
        made = cls._of(model, course, options, run, reserved)
        if made is None:
            shutil.rmtree(run.path / FOLDER, ignore_errors=True)
        return made

    @classmethod
    def _of(cls, model: nn.Module, course: Course, options: TrainOptions, run: Run, reserved: int) -> Trunk | None:
        blocks = frozen_blocks(model)
        again = course.total_steps > course.steps_per_epoch
        if options.trunk == "off" or course.padded or course.pack_tokens or not (again and blocks):
            return None
        if hasattr(course.train, "digest"):  # mapped: so many rows that their states would fill the disk
            return None
        width, dtype = modules.embedding(model).weight.shape[1], modules.embedding(model).weight.dtype
        needed = trunk_bytes(int(lengths_of(course.train).sum()), width, dtype.itemsize)
        own = run.path / FOLDER / STATES
        free = machine.disk(run.path).free_bytes - reserved + (own.stat().st_size if own.is_file() else 0)
        if needed > SHARE * free:
            message = "frozen blocks run in every epoch: to keep what they make takes {needed} MiB, and {free} are free"
            say(message, needed=needed >> 20, free=free >> 20)
            return None
        lengths = [len(example) for example in course.train]
        try:
            made = cls(blocks, lengths, width, dtype, run, digest(model, blocks, course))
        except OSError as error:
            say("what frozen blocks make of the rows is not kept: {reason}", reason=error.strerror or error)
            return None
        made.numbers_by_id = {id(example): number for number, example in enumerate(course.train)}
        return made

    def numbers(self, examples: Sequence[Example]) -> list[int]:
        """The numbers of rows of the course."""
        return [self.numbers_by_id[id(example)] for example in examples]

    def open(self) -> None:
        """Take up the file of an interrupted run if it is whole and of the same facts; else begin a new one."""
        shape = (self.facts["tokens"], self.facts["width"])
        item = np.uint16 if self.dtype.itemsize == 2 else np.uint32
        states, facts = self.path / STATES, self.path / FACTS
        try:
            whole = json.loads(facts.read_text("utf-8")) == self.facts and states.stat().st_size == item().nbytes * (
                shape[0] * shape[1]
            )
        except (OSError, ValueError):
            whole = False
        if not whole:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            with states.open("wb") as file:  # all of it now: a full disk would end the process later, without a word
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, item().nbytes * shape[0] * shape[1])
                else:
                    file.truncate(item().nbytes * shape[0] * shape[1])
        self.kept[:] = whole
        self.states: Any = np.memmap(states, item, "r+", shape=shape)

    def read(self) -> Tensor | None:
        """The states [N, H] of the rows of this pass, end to end; None where one of them has not been computed yet."""
        if not self.rows or not self.kept[self.rows].all():
            return None
        parts = [self.states[self.starts[row] : self.starts[row + 1]] for row in self.rows]
        return torch.from_numpy(np.concatenate(parts)).view(self.dtype)

    def write(self, states: Tensor) -> None:
        """Keep the states of this pass."""
        if not self.rows:
            return
        numbers, place = states.detach().view(torch.int16 if self.dtype.itemsize == 2 else torch.int32).numpy(), 0
        for row in self.rows:
            start, end = self.starts[row], self.starts[row + 1]
            self.states[start:end] = numbers[place : place + end - start].view(self.states.dtype)
            place += end - start
        self.kept[self.rows] = True
        if self.kept.all():
            self.states.flush()
            write_atomic(self.path / FACTS, json.dumps(self.facts))

    def __enter__(self) -> Trunk:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        del self.states
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)


def frozen_blocks(model: nn.Module) -> int:
    """How many of the lowest blocks see the same for a row in every epoch: nothing trains in them or before them."""
    before = [parameter for parameter in modules.embedding(model).parameters() if parameter.requires_grad]
    if before or leading(model):
        return 0
    layers = list(modules.blocks(model))
    return next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), len(layers))


def trunk_bytes(tokens: int, width: int, item_bytes: int) -> int:
    """What the states of so many tokens take."""
    return tokens * width * item_bytes


def digest(model: nn.Module, blocks: int, course: Course) -> str:
    """Of all that the states depend on: weights, configuration, rows, the code that computes them, versions."""
    found = hashlib.blake2b(digest_size=16)
    parts = [modules.embedding(model), *list(modules.blocks(model))[:blocks]]
    for tensor in (tensor for part in parts for tensor in part.state_dict().values()):
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    facts = [modules.inner(model).config.to_json_string(), course.fingerprint()["rows_crc32"], blocks]
    modules_read = adapted, anatomy, attention, block, kernels, products, quantized, whole
    code = [inspect.getsource(module) for module in modules_read]
    facts += [*code, kernels.source(), kernels.processor(), str(compute_dtype(model))]
    facts += [torch.__version__, transformers.__version__]
    found.update(json.dumps(facts).encode())
    return found.hexdigest()
