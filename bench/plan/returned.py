"""What a step costs where freed memory goes back to the system: `python bench/plan/returned.py`. Processor seconds of
the same steps in turn, with memory kept and given back, one thread; and how far the process grows over its start."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from weitiao.data.batch import Example
from weitiao.methods import METHODS
from weitiao.models import tiny
from weitiao.models.load import attention
from weitiao.runs import Run
from weitiao.train import memory, modes
from weitiao.train.loop import Trainer
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import TaskOptions

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 4096}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
CASES = {"llama": torch.bfloat16, "gemma": torch.float32}  # in one piece, by transformers' modules
ROWS, LENGTH, STEPS, TURNS = 8, 256, 4, 3
task = TaskOptions(name="pretrain").build()


def trainer(family: str, dtype: torch.dtype) -> Any:
    """A model under LoRA with rows of many lengths."""
    model: Any = tiny.make(family, **SIZES).to(dtype)
    model.config.dtype = dtype
    model.set_attn_implementation(attention(model.config))
    random = np.random.default_rng(0)
    lengths = random.integers(LENGTH // 2, LENGTH, ROWS * STEPS * TURNS * 2)
    rows = [
        Example(random.integers(5, 300, n).astype(np.int32), np.ones(n, bool), str(k)) for k, n in enumerate(lengths)
    ]
    options = TrainOptions(batch_size=ROWS, micro_batch_tokens=ROWS * LENGTH)
    method = METHODS["lora"]()
    model = method.attach(model)
    return Trainer(model, method, task, options, Run("."), modes.course(model, method, task, rows, options), 0, None)


def resident(name: str) -> int:
    """MiB, by the kernel's word for them."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) >> 10 if found else 0


torch.set_num_threads(1)
for family, dtype in CASES.items():
    state = trainer(family, dtype)
    seconds: dict[str, list[float]] = {"kept": [], "given back": []}
    grown = dict.fromkeys(seconds, 0)
    number = 0
    for turn in range(TURNS):
        for name, sizes in (("kept", memory.KEPT), ("given back", memory.LEAN)):
            with modes.engine(state.model, state.options, state.course), memory.held(sizes is memory.LEAN):
                state.model.train()
                Path("/proc/self/clear_refs").write_text("5")  # the highest size begins anew
                before = resident("VmRSS")
                for _ in range(STEPS):
                    number += 1
                    used = resource.getrusage(resource.RUSAGE_SELF)
                    state.gradient(state.course.micro_batches(number))
                    state.optimizer.step()
                    now = resource.getrusage(resource.RUSAGE_SELF)
                    seconds[name].append(now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime)
                grown[name] = max(grown[name], resident("VmHWM") - before) if turn else 0
    for name, taken in seconds.items():
        print(f"{family}, {name}: {median(taken):.3f} s of processor a step, at most {grown[name]} MiB over the start")
