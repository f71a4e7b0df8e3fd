"""The tiny runs that the soaks hit: every task, method and optimiser, with and without dropout, accumulation, packing,
paged state, codes, activations computed twice and a second thread, over more than one epoch.

go(SPECS[3], folder)                    # {"losses": [...], "weights": "9f…", "seconds": …}
go(SPECS[3], folder, resume=True)       # goes on where it was stopped
go(built(SPECS[3]), folder)             # with a model that is there already, once in a process
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.train.support import losses, method_of, rows, train, weights_hash
from weitiao.data.batch import Example
from weitiao.models import heads, tiny
from weitiao.models.quantized import quantize
from weitiao.runs import is_run

FULL, LORA = {"name": "full"}, {"name": "lora", "rank": 4, "dropout": 0.3}
PACKED = {"name": "pretrain", "pack_tokens": 12}
CLASSIFY = {"name": "classify"}
ROWS = 10

# ``base``: how the model is held that the method is put on; ``threads`` beside which all else computes with one. A run
# has no workers that load rows: the loop's own process makes its batches.
SPECS: list[dict[str, Any]] = [
    {"method": FULL, "options": {"epochs": 3, "save_every": 2}},
    {"method": LORA, "options": {"epochs": 3, "save_every": "epoch"}},
    {"method": FULL, "options": {"save_every": 1, "micro_batch_tokens": 30, "keep": 1}},
    {"method": LORA, "options": {"micro_batch_tokens": 40, "save_every": 3, "epochs": 2.5}, "threads": 2},
    {"method": FULL, "task": PACKED, "options": {"save_every": 3}},
    {"method": LORA, "task": PACKED, "options": {"save_every": 2, "micro_batch_tokens": 24, "optimizer": "sgd"}},
    {"method": LORA, "task": {"name": "pretrain"}, "options": {"save_every": 3, "micro_batch_tokens": 40}},
    {"method": FULL, "task": CLASSIFY, "labels": "single", "options": {"save_every": 2}, "threads": 2},
    {"method": LORA, "task": CLASSIFY, "labels": "multi", "options": {"save_every": 2, "micro_batch_tokens": 40}},
    {"method": {"name": "head"}, "task": CLASSIFY, "labels": "regression", "options": {"save_every": 3, "epochs": 3}},
    {"method": {"name": "adalora", "dropout": 0.1}, "options": {"epochs": 3, "save_every": 2}},
    {"method": FULL, "options": {"optimizer": "adamw8bit", "save_every": 2, "paged_optimizer": True}},
    {"method": FULL, "base": "bfloat16", "options": {"optimizer": "muon", "save_every": 2}},
    {"method": FULL, "options": {"optimizer": "adafactor", "save_every": 2, "memory": "low"}, "threads": 2},
    {"method": {"name": "prefix_tuning"}, "options": {"optimizer": "lion", "save_every": 2}},
    {"method": {"name": "prompt_tuning", "tokens": 3}, "options": {"save_every": 2, "micro_batch_tokens": 60}},
    {"method": {"name": "p_tuning", "tokens": 3}, "options": {"save_every": 3, "epochs": 2.5}},
    {"method": {"name": "freeze", "blocks": 1}, "options": {"epochs": 3, "save_every": 2}},
    {"method": {"name": "expand", "blocks": 1}, "options": {"save_every": 2, "micro_batch_tokens": 40}},
    {"method": {"name": "adapter"}, "options": {"save_every": 2, "epochs": 3}},
    {"method": {**LORA, "initialize": "pissa"}, "options": {"save_every": 2}},
    {"method": {**LORA, "dora": True}, "base": "nf4", "options": {"save_every": 2, "micro_batch_tokens": 60}},
    {"method": {"name": "peft", "kind": "IA3"}, "base": "nf4", "options": {"save_every": 3, "paged_optimizer": True}},
]


def built(spec: dict[str, Any]) -> dict[str, Any]:
    """``spec`` with its model, to which its method is attached."""
    method = method_of(spec["method"])
    torch.manual_seed(0)
    model = method.attach(base(spec))
    for module in model.modules() if getattr(method, "dropout", 0.0) else ():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2  # type: ignore[assignment]
    return spec | {"built": (model, method)}


def go(spec: dict[str, Any], folder: Path, resume: bool = False, **more: Any) -> dict[str, Any]:
    """Train as ``spec`` says: losses, a hash of the final weights, and seconds of this thread on the processor."""
    torch.set_num_threads(spec.get("threads", 1))
    given = {"task": spec.get("task", {}), "options": spec["options"], "validation": examples(spec, 3, 5)}
    given |= {"model": spec.get("built") or built(spec)["built"], "resume": resume and is_run(folder)}
    _, tuned, run = train(folder, examples(spec, ROWS), spec["method"], **given | more)
    return {"losses": losses(run), "weights": weights_hash(tuned), "seconds": time.thread_time()}


def base(spec: dict[str, Any]) -> Any:
    """The model of ``spec`` before the method is put on it."""
    model = tiny.make("llama")
    if kind := spec.get("labels"):
        from transformers import AutoModelForSequenceClassification

        head = heads.Head(("number",) if kind == "regression" else ("bad", "so-so", "good"), kind)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(heads.put_on(model.config, head))
        model.config.pad_token_id = 0
    held = spec.get("base", "float32")
    if held == "nf4":
        return quantize(model, "nf4", double=True)
    model = model.to(getattr(torch, held))
    model.config.dtype = getattr(torch, held)
    return model


def examples(spec: dict[str, Any], count: int, seed: int = 0) -> list[Example]:
    """Rows as the task of ``spec`` has them."""
    found, kind = rows(count, seed), spec.get("labels")
    draw = np.random.default_rng(seed)
    if spec.get("task", {}).get("name") == "pretrain":
        return [Example(row.ids, np.ones(len(row), bool), row.id) for row in found]
    if not kind:
        return found
    labels: dict[str, Any] = {
        "single": lambda: np.array(draw.integers(3)),
        "multi": lambda: draw.integers(0, 2, 3).astype(np.float32),
        "regression": lambda: np.array(draw.random(), np.float32),
    }
    return [Example(row.ids, np.arange(len(row)) == len(row) - 1, row.id, labels[kind]()) for row in found]


def interval(spec: dict[str, Any]) -> int:
    """Steps between two saves: 10 rows, 4 a step, make 3 steps of an epoch."""
    every = spec["options"].get("save_every", "epoch")
    return 3 if every == "epoch" else int(every)
