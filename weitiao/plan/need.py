"""What a plan says, and what of the machine it goes by.

found.fits, found.host_peak_bytes, found.to_dict()
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weitiao.train.room import Room

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GPU_CONTEXT_BYTES = 600 << 20  # CUDA's context and libraries, which torch does not count
NOWHERE = Room(0, 0, 0, 0)  # of a plan that was written before it was known
APART = ("fetch", "merge", "generate")  # phases of other processes, or of files that are there already
GPU_HOST_BYTES = 1500 << 20  # what they take in the host's memory


@dataclass(frozen=True)
class Facts:
    """What the plan must know of the machine."""

    base_bytes: int  # resident size before a weight is loaded
    available_bytes: int  # what this process may still take, beside what it holds
    free_disk_bytes: int
    gflops: float  # of the processor
    bytes_per_second: float
    device: str = "cpu"
    gpu_available_bytes: int = 0
    tokenised_bytes: int = 0  # the highest resident size while rows became tokens; 0: not known


@dataclass(frozen=True)
class Phase:
    """One phase's peaks; ``disk_bytes`` is what it has on the disk."""

    name: str
    host_peak_bytes: int
    gpu_peak_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run will need. ``parts`` splits the peak of a training step; ``worst_step`` counts from 1."""

    phases: tuple[Phase, ...]
    steps: int
    step_seconds: float | None  # None on a GPU, whose speed is not measured
    total_seconds: float | None
    parameters: int
    trainable_parameters: int
    tokens: int  # read in all steps
    worst_step: int
    worst_tokens: int
    dtype: str
    device: str
    available_bytes: int
    free_disk_bytes: int
    fits: bool
    recomputed_blocks: int = 0  # that compute their activations twice
    paged_bytes: int = 0  # optimiser state in a file while it trains; on a GPU, in the host's memory
    parts: dict[str, int] = field(default_factory=dict)
    room: Room = NOWHERE

    @property
    def own(self) -> list[Phase]:
        """The phases of the run itself."""
        return own(self.phases)

    @property
    def host_peak_bytes(self) -> int:
        """The highest of the run's own phases."""
        return max(phase.host_peak_bytes for phase in self.own)

    @property
    def gpu_peak_bytes(self) -> int:
        """The highest of them; 0 where no GPU is used."""
        return max(phase.gpu_peak_bytes for phase in self.own)

    @property
    def disk_bytes(self) -> int:
        """The most that the run has on the disk at once, the file of paged state with it."""
        return sum(phase.disk_bytes for phase in self.own)

    @property
    def peak_phase(self) -> str:
        """The phase with the highest peak, on the GPU where one is used."""
        return max(self.own, key=lambda phase: (phase.gpu_peak_bytes, phase.host_peak_bytes)).name

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_dict` wrote."""
        known: dict[str, Any] = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        known["phases"] = tuple(Phase(**phase) for phase in values["phases"])
        known["room"] = Room(**values["room"]) if "room" in values else NOWHERE
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as plan.json and ``weitiao plan --json`` have it."""
        derived = {
            name: getattr(self, name) for name in ("peak_phase", "host_peak_bytes", "gpu_peak_bytes", "disk_bytes")
        }
        return asdict(self) | derived


def own(phases: Sequence[Phase]) -> list[Phase]:
    """Those of the run itself."""
    return [phase for phase in phases if phase.name not in APART]


def resident_bytes() -> int:
    """What this process holds in memory now."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_bytes() -> int | None:
    """The highest resident size of this process so far; None where the system does not tell (Windows). Mapped files
    count as far as they are resident; those of paged state are so for one parameter at a time."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the process that started this one, if that was larger
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)
        return int(found[1]) * 1024 if found else None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def placed(name: str, needed: int, written: int, facts: Facts, paged: int) -> Phase:
    """A phase whose tensors take ``needed`` bytes where the model is: in memory, or on the GPU, whose ``paged`` bytes
    are in memory from the first step on."""
    if facts.device == "cpu":
        return Phase(name, facts.base_bytes + needed, 0, written)
    host = facts.base_bytes + GPU_HOST_BYTES + (paged if name != "load" else 0)
    return Phase(name, host, needed + GPU_CONTEXT_BYTES, written)


def fits(phases: Sequence[Phase], facts: Facts) -> bool:
    """Whether memory, GPU memory and disk suffice for every phase of the run."""
    needed = own(phases)
    return (
        max(phase.host_peak_bytes for phase in needed) <= facts.available_bytes
        and (facts.device == "cpu" or max(phase.gpu_peak_bytes for phase in needed) <= facts.gpu_available_bytes)
        and sum(phase.disk_bytes for phase in needed) <= facts.free_disk_bytes
    )
