"""Forward and backward of causal attention in bfloat16: torch's kernel and ours in turn, medians, on this machine.

python bench/attention.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.nn.functional import scaled_dot_product_attention

from weitiao.models.attention import forward

SHAPES = ((32, 4, 128, 64), (16, 4, 256, 64), (8, 4, 480, 64), (4, 4, 960, 64), (1, 9, 1024, 64), (2, 14, 2048, 64))
RUNS = 9


def seconds(run: Callable[[], torch.Tensor], weight: torch.Tensor) -> float:
    """One forward and backward."""
    started = time.perf_counter()
    run().backward(weight)
    return time.perf_counter() - started


def main() -> None:
    """A line for every shape: rows, heads, tokens, width of a head; milliseconds of both; how many times faster."""
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("rows heads tokens width   torch ms   ours ms   ratio")
    for shape in SHAPES:
        q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
        weight = torch.randn(shape).bfloat16()
        runs = {
            "torch": lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True),
            "ours": lambda q=q, k=k, v=v: forward(module, q, k, v, None)[0].transpose(1, 2),
        }
        took: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(RUNS + 2):
            for name, run in runs.items():
                took[name].append(seconds(run, weight))
        torch_ms, ours_ms = (1e3 * statistics.median(times[2:]) for times in took.values())
        print(f"{' '.join(f'{size:5d}' for size in shape)} {torch_ms:10.1f} {ours_ms:9.1f} {torch_ms / ours_ms:7.2f}")


if __name__ == "__main__":
    main()
