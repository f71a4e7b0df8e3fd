"""``weitiao env``: the machine for a person, and what a run keeps of it."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from weitiao.errors import t
from weitiao.machine.hardware import cpu, disk, gpus, memory, why_no_gpu
from weitiao.machine.packages import clashes, versions
from weitiao.machine.speed import DTYPES, bandwidth, best_dtype, gemm_gflops, remeasure
from weitiao.machine.terminal import show


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
    show(table)
