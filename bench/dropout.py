"""Dropout in training on a CPU, torch's and ours in turn: one layer's forward and backward.

python bench/dropout.py
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from weitiao.train.dropout import Dropout

SHAPES, RUNS, P = ((2048, 256), (2048, 704), (4096, 896)), 30, 0.1


def milliseconds(layer: nn.Module, inputs: torch.Tensor) -> float:
    """Forward and backward."""
    started = time.perf_counter()
    layer(inputs).backward(torch.ones_like(inputs))
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Medians of runs that take turns, as a table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("| tokens | width | dtype | torch, ms | ours, ms | ratio |\n| ---: | ---: | --- | ---: | ---: | ---: |")
    for tokens, width in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
            layers = nn.Dropout(P), Dropout(P)
            found = [[milliseconds(layer, inputs) for layer in layers] for _ in range(RUNS)][3:]
            theirs, ours = (statistics.median(times) for times in zip(*found, strict=True))
            kind, ratio = str(dtype).removeprefix("torch."), theirs / ours
            print(f"| {tokens:,} | {width} | {kind} | {theirs:.2f} | {ours:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
