"""Forward and backward through four blocks in training: transformers' modules and the block in one piece in turn.

python bench/block.py

The last column is the share of the machine's measured matrix-product rate, counting products of weights alone: frozen
ones twice a token, trained ones three times; attention and the adapters come on top.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from weitiao import machine
from weitiao.methods import METHODS
from weitiao.methods.base import computing
from weitiao.models import attention, modules
from weitiao.models.block import fused

SHAPES = {
    "weitiao-tiny-zh": (256, 704, 4, 4, 64),
    "SmolLM2-135M": (576, 1536, 9, 3, 64),
    "Qwen2.5-0.5B": (896, 4864, 14, 2, 64),
}
BATCHES, BLOCKS, RUNS = ((16, 128), (8, 256), (2, 1024)), 4, 7


def model_of(sizes: tuple[int, int, int, int, int], name: str) -> torch.nn.Module:
    """Random weights in bfloat16, with the method attached."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, inner, heads, key_heads, width = sizes
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=width,
        num_hidden_layers=BLOCKS,
        vocab_size=1024,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.register())
    return METHODS[name]().attach(model).train()


def seconds(
    model: torch.nn.Module, ids: torch.Tensor, whole: bool, clock: Callable[[], float] = time.perf_counter
) -> float:
    """One forward and backward pass of the blocks."""
    started = clock()
    with fused(model, whole), computing(model):
        hidden = modules.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        hidden.sum().backward()
    model.zero_grad(set_to_none=True)
    return clock() - started


def main() -> None:
    """Medians, as a table."""
    rate = machine.gemm_gflops("bfloat16")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, products {rate:.0f} GFLOP/s")
    print("| shape | method | rows x tokens | transformers, tokens/s | one piece, tokens/s | ratio | of the rate |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for shape, sizes in SHAPES.items():
        for name in ("lora", "full"):
            model = model_of(sizes, name)
            hidden, inner, heads, key_heads, width = sizes
            weights = BLOCKS * hidden * (2 * width * (heads + key_heads) + 3 * inner)
            for rows, length in BATCHES:
                ids = torch.randint(0, 1024, (rows, length))
                found = [[seconds(model, ids, whole) for whole in (False, True)] for _ in range(RUNS + 2)][2:]
                theirs, ours = (rows * length / statistics.median(times) for times in zip(*found, strict=True))
                share = ours * 2 * weights * (2 if name == "lora" else 3) / (rate * 1e9)
                speeds = f"{theirs:,.0f} | {ours:,.0f} | {ours / theirs:.2f} | {share:.0%}"
                print(f"| {shape} | {name} | {rows} x {length:,} | {speeds} |", flush=True)


if __name__ == "__main__":
    main()
