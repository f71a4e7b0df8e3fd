"""Matrix products in bfloat16 by ``models.products`` and by torch (oneDNN), in turn.

python bench/products.py

A linear and its LoRA of rank 8, forward and at the input, for the linears of two shapes, over numbers of rows that a
micro-batch may have. The best of several runs, in 10^9 multiplications and additions a second with the weight alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from weitiao import machine
from weitiao.models import products

SHAPES = {"SmolLM2-135M": ((576, 576), (1536, 576), (576, 1536)), "Qwen2.5-0.5B": ((4864, 896), (896, 4864))}
ROWS, RANK, RUNS = (250, 1000, 2000), 8, 9


def rate(flops: float, work: Callable[[], object]) -> float:
    """The best of RUNS, after one that warms up."""
    times = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return flops / min(times[1:]) / 1e9


def main() -> None:
    """One line for each shape, linear and number of rows."""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {machine.measured_gemm('bfloat16'):.0f} GFLOP/s"
    )
    print("| shape | weight | rows | forward, torch | ours | at the input, torch | ours | ratio of both |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for shape, weights in SHAPES.items():
        for outputs, inputs in weights:
            for rows in ROWS:
                x, at = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, outputs).bfloat16()
                weight, small = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, RANK).bfloat16()
                a, b = torch.randn(RANK, inputs).bfloat16(), torch.randn(outputs, RANK).bfloat16()
                flops = 2 * rows * inputs * outputs
                found = [
                    rate(flops, lambda: torch.mm(x, weight.t()).addmm_(small, b.t())),  # noqa: B023
                    rate(flops, lambda: products.summed([(x, weight, False), (small, b, False)])),  # noqa: B023
                    rate(flops, lambda: torch.mm(at, weight).addmm_(small, a)),  # noqa: B023
                    rate(flops, lambda: products.summed([(at, weight, True), (small, a, True)])),  # noqa: B023
                ]
                ratio = (1 / found[0] + 1 / found[2]) / (1 / found[1] + 1 / found[3])
                rates = " | ".join(f"{one:.0f}" for one in found)
                print(f"| {shape} | {outputs} x {inputs} | {rows:,} | {rates} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
