"""Greedy answers of a model with random weights in bfloat16: ``transformers.generate`` and ours, in turn.

python bench/generate.py

New tokens over all of the time, prompts read included; times are the process's own on the processor, other work left
out, so that with one thread (``OMP_NUM_THREADS=1``) a busy machine gives the ratio of a quiet one.
"""

from __future__ import annotations

import statistics
import time
from itertools import product

import torch

from weitiao.bench import folder
from weitiao.generate.engine import generate
from weitiao.generate.sample import SampleOptions
from weitiao.models.load import ModelOptions, load

BATCHES, PROMPT, ANSWERS, RUNS = (1, 8), 32, (16, 64), 3


def main() -> None:
    """Medians, as a table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| shape | batch | answer | transformers, tokens/s | ours, tokens/s | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    model = load(ModelOptions(path=str(folder("smollm2-135m"))))

    def theirs(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def ours(prompts: list[list[int]], tokens: int) -> None:
        generate(model, prompts, SampleOptions(max_new_tokens=tokens), stop_ids=(), pad_id=0, batch_size=len(prompts))

    for batch, tokens in product(BATCHES, ANSWERS):
        prompts = torch.randint(1000, (batch, PROMPT)).tolist()
        found: list[list[float]] = []
        for _ in range(RUNS + 1):
            found.append([])
            for way in (theirs, ours):
                started = time.process_time()
                way(prompts, tokens)
                found[-1].append(time.process_time() - started)
        one, other = (batch * tokens / statistics.median(times) for times in zip(*found[1:], strict=True))
        print(f"| SmolLM2-135M | {batch} | {tokens} | {one:,.1f} | {other:,.1f} | {other / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
