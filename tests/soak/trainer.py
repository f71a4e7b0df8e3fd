"""transformers' Trainer under the same hits, as a measure of ours: kill -9 in time and within saves, one bit, a missing
or cut file in the newest checkpoint, and a loss that is not a number.

It is gone on with as its examples do: from ``get_last_checkpoint``, from the beginning if there is none. What a trial
came to: "same" (by itself, to the bits of the run that was left in peace), "other" (by itself, to other weights, and
nothing was said), "refused" (somebody has to remove a folder by hand).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils as modeling
from safetensors.torch import load_file
from transformers import PreTrainedConfig, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tests.soak.harness import done, ended, launch, passed, result, soak
from tests.soak.points import Hit, die
from tests.train.support import rows, weights_hash
from weitiao.data.batch import collate
from weitiao.models import tiny

KINDS = ("point", "time", "bit", "removed", "cut", "loss NaN")
SAVED = "checkpoint-8"  # the newest of a run that is damaged: four steps before its end
STEPS = 12


def go(folder: Path, **more: Any) -> dict[str, Any]:
    """Train the first spec of ours by theirs, or go on: losses, a hash of the weights, seconds."""
    torch.set_num_threads(1)
    model = tiny.make("llama", attention_dropout=0.2)
    options = {"output_dir": str(folder), "num_train_epochs": 3, "per_device_train_batch_size": 4, "save_steps": 2,
               "learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 1, "report_to": "none", "seed": 1,
               "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps"}  # fmt: skip
    trainer = Trainer(model=model, args=TrainingArguments(**options), data_collator=collated, **more)
    trainer.train_dataset = rows(14)  # type: ignore[assignment]
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=last)
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": found, "weights": weights_hash(model), "seconds": time.thread_time()}


def collated(examples: Any) -> dict[str, torch.Tensor]:
    batch = collate(examples, 0)
    labels = batch.ids.masked_fill(~batch.mask, -100)
    return {"input_ids": batch.ids, "attention_mask": batch.attention, "labels": labels}


@contextlib.contextmanager
def points(hit: Hit) -> Iterator[None]:
    """Like ours, where Trainer writes, removes and renames."""
    count = 0
    places: list[tuple[Any, str, int | None]] = [(torch, "save", 1), (modeling, "safe_save_file", 1)]
    places += [(TrainerState, "save_to_json", 1), (PreTrainedConfig, "to_json_file", 1)]
    places += [(os, name, None) for name in ("mkdir", "replace", "rename", "unlink", "rmdir")]

    def wrapped(real: Callable[..., Any], place: int | None) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            found = real(*args, **options)
            given = options.get("filename", options.get("json_path", args[place] if place and len(args) > 1 else None))
            half = (Path(given), 0) if place and isinstance(given, str | os.PathLike) else None
            hit(count, real.__name__, half)
            count += 1
            return found

        return call

    before = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, place), real in zip(places, before, strict=True):
        setattr(owner, name, wrapped(real, place))
    try:
        yield
    finally:
        for (owner, name, _), real in zip(places, before, strict=True):
            setattr(owner, name, real)


def prepare(folder: Path) -> dict[str, Any]:
    """What a run in peace comes to, the points that it passes, and its folder up to SAVED."""
    go(folder / "warm")
    found = [done(lambda o=own: go(o / "run"), own) for own in (folder / "a", folder / "b")]
    if found[0]["weights"] != found[1]["weights"]:
        raise AssertionError("two runs of Trainer differ")
    passes: list[int] = []

    def counted() -> int:
        with points(lambda number, where, half: passes.append(number)):
            go(folder / "points" / "run")
        return len(passes)

    shutil.copytree(folder / "a" / "run", folder / "saved")
    for path in (folder / "saved").glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > int(SAVED.rpartition("-")[2]):
            shutil.rmtree(path)
    return {"wanted": found[1], "points": done(counted, folder / "points"), "saved": folder / "saved"}


def trial(n: int, draw: random.Random, folder: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    """Hit one run, go on, and see what came of it."""
    kind, run = KINDS[n % len(KINDS)], folder / "run"
    line: dict[str, Any] = {"kind": kind}
    if kind == "loss NaN":
        return poisoned(draw.randint(3, STEPS - 2), folder, run)
    if kind in ("point", "time"):
        while not killed(kind, run, folder, draw, prepared):
            shutil.rmtree(run)
    else:
        shutil.copytree(prepared["saved"], run)
        hit = draw.choice([file for file in sorted((run / SAVED).iterdir()) if file.stat().st_size])
        damage(kind, hit, draw)
        line["file"] = hit.name
    code = ended(launch(lambda: go(run), folder))
    if code:
        words = (folder / "errors").read_text().strip().splitlines()
        return line | {"ok": False, "came": "refused", "why": words[-1][-200:]}
    same = result(folder)["weights"] == prepared["wanted"]["weights"]
    return line | {"ok": same, "came": "same" if same else "other"}


def killed(kind: str, run: Path, folder: Path, draw: random.Random, prepared: dict[str, Any]) -> bool:
    """Whether a run was hit before its end."""
    at = draw.randrange(prepared["points"])

    def aimed() -> Any:
        with points(lambda number, where, half: die(half, draw) if number == at and kind == "point" else None):
            return go(run)

    pid = launch(aimed, folder)
    if kind == "time":
        passed(pid, draw.random() * prepared["wanted"]["seconds"])
        os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL


def damage(kind: str, file: Path, draw: random.Random) -> None:
    """One bit flipped, the file removed, or cut."""
    data = bytearray(file.read_bytes())
    if kind == "removed":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: draw.randrange(len(data))])
    else:
        place = draw.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)


def poisoned(step: int, folder: Path, run: Path) -> dict[str, Any]:
    """The loss of one step is not a number: what is logged, what is saved."""

    class Struck(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            found: Any = super().compute_loss(*args, **options)
            return found * math.nan if self.state.global_step == step - 1 else found

    def struck() -> dict[str, Any]:
        globals()["Trainer"] = Struck
        return go(run)

    found = done(struck, folder)
    last = load_file(sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-1] / "model.safetensors")
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in last.values())
    logged = json.loads(json.dumps(found["losses"][step - 1]))
    return {
        "ok": finite and math.isnan(logged),
        "kind": "loss NaN",
        "came": "same" if finite else "NaN saved",
        "logged": logged,
    }


if __name__ == "__main__":
    sys.exit(bool(soak("trainer", trial, prepare, count=240)))
