"""Losses, gradients, weights and moments that are no numbers or leap, in a few steps of a run: caught within a step,
never in a checkpoint, and the run ends where the clean one does; and clean runs in which nothing may be caught.

Rows that are bad are left out, so the clean run beside theirs is one that never had them; ``had`` is the loss of the
one that did. ``same``: every loss and the weights are the clean run's, bit for bit.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.soak.harness import soak
from tests.train.support import train, weights_hash
from weitiao.data.batch import Example
from weitiao.runs import Run
from weitiao.train import checkpoint, loop, recovery

KINDS = ("loss NaN", "loss Inf", "gradient NaN", "gradient Inf", "loss spike", "gradient spike", "weight NaN",
         "moment Inf", "bad rows")  # fmt: skip
STEPS = 60
ROWS = 120
CLEAN = 7  # one trial in so many is clean, over learning rates of four decades


def lines(count: int, seed: int, vocabulary: int = 60, name: str = "row") -> list[Example]:
    """Rows that can be learnt: each counts on in steps of its own from somewhere."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        start, by, length = draw.integers(0, 40), draw.integers(1, 4), int(draw.integers(6, 16))
        ids = 5 + (start + by * np.arange(length)) % (vocabulary - 5)
        found.append(Example(ids.astype(np.int32), np.ones(length, bool), f"{name}:{number}"))
    return found


def prepare(folder: Path) -> dict[int, dict[str, Any]]:
    """Clean results by spec, filled as they are asked for."""
    return {}


def options(draw: random.Random) -> dict[str, Any]:
    """What a run of one spec trains with."""
    return {
        "max_steps": STEPS, "epochs": 1000, "batch_size": draw.choice((4, 8)), "save_every": draw.choice((10, 20)),
        "learning_rate": draw.choice((1e-3, 3e-3)), "warmup_steps": draw.choice((2, 10)), "evaluate_every": STEPS,
        "best": None, "keep": 50, "optimizer": draw.choice(("adamw", "adamw", "lion")),
        "max_grad_norm": draw.choice((1.0, None)),
    }  # fmt: skip


def trial(n: int, draw: random.Random, folder: Path, clean: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """A faulty run beside the clean one of its spec, or a clean one alone."""
    if n % CLEAN == 0:
        rate, count = 10 ** draw.uniform(-5, -1), draw.choice((2, 6, 30, 120))
        chosen = options(draw) | {"learning_rate": rate, "batch_size": draw.choice((1, 2, 4, 8)), "save_every": "none"}
        method = draw.choice(({"name": "full"}, {"name": "lora"}, {"name": "lora", "dropout": 0.2}))
        _, _, run = train(folder / "run", lines(count, n), method, options=chosen)
        caught = [line["step"] for line in run.metrics() if "skipped" in line]
        return {"ok": not caught, "kind": "clean", "caught": caught, "rate": rate, "rows": count}
    kind, spec = KINDS[n % len(KINDS)], draw.randrange(6)
    chosen, rows, tested = options(random.Random(spec)), lines(ROWS, 1), lines(12, 2, name="test")
    given = {"options": chosen, "validation": tested}
    if spec not in clean:
        clean[spec] = outcome(*train(folder / "clean", rows, **given))
    at = sorted(draw.sample(range(22, STEPS), draw.choice((1, 2, 3))))
    bad = {rows[number].id for number in draw.sample(range(ROWS), 2)} if kind == "bad rows" else set()
    beside = clean[spec]
    if bad:
        with without(bad):
            beside = outcome(*train(folder / "without", rows, **given))
    with faults(kind, set(at), bad, draw) as struck:
        _, model, run = train(folder / "run", rows, **given)
    found, own = run.metrics(), outcome(None, model, run)
    last, wanted = own["loss"], beside["loss"]
    skipped, undone = caught_in(found)
    poisoned = [str(path) for path in checkpoint.listed(run.checkpoints) if not finite(path)]
    late = chosen["save_every"] if kind == "moment Inf" else 1  # no step reads all moments; a save does
    on_time = all(
        any(step <= when <= step + 1 for when in skipped) or any(step - 1 <= when <= step + late for when in undone)
        for step in struck
    )
    ok = on_time and not poisoned and abs(last - wanted) <= 0.01 * wanted
    return {"ok": ok, "kind": kind, "spec": spec, "struck": sorted(struck), "caught": sorted(skipped | undone),
            "poisoned": poisoned, "loss": last, "clean": wanted, "had": clean[spec]["loss"],
            "same": own == beside}  # fmt: skip


def outcome(_: Any, model: Any, run: Run) -> dict[str, Any]:
    """What a run came to: its last validation loss, the loss of every step that was applied, and its weights."""
    lines = run.metrics()
    steps = [line["loss"] for line in lines if "loss" in line and "skipped" not in line]
    return {"loss": lines[-1]["validation"]["loss"], "steps": steps, "weights": weights_hash(model)}


@contextmanager
def without(rows: set[str]) -> Iterator[None]:
    """Inside the block no step of a run has ``rows``; all else is drawn as if it had."""
    start = recovery.start

    def begun(trainer: loop.Trainer, *rest: Any) -> None:
        start(trainer, *rest)
        trainer.course.left_out = rows

    recovery.start = begun
    try:
        yield
    finally:
        recovery.start = start


def caught_in(lines: list[dict[str, Any]]) -> tuple[set[int], set[int]]:
    """Steps that were skipped, and those after which the run went back: what struck the step that had begun then is
    gone with all else."""
    skipped = {line["step"] for line in lines if isinstance(line.get("skipped"), str)}
    returns = [line for line in lines if "returned_from" in line]
    skipped |= {entry["step"] for line in returns for entry in line["skipped"]}
    return skipped, {line["returned_from"] for line in returns}


def finite(path: Path) -> bool:
    """Whether every number of a checkpoint's weights and moments is finite."""
    files = [file for file in path.glob("*.safetensors") if file.stem != "random"]
    tensors = [tensor for file in files for tensor in load_file(file).values() if tensor.is_floating_point()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@contextmanager
def faults(kind: str, at: set[int], bad: set[str], draw: random.Random) -> Iterator[set[int]]:
    """Inside the block the steps ``at`` are struck once each (rows called ``bad``: whenever they are computed); yields
    the steps that were."""
    struck: set[int] = set()
    backward, loss_of = loop.Trainer.backward, loop.Trainer.loss

    def struck_backward(self: loop.Trainer, batches: Any, trained_tokens: int) -> Tensor:
        strikes = kind != "bad rows" and self.step in at - struck
        if strikes:
            struck.add(self.step)
            before(self, kind, draw)
        total = backward(self, batches, trained_tokens)
        return after(self, kind, total, draw) if strikes else total

    def struck_loss(self: loop.Trainer, examples: Any) -> Tensor:
        total = loss_of(self, examples)
        hit = bool(bad & {example.id for example in examples})
        if hit and len(examples) > 1:  # not where a row is tried by itself
            struck.add(self.step)
        return total * math.nan if hit else total

    loop.Trainer.backward, loop.Trainer.loss = struck_backward, struck_loss  # type: ignore[method-assign]
    try:
        yield struck
    finally:
        loop.Trainer.backward, loop.Trainer.loss = backward, loss_of  # type: ignore[method-assign]


def before(trainer: loop.Trainer, kind: str, draw: random.Random) -> None:
    """Faults of memory, which are there before a step."""
    parameter = draw.choice(list(trainer.parts.parameters.values()))
    if kind == "weight NaN":
        parameter.data.view(-1)[draw.randrange(parameter.numel())] = math.nan
    if kind == "moment Inf":
        trainer.optimizer.state[parameter]["exp_avg"].view(-1)[0] = math.inf


def after(trainer: loop.Trainer, kind: str, total: Tensor, draw: random.Random) -> Tensor:
    """Faults of a step: of its loss, and with it its gradient, or of the gradient alone."""
    what, _, how = kind.partition(" ")
    by = {"NaN": math.nan, "Inf": math.inf, "spike": 1e3 if what == "loss" else 1e5}[how]
    gradients = [parameter.grad for parameter in trainer.parts.parameters.values() if parameter.grad is not None]
    if what in ("loss", "gradient"):
        for gradient in gradients if what == "loss" or how == "spike" else [draw.choice(gradients)]:
            gradient.mul_(by)
    return total * by if what == "loss" else total


if __name__ == "__main__":
    sys.exit(bool(soak("nan", trial, prepare, count=350)))
