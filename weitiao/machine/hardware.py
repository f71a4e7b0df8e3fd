"""Processor, memory and disk within the limits of this process's container, and the GPUs that torch can use."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from weitiao.errors import t

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})  # the last is AArch64's own
SHOWN_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "bf16", "i8mm")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cpu:
    """The processor as this process may use it."""

    name: str
    architecture: str
    cores: int  # usable: affinity and cgroup quota counted
    cores_total: int
    flags: tuple[str, ...]  # those that matter for matrix products
    bf16: bool


@dataclass(frozen=True)
class Memory:
    """Memory in bytes, cgroup limits counted."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Disk:
    """A file system in bytes."""

    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: str
    bf16: bool


# ---- processor and memory --------------------------------------------------------------------------------------------


@cache
def cpu() -> Cpu:
    """The processor: its name, usable cores, and the instruction sets that decide the speed of matrix products."""
    name, flags = _proc_cpuinfo() if sys.platform == "linux" else _sysctl_cpu()
    return Cpu(
        name=name or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=usable_cores(),
        cores_total=os.cpu_count() or 1,
        flags=tuple(flag for flag in SHOWN_FLAGS if flag in flags),
        bf16=bool(flags & BF16_FLAGS),
    )


def _proc_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """Name and flags from Linux's cpuinfo (x86 says ``flags``, AArch64 ``Features`` with ``asimd`` for NEON)."""
    fields: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", ""), flags | ({"neon"} if "asimd" in flags else set())


def _sysctl_cpu() -> tuple[str, set[str]]:
    """Name and flags on macOS; on Windows only what ``platform`` knows."""
    if sys.platform != "darwin":
        return platform.processor(), set()
    name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    flags = (
        {"neon"}
        if platform.machine() == "arm64"
        else set(_output("sysctl", "-n", "machdep.cpu.features").lower().split())
    )
    if _output("sysctl", "-n", "hw.optional.arm.FEAT_BF16") == "1":
        flags.add("bf16")
    return name, flags


def _output(*command: str) -> str:
    """What a command prints, or nothing if it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut by the quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in cgroups() if (quota := _quota(folder)) is not None]
    return max(1, min([cores, *(round(quota) for quota in quotas)]))


def cgroups(root: Path = CGROUP, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """This process's cgroup folders from the innermost to the root: a limit at any level holds (v2 and v1)."""
    if not own.is_file():
        return []
    folders: list[Path] = []
    for line in own.read_text().splitlines():
        _, controllers, inner = line.split(":", 2)
        bases = (
            [root]
            if not controllers
            else [root / name for name in ("memory", "cpu", "cpu,cpuacct") if name in controllers]
        )
        for base in bases:
            path = base / inner.lstrip("/")
            while path != base and base in path.parents:
                folders.append(path)
                path = path.parent
            folders.append(base)
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _quota(folder: Path) -> float | None:
    """Cores that a cgroup folder allows, or None."""
    words = _words(folder / "cpu.max")
    if not words:
        words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _words(path: Path) -> list[str]:
    """The words in a small file; none if it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def memory() -> Memory:
    """Memory of the machine, or of the tightest cgroup around this process if that is less."""
    import psutil

    seen = psutil.virtual_memory()
    total, available = seen.total, seen.available
    for folder in cgroups():
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is None or limit >= seen.total:
            continue
        reclaimable = _stat(folder, "inactive_file", "total_inactive_file")
        total = min(total, limit)
        available = min(available, max(0, limit - (used or 0) + reclaimable))
    return Memory(total, available)


def _number(folder: Path, *names: str) -> int | None:
    """The number in the first of these files that has one."""
    for name in names:
        words = _words(folder / name)
        if words and words[0].isdigit():
            return int(words[0])
    return None


def _stat(folder: Path, *keys: str) -> int:
    """A value of memory.stat: file pages that the kernel takes back when memory is short."""
    words = _words(folder / "memory.stat")
    values = dict(zip(words[::2], words[1::2], strict=False))
    return next((int(values[key]) for key in reversed(keys) if key in values), 0)


def disk(path: str | Path = ".") -> Disk:
    """The file system that holds ``path``, or will hold it once it exists."""
    usage = shutil.disk_usage(_there(path))
    return Disk(str(path), usage.total, usage.free)


def in_memory(path: str | Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether the file system of ``path`` is itself memory (tmpfs), as far as Linux tells."""
    if not mounts.is_file():
        return False
    device = _there(path).stat().st_dev
    own = f"{os.major(device)}:{os.minor(device)}"
    lines = (line.partition(" - ") for line in mounts.read_text(errors="replace").splitlines())
    return any(where.split()[2] == own and what.split()[0] in ("tmpfs", "ramfs") for where, _, what in lines)


def _there(path: str | Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    place = Path(path).absolute()
    return next(folder for folder in (place, *place.parents) if folder.exists())


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def gpus() -> list[Gpu]:
    """The GPUs that torch can use; ``why_no_gpu`` says why there are none."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Gpu(properties.name, properties.total_memory, free, capability, properties.major >= 8))
    return found


def give_back(address: int, size: int) -> None:
    """Let go of the pages of a mapped file that lie within ``size`` bytes from ``address`` on; whoever asks for them
    has them read again, without what a private mapping changed. Other memory stays, and all where this is not Linux."""
    if sys.platform != "linux":
        return
    first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        low, high = (int(part, 16) for part in span.split("-"))
        if inode != "0" and low <= first < end <= high:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
            return


def why_no_gpu() -> str:
    """Why torch sees no GPU and what to do; empty if it sees one."""
    import torch

    if torch.cuda.is_available():
        return ""
    device = has_nvidia_device()
    if torch.version.cuda is None and torch.version.hip is None:
        if device:
            return t("torch {version} is a CPU build although an NVIDIA GPU is present; install a CUDA build "
                     "(make setup TORCH_INDEX=URL)", version=torch.__version__)  # fmt: skip
        return t("torch {version} is a CPU build, and no NVIDIA GPU is present", version=torch.__version__)
    if not device:
        return t("no NVIDIA GPU is present; the CUDA build of torch works on the CPU too")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    if not driver:
        return t("an NVIDIA GPU is present and its driver is not: nvidia-smi does not answer; install the driver")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return t("CUDA_VISIBLE_DEVICES hides every GPU; unset it")
    message = "driver {driver} is too old for torch's CUDA {cuda}; update the driver or install an older CUDA build"
    return t(message, driver=driver, cuda=torch.version.cuda)


def has_nvidia_device() -> bool:
    """Whether an NVIDIA GPU is in the machine, whatever torch or the driver think."""
    if shutil.which("nvidia-smi") and _output("nvidia-smi", "-L"):
        return True
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(_words(path) == ["0x10de"] and _words(path.with_name("class"))[:1] and
               _words(path.with_name("class"))[0].startswith("0x03") for path in vendors)  # fmt: skip


def device() -> str:
    """Where models run: ``cuda`` if torch can use a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
