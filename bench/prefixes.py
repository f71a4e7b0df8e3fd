"""A LoRA step through four blocks on rows that begin alike, each computing what they have in common, and one for all.

python bench/prefixes.py

``limit`` is the ratio of the tokens, which the products follow; of attention only the part within what is in common is
saved, since every row still looks back at it. Times are the process's own on the processor, other work left out.
"""

from __future__ import annotations

import statistics
import time

import torch
from block import SHAPES, model_of

from weitiao.methods.base import computing
from weitiao.models import modules
from weitiao.models.block import Sharing, fused
from weitiao.models.prefixes import OPTION, Layout

SHAPE, COMMON, RUNS = "SmolLM2-135M", 300, 3
CASES = ((2, 230), (4, 230), (8, 230), (8, 120))


def seconds(model: torch.nn.Module, ids: torch.Tensor, sharing: Sharing) -> float:
    """One forward and backward pass of the blocks."""
    layout = {OPTION: Layout.of(ids, torch.full((len(ids),), ids.shape[1]))}
    started = time.process_time()
    with fused(model, sharing=sharing), computing(model):
        modules.backbone(model)(input_ids=ids, use_cache=False, **layout).last_hidden_state.sum().backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - started


def main() -> None:
    """Medians, as a table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| shape | rows | tokens in common + own | each, ms | once, ms | ratio | limit |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    model = model_of(SHAPES[SHAPE], "lora")
    for rows, own in CASES:
        ids = torch.randint(0, 1024, (rows, COMMON + own))
        ids[:, :COMMON], ids[:, COMMON] = ids[0, :COMMON], torch.arange(rows)
        found = [[seconds(model, ids, sharing) for sharing in ("off", "on")] for _ in range(RUNS + 1)][1:]
        each, once = (1000 * statistics.median(times) for times in zip(*found, strict=True))
        limit = rows * (COMMON + own) / (COMMON + rows * own)
        sizes = f"| {SHAPE} | {rows} | {COMMON} + {own} | {each:,.0f} | {once:,.0f} |"
        print(f"{sizes} {each / once:.2f} | {limit:.2f} |", flush=True)


if __name__ == "__main__":
    main()
