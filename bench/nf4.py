"""A base of Qwen2.5-0.5B's shape with random weights, in bfloat16 and in nf4 with double quantisation: bytes, and CPU
time, which other programs disturb least, of a token generated and of a LoRA step on each, in turn.

OMP_NUM_THREADS=1 python bench/nf4.py              # all 24 blocks
OMP_NUM_THREADS=1 python bench/nf4.py 4            # fewer, with a vocabulary that is smaller in proportion
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch

from weitiao.generate.engine import generate
from weitiao.generate.sample import SampleOptions
from weitiao.methods import METHODS
from weitiao.methods.base import computing
from weitiao.models.block import fused
from weitiao.models.load import ModelOptions, load
from weitiao.models.quantized import quantize, quantized
from weitiao.train.logps import token_logps

SHAPE: dict[str, Any] = {
    **{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896},
    **{"intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
    **{"max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
}
PROMPT, ANSWER, RUNS = 32, 32, 5
ROWS, TOKENS = 1, 256


def token_seconds(found: Any) -> float:
    """Of one answer, prompt included."""
    prompt = torch.randint(1000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    started = time.process_time()
    generate(found, [prompt], SampleOptions(max_new_tokens=ANSWER), stop_ids=[], pad_id=0)
    return (time.process_time() - started) / ANSWER


def step_seconds(found: Any) -> float:
    """Forward and backward of LoRA, as training runs them."""
    ids = torch.randint(1000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    started = time.process_time()
    with computing(found), fused(found):
        loss = -token_logps(found, ids, None, mask).mean()
    loss.backward()
    return time.process_time() - started


def compared(name: str, measure: Callable[[Any], float], models: Mapping[str, Any]) -> None:
    """Medians of runs that take turns, after one that is not counted."""
    times = [[measure(one) for one in models.values()] for _ in range(RUNS + 1)][1:]
    whole, nf4 = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    print(f"{name}: {whole:.1f} ms on bfloat16, {nf4:.1f} ms on nf4, {whole / nf4:.2f} times the speed", flush=True)


def main(blocks: int) -> None:
    """Bytes, tokens and steps."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    part = blocks / SHAPE["num_hidden_layers"]
    shape = SHAPE | {"num_hidden_layers": blocks, "vocab_size": round(SHAPE["vocab_size"] * part)}
    plain: Any = load(ModelOptions.model_validate({"config": shape, "dtype": "bfloat16"}))
    models = {"bfloat16": plain, "nf4": quantize(deepcopy(plain), "nf4", double=True)}
    codes = quantized(models["nf4"])
    size = sum(2 * layer.in_features * layer.out_features for layer in codes)
    held = {kind: sum(tensor.nbytes for tensor in (*one.parameters(), *one.buffers())) for kind, one in models.items()}
    print(f"linears in codes: {sum(layer.bytes() for layer in codes) / size:.3f} of bfloat16's bytes")
    print(f"all weights:      {held['nf4'] / held['bfloat16']:.3f} of bfloat16's bytes", flush=True)
    compared("a token", token_seconds, models)
    tuned = {kind: METHODS["lora"].model_validate({"rank": 8}).attach(one).train() for kind, one in models.items()}
    compared(f"a LoRA step of {ROWS} x {TOKENS} tokens", step_seconds, tuned)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SHAPE["num_hidden_layers"])
