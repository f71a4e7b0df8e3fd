"""A base of Qwen2.5-0.5B's shape with random weights, in bfloat16 and in nf4 with double quantisation: bytes, tokens
generated a second by each in turn, and the time of a LoRA step on each.

python bench/nf4.py
"""

from __future__ import annotations

import statistics
import time
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

SHAPE = {
    **{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896},
    **{"intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
    **{"max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
}
PROMPT, ANSWER, RUNS = 64, 48, 5
ROWS, TOKENS = 2, 256


def tokens_per_second(found: Any) -> float:
    """Of one answer, prompt included."""
    prompt = torch.randint(1000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    started = time.perf_counter()
    generate(found, [prompt], SampleOptions(max_new_tokens=ANSWER), stop_ids=[], pad_id=0)
    return ANSWER / (time.perf_counter() - started)


def step_seconds(found: Any) -> float:
    """Forward and backward of LoRA, as training runs them."""
    ids = torch.randint(1000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    started = time.perf_counter()
    with computing(found), fused(found):
        loss = -token_logps(found, ids, None, mask).mean()
    loss.backward()
    return time.perf_counter() - started


def main() -> None:
    """Bytes, then medians of runs that take turns."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    plain: Any = load(ModelOptions.model_validate({"config": SHAPE, "dtype": "bfloat16"}))
    models = {"bfloat16": plain, "nf4": quantize(deepcopy(plain), "nf4", double=True)}
    codes = quantized(models["nf4"])
    size = sum(2 * layer.in_features * layer.out_features for layer in codes)
    held = {kind: sum(tensor.nbytes for tensor in (*one.parameters(), *one.buffers())) for kind, one in models.items()}
    print(f"linears in codes: {sum(layer.bytes() for layer in codes) / size:.3f} of bfloat16's bytes")
    print(f"all weights:      {held['nf4'] / held['bfloat16']:.3f} of bfloat16's bytes")
    speeds: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(RUNS + 1):
        for kind, one in models.items():
            speeds[kind].append(tokens_per_second(one))
    whole, nf4 = (statistics.median(speeds[kind][1:]) for kind in models)
    print(f"decoding: {whole:.1f} tokens/s from bfloat16, {nf4:.1f} from nf4, {nf4 / whole:.2f} of it", flush=True)
    tuned = {kind: METHODS["lora"](rank=8).attach(one).train() for kind, one in models.items()}
    steps: dict[str, list[float]] = {kind: [] for kind in tuned}
    for _ in range(RUNS):
        for kind, one in tuned.items():
            steps[kind].append(step_seconds(one))
    whole, nf4 = (statistics.median(steps[kind][1:]) for kind in models)
    print(f"LoRA step of {ROWS} x {TOKENS} tokens: {whole:.2f} s on bfloat16, {nf4:.2f} s on nf4")


if __name__ == "__main__":
    main()
