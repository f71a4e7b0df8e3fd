"""A LoRA step through four frozen blocks: its operations started one by one from Python, and in one call each way.

OMP_NUM_THREADS=1 python bench/calls.py            # or the names of some shapes

Times are the process's own on the processor. What is saved is work of one core: with several it weighs as much more.
"""

from __future__ import annotations

import statistics
import sys
import time
from unittest.mock import patch

import torch
from block import BLOCKS, SHAPES, model_of, seconds

from weitiao.models import adapted

BATCHES, RUNS = ((8, 128), (2, 1024)), 5


def main() -> None:
    """Medians, as a table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| shape | rows x tokens | one by one, ms a block | one call, ms a block | saved, ms | ratio |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for shape in sys.argv[1:] or ("SmolLM2-135M", "Qwen2.5-0.5B"):
        model = model_of(SHAPES[shape], "lora")
        for rows, length in BATCHES:
            ids = torch.randint(0, 1024, (rows, length))
            found: list[list[float]] = []
            for _ in range(RUNS + 1):
                found.append([])
                for serves in (lambda *_: False, adapted.serves):
                    with patch.object(adapted, "serves", serves):
                        found[-1].append(seconds(model, ids, True, time.process_time) / BLOCKS * 1e3)
            one, other = (statistics.median(times) for times in zip(*found[1:], strict=True))
            speeds = f"{one:.1f} | {other:.1f} | {one - other:.1f} | {one / other:.3f}"
            print(f"| {shape} | {rows} x {length:,} | {speeds} |", flush=True)


if __name__ == "__main__":
    main()
