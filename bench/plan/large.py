"""What it takes to go through a step of large models: `python bench/plan/large.py`; no weight is read or made."""

from __future__ import annotations

import time

import numpy as np
import psutil

from weitiao.data.batch import Example
from weitiao.methods import METHODS
from weitiao.models import shape
from weitiao.plan import trace
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import TaskOptions

LLAMA = {"model_type": "llama", "num_hidden_layers": 80, "vocab_size": 128256, "hidden_size": 8192}
LLAMA |= {"intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
MIXTRAL = {"model_type": "mixtral", "num_hidden_layers": 56, "vocab_size": 32768, "hidden_size": 6144}
MIXTRAL |= {"intermediate_size": 16384, "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8}
QWEN = {"model_type": "qwen2", "num_hidden_layers": 24, "vocab_size": 151936, "hidden_size": 896}
QWEN |= {"intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
MODELS = {"Llama 70B": LLAMA, "Mixtral 8x22B": MIXTRAL, "Qwen2 0.5B": QWEN}

rows = [Example(np.arange(512, dtype=np.int32), np.ones(512, bool), str(row)) for row in range(4)]
task = TaskOptions(name="pretrain").build()
for name, values in MODELS.items():
    for method in ("lora", "full"):
        started, found = time.process_time(), shape.read(values)
        step = trace.step(found, METHODS[method](), task, TrainOptions(), [rows], "bfloat16")
        took, held = time.process_time() - started, psutil.Process().memory_info().rss
        print(f"{name}, {method}: {step.peak_bytes >> 20} MiB over the weights; {took:.2f} s, {held >> 20} MiB held")
