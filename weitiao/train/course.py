"""The course of a run: which rows make up which step.

Everything follows from the rows, the options and the number of the step, so a run can go on from any step by knowing
that number alone.

course = Course(examples, task, options)
course.micro_batches(step=1)        # the rows of the first step, cut into what is computed at once
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from weitiao.data.batch import Example, lengths_of, pack, padded_length, plan_epoch, shared_tokens, trained_of
from weitiao.methods.base import Method
from weitiao.models.prefixes import followed
from weitiao.train import memory
from weitiao.train.options import Cadence, TrainOptions
from weitiao.train.tasks import Task


def shares(options: TrainOptions, method: Method, frozen_blocks: int) -> bool:
    """Whether rows compute once what they have in common in front: not where dropout would be drawn for each of them,
    unless that is asked for, nor where what ``frozen_blocks`` make of each is kept (``train.trunk``)."""
    wanted = options.shared_prefixes
    exact = wanted == "on" or (wanted == "auto" and not getattr(method, "dropout", 0.0))
    return exact and (options.trunk == "off" or not frozen_blocks)


class Course:
    """Which rows make up which step. Everything follows from the rows, the options and the number of the step."""

    def __init__(
        self,
        train: Sequence[Example],
        task: Task,
        options: TrainOptions,
        padded: bool = True,
        sharing: bool = False,
        processes: int = 1,
    ):
        """``padded``: padding is computed, so that rows of like length are cut into micro-batches of their own;
        ``sharing``: what rows have in common in front is computed once; ``processes``: how many share the rows of a
        step."""
        self.processes = processes
        self.sharing = sharing and not padded and not task.pack_tokens
        self.shared = shared_tokens(train).tolist() if self.sharing else None
        self.padded, self.train, self.options, self.pack_tokens = padded, train, options, task.pack_tokens
        longest = self.pack_tokens or int(lengths_of(train).max())
        self.micro_batch_tokens = memory.micro_batch_tokens(options.micro_batch_tokens, longest)
        self.left_out: set[str] = set()  # keys of rows that no step has any more
        self.epoch = -1
        self.examples: Sequence[Example] = ()
        self.steps: Sequence[list[list[int]]] = []
        self._enter(0)
        self.steps_per_epoch = len(self.steps)
        self.total_steps = math.ceil(options.epochs * self.steps_per_epoch)
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)

    def _enter(self, epoch: int) -> None:
        """Draw the order of ``epoch``."""
        if epoch == self.epoch:
            return
        seed = self.options.seed
        self.examples = self.train
        if self.pack_tokens:
            self.examples = pack(self.train, self.pack_tokens, seed=seed, epoch=epoch)
            if (trained_of(self.train) + 1 < lengths_of(self.train)).any():  # a row may have nothing that is trained
                self.examples = [example for example in self.examples if example.trained_tokens]
        lengths = lengths_of(self.examples)
        bound = self.micro_batch_tokens
        self.steps = plan_epoch(
            lengths,
            self.options.batch_size,
            bound,
            seed,
            epoch,
            padded=self.padded,
            shared=self.shared,
            processes=self.processes,
        )
        self.epoch = epoch

    def micro_batches(self, step: int) -> list[list[Example]]:
        """The rows of ``step`` (from 1), cut into what is computed at once: number i by the process i mod all."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        self._enter(epoch)
        batches = [[self.examples[row] for row in rows] for rows in self.steps[index]]
        if not self.left_out:
            return batches
        kept = ([example for example in batch if self.key(example) not in self.left_out] for batch in batches)
        return [batch for batch in kept if batch or self.processes > 1]

    def key(self, example: Example) -> str:
        """What a row of this epoch is called: packed rows are others in every epoch."""
        return f"{example.id} of epoch {self.epoch + 1}" if self.pack_tokens else example.id

    def rows_left(self) -> bool:
        """Whether a row is left to train on."""
        return bool(self.pack_tokens) or any(self.key(example) not in self.left_out for example in self.train)

    def computed_tokens(self, batch: Sequence[Example]) -> int:
        """The tokens of a micro-batch, with its padding where that is computed."""
        if self.padded:
            return len(batch) * padded_length(max(map(len, batch)))
        return sum(map(len, batch)) - self.saved_tokens(batch)

    def saved_tokens(self, batch: Sequence[Example]) -> int:
        """The tokens of a micro-batch that another row has computed."""
        if not self.shared or not any(self.shared):
            return 0
        leaders, many = followed([example.ids for example in batch])
        return sum(count for row, (leader, count) in enumerate(zip(leaders, many, strict=True)) if leader != row)

    def period(self, cadence: Cadence) -> int | None:
        """The steps from one time that something at this cadence is done to the next; None: it never is."""
        if cadence == "none":
            return None
        return self.steps_per_epoch if cadence == "epoch" else cadence

    def due(self, cadence: Cadence, step: int) -> bool:
        """Whether something done at this cadence is done after ``step``: the last step counts."""
        every = self.period(cadence)
        return every is not None and (step == self.total_steps or step % every == 0)

    def times(self, cadence: Cadence) -> int:
        """How often in the run something done at this cadence is done."""
        every = self.period(cadence)
        return 0 if every is None else -(-self.total_steps // every)

    @cached_property
    def rows_digest(self) -> int | str:
        """What the rows are."""
        return rows_crc32(self.train)

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from."""
        kept = ("batch_size", "seed", "learning_rate", "schedule", "minimum_rate", "warmup_steps", "optimizer", "betas",
                "epsilon", "weight_decay", "max_grad_norm")  # fmt: skip
        values = self.options.model_dump(mode="json", include=set(kept))
        own = {"rows": len(self.train), "rows_crc32": self.rows_digest, "pack_tokens": self.pack_tokens}
        return {**own, **values, "micro_batch_tokens": self.micro_batch_tokens, "total_steps": self.total_steps}


def rows_crc32(train: Sequence[Example]) -> int | str:
    """A checksum of rows, what they say and what of it is trained; mapped ones have one of their own."""
    if known := getattr(train, "digest", None):
        return known
    digest = 0
    for example in train:
        for part in (example.ids, example.mask, example.labels):
            digest = digest if part is None else zlib.crc32(part.tobytes(), digest)
    return digest
