"""The machine as it is: processor, memory and disk within the limits of its container, GPUs, measured speed, versions.

    memory().available_bytes        # what this process may still take, cgroup limits included
    best_dtype()                    # "bfloat16" where the processor multiplies it faster, else "float32"
    clashes()                       # installed packages that are known not to work together, and what to do

Speeds are measured once for a processor and torch version (at most three seconds) and kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from weitiao.errors import t

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})  # the last is AArch64's own
SHOWN_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "bf16", "i8mm")
CGROUP = Path("/sys/fs/cgroup")
DTYPES = ("float32", "bfloat16", "float16")
MEASURE_SECONDS = 0.5  # for each dtype, and for the bandwidth
BF16_GAIN = 1.2  # how much faster bfloat16 must be before its rounding is worth it
NEEDED = ("torch", "transformers", "peft", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pydantic")
OPTIONAL = ("accelerate", "bitsandbytes", "datasets", "torchao", "torchaudio", "torchvision", "trl")
PACKAGES = ("weitiao", *NEEDED, *OPTIONAL)
LEAST = {  # the first version without a known fault
    "torch": ("2.6", "reads pickled weights unsafely (CVE-2025-32434)"),
    "transformers": ("5.3", "another file format, and a config.json may fetch code (CVE-2026-4372)"),
    "torchao": ("0.16", "peft refuses to run beside it"),
    "bitsandbytes": ("0.46.1", "transformers refuses it"),
}


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


@dataclass(frozen=True)
class Clash:
    """Packages that do not work together or at all here, and what to do."""

    packages: str
    problem: str
    remedy: str


# ---- processor and memory ------------------------------------------------------------------------------------------


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
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return Disk(str(path), usage.total, usage.free)


# ---- GPUs ----------------------------------------------------------------------------------------------------------


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


# ---- measured speed ------------------------------------------------------------------------------------------------


def gemm_gflops(dtype: str) -> float:
    """Measured matrix-product rate of the processor in 10^9 operations a second, for ``dtype``."""
    return _speeds()[dtype]


def bandwidth() -> float:
    """Measured memory bandwidth of the processor in bytes a second: what a large copy reads plus what it writes."""
    return _speeds()["bandwidth"]


def best_dtype() -> str:
    """The dtype of frozen weights that is fastest here; on a processor never float16.

    A GPU: bfloat16 from Ampere on, float16 before it. A processor: bfloat16 where it has the instructions for it and
    the measured product is clearly faster, else float32.
    """
    if cards := gpus():
        return "bfloat16" if all(card.bf16 for card in cards) else "float16"
    if not cpu().bf16:
        return "float32"
    return "bfloat16" if gemm_gflops("bfloat16") > BF16_GAIN * gemm_gflops("float32") else "float32"


def cache_folder() -> Path:
    """The user's cache folder for this project: XDG on Linux, Library/Caches on macOS, LOCALAPPDATA on Windows."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "weitiao"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "weitiao"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "weitiao"
    return Path.home() / ".cache" / "weitiao"


@cache
def _speeds() -> dict[str, float]:
    """The measured speeds, from the cache if this processor, thread count and torch were measured before."""
    return _kept().get(_speed_key()) or remeasure()


def remeasure() -> dict[str, float]:
    """Measure now and keep the result for later runs."""
    speeds, path = measure(), cache_folder() / "speeds.json"
    with contextlib.suppress(OSError):  # a read-only home only means that the next run measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps({**_kept(), _speed_key(): speeds}, indent=1), encoding="utf-8")
        partial.replace(path)
    return speeds


def _kept() -> dict[str, dict[str, float]]:
    """The speeds in the cache, by processor, threads and torch."""
    try:
        values = json.loads((cache_folder() / "speeds.json").read_text(encoding="utf-8"))
        return {key: speeds for key, speeds in values.items() if {*DTYPES, "bandwidth"} == set(speeds)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _speed_key() -> str:
    import torch

    return f"{cpu().name} | {torch.get_num_threads()} threads | torch {torch.__version__}"


def measure(seconds: float = MEASURE_SECONDS) -> dict[str, float]:
    """Measure matrix products of each dtype (10^9 operations a second) and bandwidth (bytes a second)."""
    import torch

    rows, width = 256, 1024  # a micro-batch of tokens through a layer of a small model
    speeds = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        left, right = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        speeds[name] = 2 * rows * width * width / _seconds_each(lambda a=left, b=right: a @ b.T, seconds) / 1e9
    source = torch.ones(16 * 2**20)  # 64 MiB, beyond most caches
    target = torch.empty_like(source)
    speeds["bandwidth"] = 2 * source.nbytes / _seconds_each(lambda: target.copy_(source), seconds)
    return speeds


def _seconds_each(work: Callable[[], object], seconds: float) -> float:
    """The fastest of the repetitions that fit into ``seconds`` (the first, which warms up, counts only if alone)."""
    end = time.perf_counter() + seconds
    taken: list[float] = []
    while len(taken) < 2 or (time.perf_counter() < end and len(taken) < 1000):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
        if taken[0] > seconds:
            break
    return max(min(taken), 1e-9)


# ---- versions ------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Installed versions of what the project stands on, by package name, without importing anything."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def clashes(found: dict[str, str] | None = None) -> list[Clash]:
    """What is known not to work in ``found`` (package -> version), or in what is installed and what that requires."""
    from packaging.version import Version

    if found is None:
        return clashes(versions()) + unmet()
    torch, problems = found.get("torch", ""), []
    for name in NEEDED:
        if name not in found:
            problems.append(Clash(name, t("not installed"), f"pip install {name}"))
    for name, (least, reason) in LEAST.items():
        if name in found and Version(found[name]) < Version(least):
            problems.append(Clash(f"{name} {found[name]}", t(reason), f'pip install -U "{name}>={least}"'))
    if torch and Version(torch) < Version("2.3") and Version(found.get("numpy", "0")) >= Version("2"):
        both = f"torch {torch}, numpy {found['numpy']}"
        problems.append(Clash(both, t("this torch was built for numpy 1"), 'pip install "numpy<2"'))
    for name in ("torchvision", "torchaudio"):
        if torch.endswith("+cpu") and name in found and not found[name].endswith("+cpu"):
            problem = t("a CUDA build beside a CPU build of torch: importing it fails")
            remedy = t("pip uninstall {name} (text needs none), or take both from the same index", name=name)
            problems.append(Clash(f"{name} {found[name]}, torch {torch}", problem, remedy))
    return problems


def unmet() -> list[Clash]:
    """Installed packages whose own requirements the installed versions do not meet."""
    from packaging.requirements import Requirement

    problems = []
    for name, version in versions().items():
        for text in metadata.requires(name) or []:
            needs = Requirement(text)
            if needs.marker and not needs.marker.evaluate({"extra": ""}):
                continue
            with contextlib.suppress(metadata.PackageNotFoundError):
                present = metadata.version(needs.name)
                if not needs.specifier.contains(present, prereleases=True):
                    both = f"{name} {version}, {needs.name} {present}"
                    wanted = f"{needs.name}{needs.specifier}"
                    problems.append(
                        Clash(both, t("{name} needs {wanted}", name=name, wanted=wanted), f'pip install "{wanted}"')
                    )
    return problems


def environment() -> dict[str, Any]:
    """What env.json keeps of the machine: quick, nothing is measured and torch is imported only if it already is."""
    usable = memory()
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": asdict(cpu()),
        "memory": asdict(usable),
        "packages": versions(),
        "threads": torch.get_num_threads() if torch else None,
        "gpus": [asdict(card) for card in gpus()] if torch else [],
    }


# ---- weitiao env ---------------------------------------------------------------------------------------------------


def env_verb(as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False) -> None:
    """Show the machine: processor, memory, disk, GPUs and why not, measured speeds, versions and known clashes."""
    report = _report()
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _table(report)


def _report() -> dict[str, Any]:
    """Everything that ``weitiao env`` says; the speeds are measured now, whatever the cache holds."""
    remeasure()
    _speeds.cache_clear()
    return environment() | {
        "gpus": [asdict(card) for card in gpus()],
        "why_no_gpu": why_no_gpu() or None,
        "disk": asdict(disk(".")),
        "gemm_gflops": {name: round(gemm_gflops(name), 1) for name in DTYPES},
        "bandwidth_bytes_per_second": round(bandwidth()),
        "best_dtype": best_dtype(),
        "clashes": [asdict(clash) for clash in clashes()],
    }


def _table(report: dict[str, Any]) -> None:
    """Print the report for a person."""
    from rich.console import Console
    from rich.table import Table

    def gib(count: int) -> str:
        return f"{count / 2**30:.1f} GiB"

    processor, usable, place = report["cpu"], report["memory"], report["disk"]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in report["gemm_gflops"].items())
    cards = "; ".join(f"{card['name']} {gib(card['total_bytes'])}" for card in report["gpus"])
    bad = [f"{clash['packages']}: {clash['problem']} → {clash['remedy']}" for clash in report["clashes"]]
    rows = [
        (t("processor"), f"{processor['name']} ({processor['architecture']})"),
        (t("cores"), t("{cores} of {total}", cores=processor["cores"], total=processor["cores_total"])),
        (t("instructions"), " ".join(processor["flags"]) or "-"),
        (
            t("memory"),
            t("{free} free of {total}", free=gib(usable["available_bytes"]), total=gib(usable["total_bytes"])),
        ),
        (t("disk"), t("{free} free of {total}", free=gib(place["free_bytes"]), total=gib(place["total_bytes"]))),
        (t("GPU"), cards or t("none: {reason}", reason=report["why_no_gpu"])),
        (t("matrix products (GFLOP/s)"), rates),
        (t("memory bandwidth"), f"{report['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"),
        (t("weights are held in"), report["best_dtype"]),
        ("Python", report["python"]),
        (t("packages"), ", ".join(f"{name} {version}" for name, version in report["packages"].items())),
        (t("known clashes"), "\n".join(bad) or t("none")),
    ]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
