"""What tests run in several processes: ``torchrun --nproc-per-node N -m tests.train.several FOLDER CASE …``.

Each case is a training run of the same few rows, which the test itself runs in one process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.train.support import model_with, rows
from weitiao.errors import Interrupted
from weitiao.machine.ranks import Ranks, joined
from weitiao.methods.base import trainable
from weitiao.runs import Run, Watched
from weitiao.train import many
from weitiao.train.loop import fit
from weitiao.train.options import TrainOptions
from weitiao.train.rehearsal import rehearse
from weitiao.train.tasks import Task, TaskOptions

FULL, LORA = {"name": "full"}, {"name": "lora", "rank": 4}
PLAIN = {"engine": "plain"}
ROWS = 45  # the last step of an epoch has three: of three processes one each, of two processes one has more


def options(**more: Any) -> TrainOptions:
    """Epsilon is large: where a gradient is next to nothing, AdamW's step would be the sign of its rounding."""
    values = {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, "warmup_steps": 2, "epsilon": 1e-5, "keep": 9}
    return TrainOptions.model_validate(
        {**values, "micro_batch_tokens": 24, "evaluate_every": 4, "best": "drawn", **more}
    )


def broken_once(task: Task, ranks: Ranks) -> Task:
    """The task with a loss that is no number in the last process's seventh micro-batch, and only there."""
    calls = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return task.loss(outputs, targets) * (torch.nan if sum(calls) == 7 and ranks.rank == ranks.size - 1 else 1.0)

    return replace(task, loss=loss)


@torch.no_grad()
def measures(model: torch.nn.Module) -> dict[str, float]:
    """Of the model itself, as any evaluator calls it; and a number that is the same in both evaluations, so that the
    first is the best."""
    logits = model(input_ids=torch.arange(5, 15)[None]).logits
    return {"drawn": torch.rand(1).item(), "logit": logits.float().square().mean().item()}


def run(
    folder: Path,
    ranks: Ranks,
    method: Mapping[str, Any],
    *,
    stop_at: int = 0,
    breaks: bool = False,
    resume: bool = False,
    dtype: str = "float32",
    **more: Any,
) -> None:
    """Train; a process other than the first is asked to stop at step ``stop_at``. The weights go to weights.pt."""
    chosen, task = options(**more), TaskOptions().build()
    task = broken_once(task, ranks) if breaks else task
    train = rows(ROWS)
    model, attached = model_with(method, dtype=dtype)
    group = many.of(ranks, model, task, chosen, train)
    if not breaks:
        rehearse(model, attached, task, train, chosen, 0, processes=group)
    if ranks.first and not resume:
        Run.create(folder, {"method": dict(method)})
    ranks.told(lambda: None)

    def progress(record: Mapping[str, Any], _: int) -> None:
        if record["step"] == stop_at and ranks.rank == ranks.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with suppress(Interrupted):
        fit(
            model, attached, task, train, chosen, run=(Run if ranks.first else Watched)(folder), progress=progress,
            validation=rows(7, seed=3), evaluators={"own": measures},
            resume=resume, processes=group,
        )  # fmt: skip
    group.make_whole(model)
    if ranks.first:
        torch.save({name: tensor.detach() for name, tensor in trainable(model).items()}, folder / "weights.pt")


CASES: dict[str, dict[str, Any]] = {
    "full-ddp": {"method": FULL, "distributed": "ddp"},
    "lora-ddp": {"method": LORA, "distributed": "ddp"},
    "broken-ddp": {"method": LORA, "distributed": "ddp", "breaks": True},
    "full-fsdp2": {"method": FULL, "distributed": "fsdp2"},
    "lora-fsdp2": {"method": LORA, "distributed": "fsdp2"},
    "full-fsdp2-bf16": {"method": FULL, "distributed": "fsdp2", "dtype": "bfloat16"},
    "lora-fsdp2-bf16": {"method": LORA, "distributed": "fsdp2", "dtype": "bfloat16"},
    "stopped-fsdp2": {"method": FULL, "distributed": "fsdp2", "stop_at": 2},
    "dropout-ddp": {"method": {**LORA, "dropout": 0.2}, "distributed": "ddp"},
    "stopped-dropout-ddp": {"method": {**LORA, "dropout": 0.2}, "distributed": "ddp", "stop_at": 2},
    "again-dropout-ddp": {"method": {**LORA, "dropout": 0.2}, "distributed": "ddp", "resume": True},
    "again-fsdp2": {"method": FULL, "distributed": "fsdp2", "resume": True},
    "again-ddp": {"method": FULL, "distributed": "ddp", "resume": True},
}


if __name__ == "__main__":
    with joined(120) as ranks:
        for word in sys.argv[2:]:
            case, _, name = word.partition("=")  # CASE=FOLDER goes on in a folder that is there
            run(Path(sys.argv[1]) / (name or case), ranks, **CASES[case])
    print(json.dumps({"done": sys.argv[2:]}))
