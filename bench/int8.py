"""A LoRA step through four blocks whose frozen weights are bfloat16, and the same in int8 codes, in turn.

python bench/int8.py

Two of the numbers are of precision: how far the int8 blocks' output, and the gradients at the adapters, are from those
of the same weights in bfloat16 (the norm of the difference over the norm), with random weights and inputs. Times are
the process's own on the processor, other work left out: with one thread (``OMP_NUM_THREADS=1``) a busy machine gives
the ratio of a quiet one.
"""

from __future__ import annotations

import statistics
import time

import torch
from block import SHAPES, model_of, seconds

from weitiao import machine
from weitiao.methods import METHODS
from weitiao.methods.base import computing
from weitiao.models import modules
from weitiao.models.block import fused
from weitiao.models.quantized import quantize

BATCHES, RUNS = ((8, 128), (2, 512)), 3


def outputs(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states, and the adapters' gradients of their product with fixed random numbers."""
    weight = torch.randn(*ids.shape, 1, generator=torch.Generator().manual_seed(1))
    with fused(model), computing(model):
        hidden = modules.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        (hidden.float() * weight).sum().backward()
    slopes = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_A" in name])  # type: ignore[union-attr]
    model.zero_grad(set_to_none=True)
    return [hidden.detach().float(), slopes]


def main() -> None:
    """Medians, as a table."""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {machine.gemm_gflops('bfloat16'):.0f} GFLOP/s"
    )
    print("| shape | rows x tokens | bfloat16, tokens/s | int8, tokens/s | ratio | output apart | gradients apart |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for shape in ("SmolLM2-135M", "Qwen2.5-0.5B"):
        sizes = SHAPES[shape]
        models = []
        for kind in (None, "int8"):
            torch.manual_seed(0)
            base = model_of(sizes, "full")
            base = base if kind is None else quantize(base, kind)
            torch.manual_seed(0)
            models.append(METHODS["lora"]().attach(base).train())
            for name, parameter in models[-1].named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, 0, 0.02)
        for rows, length in BATCHES:
            ids = torch.randint(0, 1024, (rows, length))
            found = [[seconds(model, ids, True, time.process_time) for model in models] for _ in range(RUNS + 1)][1:]
            plain, codes = (rows * length / statistics.median(times) for times in zip(*found, strict=True))
            ratio = statistics.median(one / other for one, other in found)
            apart = [
                ((theirs - ours).norm() / theirs.norm()).item()
                for theirs, ours in zip(*(outputs(model, ids) for model in models), strict=True)
            ]
            print(f"| {shape} | {rows} x {length:,} | {plain:,.0f} | {codes:,.0f} | {ratio:.2f} |", end="")
            print("".join(f" {one:.4f} |" for one in apart), flush=True)


if __name__ == "__main__":
    main()
