"""The tables of docs/*/several.md: what a step sends and how much of the time is computing, derived, not measured.

    python docs/scaling.py

A test compares them with the pages. Times are of the usual model: a message of V bytes that goes round a ring of N
takes N - 1 turns of V / N bytes, each with a latency of its own; a tree's latency grows with log2 N.
"""

from __future__ import annotations

import math

PARAMETERS, BLOCKS, ADAPTERS = 7e9, 32, 20e6  # a 7B model, and LoRA of rank 8 on all its linears
TENSORS = 7 * BLOCKS  # messages of full tuning by ddp: most weights are larger than a bucket
FLOPS = 400e12  # of a GPU: an H100's 989e12 in bfloat16, of which large products reach two fifths
LATENCY = 10e-6
MICRO_BATCH = 4096  # tokens
STEP = 524_288  # tokens of a step, of all GPUs together
METHODS = ("full, ddp", "full, fsdp2", "LoRA, ddp", "LoRA, fsdp2")
MACHINE = 350e9  # bytes a second round a ring within a machine of 8 GPUs (NVLink, 450e9 at most)
NETWORKS = {"8 × 400 Gbit/s": 300e9, "1 × 100 Gbit/s": 10e9}  # of a machine, a quarter less than the lines' own rate


def memory(method: str, gpus: int) -> float:
    """Bytes of weights, gradients and AdamW's state in each GPU, without activations: 16 for a number that trains."""
    trained = PARAMETERS if method.startswith("full") else ADAPTERS
    frozen = 0.0 if method.startswith("full") else 2 * PARAMETERS
    whole = 16 * trained + frozen
    return whole if method.endswith("ddp") else whole / gpus + 2 * 2 * PARAMETERS / BLOCKS  # and two blocks at once


def sent(method: str, micro_batches: int) -> float:
    """Bytes that a GPU sends in a step, by a factor (N - 1) / N: an all-reduce is twice its message."""
    trained = PARAMETERS if method.startswith("full") else ADAPTERS
    if method.endswith("ddp"):
        return 2 * 4 * trained
    return micro_batches * (2 * 2 * PARAMETERS + 4 * trained)


def ring(size: float, gpus: int, rate: float) -> float:
    """Seconds of an all-gather or a reduce-scatter of ``size`` bytes."""
    return (gpus - 1) * (size / gpus / rate + LATENCY)


def efficiency(method: str, gpus: int, rate: float, tokens: int) -> float:
    """Share of a step's time that is computing, at so many ``tokens`` a GPU."""
    full = method.startswith("full")
    trained = PARAMETERS if full else ADAPTERS
    forward, backward = (share * PARAMETERS * tokens / FLOPS for share in (2, 4 if full else 2))
    if method.endswith("ddp"):
        turns = 2 * math.log2(gpus) * LATENCY * (TENSORS if full else 3)
        waiting = 2 * (gpus - 1) / gpus * 4 * trained / rate + turns
        return (forward + backward) / (forward + backward + waiting)
    passes = math.ceil(tokens / MICRO_BATCH)
    gather = BLOCKS * ring(2 * PARAMETERS / BLOCKS, gpus, rate)
    scatter = BLOCKS * ring(4 * trained / BLOCKS, gpus, rate)
    taken = max(forward, passes * gather) + max(backward, passes * (gather + scatter))
    return (forward + backward) / taken


def volumes() -> list[str]:
    """Method, memory on 8 and on 64 GPUs, what is sent with one micro-batch and with four."""
    return [
        f"| {method} | {memory(method, 8) / 1e9:.0f} GB | {memory(method, 64) / 1e9:.0f} GB "
        f"| {sent(method, 1) / 1e9:.3g} GB | {sent(method, 4) / 1e9:.3g} GB |"
        for method in METHODS
    ]


def shares() -> list[str]:
    """Method and network, and the share of computing on 8, 64 and 512 GPUs, at a fixed step and at a growing one."""
    rows = []
    for method in METHODS:
        for network, rate in NETWORKS.items():
            cells = [
                f"{efficiency(method, gpus, MACHINE if gpus == 8 else rate, tokens):.0%}"
                for tokens_of in (lambda gpus: STEP // gpus, lambda gpus: 4 * MICRO_BATCH)
                for gpus in (8, 64, 512)
                for tokens in [tokens_of(gpus)]
            ]
            rows.append(f"| {method} | {network} | " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    print("\n".join([*volumes(), *shares()]))
