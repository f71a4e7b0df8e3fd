"""One recipe by every method: memory, time and what trains; and what would make a recipe fit.

rows = by_method(recipe, given)
print(table(rows))
instead(recipe, given, Budget(8 << 30))       # ["train.micro_batch_tokens=512", "train.memory=low"]
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

from weitiao.data.batch import lengths_of
from weitiao.errors import InputError, t
from weitiao.methods import METHODS, PRESETS
from weitiao.plan.checks import Sections
from weitiao.plan.need import Plan
from weitiao.plan.prepare import Given, planned
from weitiao.plan.report import duration, padded, size
from weitiao.plan.solve import Budget
from weitiao.train.progress import counting

LEFT_OUT = ("head", "peft")  # of a task alone; no method without its kind


@dataclass(frozen=True)
class Row:
    """One method's plan, or why there is none. ``pareto``: no other needs less memory and time and trains more."""

    method: str
    plan: Plan | None
    problem: str = ""
    pareto: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as ``weitiao plan --all-methods --json`` prints it."""
        if self.plan is None:
            return {"method": self.method, "error": self.problem}
        names = ("host_peak_bytes", "gpu_peak_bytes", "disk_bytes", "total_seconds", "trainable_parameters", "fits")
        return {"method": self.method, **{name: getattr(self.plan, name) for name in names}, "pareto": self.pareto}


def by_method(recipe: Sections, given: Given) -> list[Row]:
    """The recipe by every method, each with its own defaults but for the recipe's own; the least memory first."""
    rows, variants = [], [*_variants(recipe)]
    with counting(t("planning every method")) as progress:
        for name, variant in variants:
            try:
                with redirect_stderr(io.StringIO()):
                    rows.append(Row(name, planned(variant, given)))
            except InputError as error:
                rows.append(Row(name, None, error.problems[0]))
            progress(len(rows), len(variants))
    plans = [row.plan for row in rows if row.plan is not None]
    made = [Row(row.method, row.plan, pareto=not any(better(other, row.plan) for other in plans))
            for row in rows if row.plan is not None]  # fmt: skip
    return [*sorted(made, key=lambda row: _cost(row.plan)), *(row for row in rows if row.plan is None)]


def _variants(recipe: Any) -> Iterator[tuple[str, Any]]:
    """Names and recipes; qlora where the base is not in codes as it is."""
    own = recipe.method.model_dump()["name"]
    for name, kind in METHODS.items():
        if name == own or name not in LEFT_OUT:
            yield name, recipe.model_copy(update={"method": recipe.method if name == own else kind()})
    if recipe.model.quantize == "none":
        held = recipe.model.model_copy(update=PRESETS["qlora"]["model"])
        lora = recipe.method if own == "lora" else METHODS["lora"]()
        yield "qlora", recipe.model_copy(update={"model": held, "method": lora})


def _cost(plan: Plan | None) -> tuple[float, ...]:
    """Memory, and time, of which less is better; what trains, of which more is."""
    if plan is None:
        return ()
    peak = plan.gpu_peak_bytes or plan.host_peak_bytes
    return float(peak), plan.total_seconds or 0.0, -float(plan.trainable_parameters)


def better(one: Plan, other: Plan) -> bool:
    """Whether ``one`` is nowhere worse than ``other`` and somewhere better."""
    pairs = [*zip(_cost(one), _cost(other), strict=True)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def table(rows: Sequence[Row]) -> str:
    """For a person: a line for each method, a mark where none is better in everything."""
    heads = [t("method"), t("memory"), t("time"), t("trained parameters"), ""]
    lines = [heads]
    for row in rows:
        if row.plan is None:
            lines.append([row.method, row.problem, "", "", ""])
            continue
        peak, seconds = row.plan.gpu_peak_bytes or row.plan.host_peak_bytes, row.plan.total_seconds
        marks = ("● " if row.pareto else "") + ("" if row.plan.fits else t("does not fit"))
        time = "–" if seconds is None else duration(seconds)
        lines.append([row.method, size(peak), time, f"{row.plan.trainable_parameters:,}", marks])
    text = "\n".join("".join(padded(word, width) for word, width in zip(line, (15, 11, 9, 20, 0), strict=True)).rstrip()
                     for line in lines)  # fmt: skip
    return text + "\n" + t("●: no other method takes less memory and time and trains more")


def instead(recipe: Sections, given: Given, budget: Budget) -> list[str]:
    """Options with which the recipe's plan stays within ``budget``, the cheapest that will do; none where nothing
    does. Each is added to those before it, and then those that are not needed are taken away."""
    steps = [*_changes(recipe, given)]
    with counting(t("looking for what would fit")) as progress:

        def fits(chosen: Sequence[tuple[str, str, Any]]) -> bool:
            progress(0, None)
            changed: Any = recipe
            for section, name, value in chosen:
                changed = changed.model_copy(update={section: value if not name else getattr(
                    changed, section).model_copy(update={name: value})})  # fmt: skip
            try:
                with redirect_stderr(io.StringIO()):
                    return budget.holds(planned(changed, given))
            except InputError:
                return False

        count = next((n for n in range(1, len(steps) + 1) if fits(steps[:n])), 0)
        chosen = steps[:count]
        for step in steps[: max(0, count - 1)]:
            rest = [one for one in chosen if one is not step]
            chosen = rest if fits(rest) else chosen
    return [_written(*step) for step in chosen]


def _written(section: str, name: str, value: Any) -> str:
    """An option as it is pasted."""
    return f"{section}.{name}={str(value).lower() if value is True else value}" if name else f"method.name={value.name}"


def _changes(recipe: Sections, given: Given) -> Iterator[tuple[str, str, Any]]:
    """What makes a run smaller, from what costs least to what costs most: section, option, value; without an option
    the whole section is another."""
    longest = int(lengths_of(given.train).max())
    if longest < recipe.train.batch_size * longest:
        yield "train", "micro_batch_tokens", longest
    if recipe.train.memory != "low":
        yield "train", "memory", "low"
    trained = recipe.method.count(given.shape)
    if recipe.train.optimizer == "adamw" and trained > given.shape.parameters // 100:
        yield "train", "optimizer", "adamw8bit"
    if recipe.train.optimizer != "adafactor" and trained > given.shape.parameters // 100:
        yield "train", "paged_optimizer", True
    if not recipe.method.adds:
        yield "method", "", METHODS["lora"]()
    if recipe.model.quantize == "none" and recipe.model.config is None:
        yield "model", "quantize", "nf4"
