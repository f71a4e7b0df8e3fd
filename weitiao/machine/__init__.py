"""The machine as it is: processor, memory and disk within the limits of its container, GPUs, measured speed, versions.

machine.memory().available_bytes        # what this process may still take, cgroup limits included
machine.best_dtype()                    # "bfloat16" where the processor multiplies it faster, else "float32"
machine.clashes()                       # installed packages that are known not to work together, and what to do
"""

from weitiao.machine.clock import awake_seconds
from weitiao.machine.env import environment
from weitiao.machine.hardware import (
    Cpu,
    Disk,
    Gpu,
    Memory,
    cpu,
    device,
    disk,
    give_back,
    gpus,
    in_memory,
    memory,
    usable_cores,
    why_no_gpu,
)
from weitiao.machine.lock import Lock
from weitiao.machine.packages import Clash, clashes, versions
from weitiao.machine.speed import DTYPES, bandwidth, best_dtype, gemm_gflops, measured_gemm

__all__ = [
    "DTYPES",
    "Clash",
    "Cpu",
    "Disk",
    "Gpu",
    "Lock",
    "Memory",
    "awake_seconds",
    "bandwidth",
    "best_dtype",
    "clashes",
    "cpu",
    "device",
    "disk",
    "environment",
    "gemm_gflops",
    "give_back",
    "gpus",
    "in_memory",
    "measured_gemm",
    "memory",
    "usable_cores",
    "versions",
    "why_no_gpu",
]
