"""A plan in a few lines for people.

print(text(plan))
"""

from __future__ import annotations

from weitiao.errors import t
from weitiao.plan.need import Plan
from weitiao.train.room import less

MEMORY = "train.memory=low, train.micro_batch_tokens=1024, train.paged_optimizer=true, method.name=lora"


def text(plan: Plan) -> str:
    """What trains, each phase's peak and disk, the worst step, the time, and whether it fits."""
    names = {
        "fetch": t("fetch"),
        "tokenise": t("tokenise"),
        "load": t("load"),
        "quantise": t("quantise"),
        "train": t("train"),
        "evaluate": t("evaluate"),
        "checkpoint": t("checkpoint"),
        "resume": t("resume"),
        "merge": t("merge"),
        "generate": t("generate"),
        "imports": t("libraries"),
        "weights": t("weights"),
        "optimizer": t("optimiser"),
        "kernels": t("the matrix library's code"),
        "gradients_and_activations": t("gradients and activations"),
    }
    gpu = plan.device != "cpu"
    lines = [
        t(
            "plan: {trained} of {all} parameters train; frozen weights in {dtype}, on {device}",
            trained=f"{plan.trainable_parameters:,}",
            all=f"{plan.parameters:,}",
            dtype=plan.dtype,
            device=t("the GPU") if gpu else t("the CPU"),
        )
    ]
    for phase in plan.phases:
        marks = [size(phase.gpu_peak_bytes) + " " + t("GPU memory")] if gpu else []
        marks.append(size(phase.host_peak_bytes) + " " + t("memory"))
        marks += [size(phase.disk_bytes) + " " + t("disk")] if phase.disk_bytes else []
        marks += ["← " + t("peak")] if phase.name == plan.peak_phase else []
        lines.append("  " + padded(names[phase.name], 12) + "  ".join(marks))
    parts = ", ".join(f"{names[part]} {size(count)}" for part, count in plan.parts.items() if count)
    lines.append("  " + t("a training step holds: {parts}", parts=parts))
    if plan.paged_bytes:
        where = t("in the host's memory") if gpu else t("in a file of the run folder")
        message = "{size} of the optimiser's state lie {where}, and come in one parameter at a time"
        lines.append("  " + t(message, size=size(plan.paged_bytes), where=where))
    message = "most is needed in step {step} of {steps}: {tokens} tokens at once"
    lines.append("  " + t(message, step=plan.worst_step, steps=plan.steps, tokens=f"{plan.worst_tokens:,}"))
    if plan.recomputed_blocks:
        message = "activations of {count} blocks are computed twice, so that they need not be kept"
        lines.append("  " + t(message, count=plan.recomputed_blocks))
    if plan.total_seconds is not None and plan.step_seconds is not None:
        message = "time: about {total} ({step} a step)"
        lines.append("  " + t(message, total=duration(plan.total_seconds), step=duration(plan.step_seconds)))
    return "\n".join([*lines, verdict(plan)])


def verdict(plan: Plan) -> str:
    """One line: it fits, or it does not and what to change."""
    peak = plan.gpu_peak_bytes if plan.device != "cpu" else plan.host_peak_bytes
    values = {
        "need": size(peak),
        "have": size(plan.available_bytes),
        "disk": size(plan.disk_bytes),
        "free": size(plan.free_disk_bytes),
    }
    if plan.fits:
        return t("fits: {need} of {have} memory, {disk} of {free} disk", **values)
    advice = [MEMORY] if peak > plan.available_bytes or plan.disk_bytes <= plan.free_disk_bytes else []
    advice += [less(plan.room), "output=…"] if plan.disk_bytes > plan.free_disk_bytes else []
    message = "does not fit: {need} of {have} memory, {disk} of {free} disk; try {options}"
    return t(message, **values, options=", ".join(advice))


def size(count: int) -> str:
    """``1.25 GiB``, ``310 MiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """``0.31 s``, ``48 s``, ``12 min``, ``3.5 h``."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def padded(word: str, width: int) -> str:
    """``word`` filled up to ``width`` columns; a Chinese character takes two."""
    taken = sum(2 if ord(letter) > 0x2E7F else 1 for letter in word)
    return word + " " * max(1, width - taken)
