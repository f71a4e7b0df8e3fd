"""The plan turned round: the largest value of one option that a machine holds.

    found = solve(recipe, ready, "micro_batch_tokens", Budget(host_bytes=8 << 30))
    found.value, found.overrides, found.next_value

Every value that is tried is planned as any recipe is, so that what fits here is what a run will take. Where
``train.memory`` is auto it is the budget: as many blocks as it takes compute their activations twice.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from weitiao.data.batch import lengths_of
from weitiao.data.sources import Generators
from weitiao.errors import InputError, t
from weitiao.methods.freeze import Freeze
from weitiao.models import shape as shapes
from weitiao.models.load import ModelOptions
from weitiao.plan.checks import Sections
from weitiao.plan.need import Plan
from weitiao.plan.prepare import Gathered, Given, base_folder, gather, planned
from weitiao.plan.report import size
from weitiao.train.progress import counting
from weitiao.weights import inspect

OPTIONS = {
    "micro_batch_tokens": "train.micro_batch_tokens",
    "max_length": "data.max_length",
    "rank": "method.rank",
    "unfrozen_blocks": "method.blocks",
    "model": "model.path",
}
SHORTEST = 16  # tokens of a row that are worth a try
PUBLISHED_ITEM = 2  # bytes of a number in the files of published models


@dataclass(frozen=True)
class Budget:
    """What a machine has, in bytes. ``gpu_bytes`` 0: no GPU is used."""

    host_bytes: int
    gpu_bytes: int = 0

    def holds(self, plan: Plan) -> bool:
        """Whether every phase stays within it."""
        return plan.host_peak_bytes <= self.host_bytes and plan.gpu_peak_bytes <= self.gpu_bytes

    def given(self, given: Given) -> Given:
        """``given`` on such a machine."""
        facts = replace(given.facts, available_bytes=self.host_bytes, gpu_available_bytes=self.gpu_bytes)
        return replace(given, facts=replace(facts, device="cuda" if self.gpu_bytes else "cpu"))

    def __str__(self) -> str:
        host = t("{size} of memory", size=size(self.host_bytes))
        return host if not self.gpu_bytes else host + t(" and {size} of the GPU's", size=size(self.gpu_bytes))


@dataclass(frozen=True)
class Solved:
    """The largest ``value`` that fits, its plan and how to ask for it; ``next_value`` is the next that was looked at
    and does not fit, None where there is none."""

    name: str
    budget: Budget
    value: Any
    plan: Plan
    overrides: tuple[str, ...]
    next_value: Any = None
    next_plan: Plan | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as ``weitiao plan --solve NAME --json`` prints it."""
        peaks = {} if self.next_plan is None else _peaks(self.next_plan)
        following = None if self.next_plan is None else {"value": self.next_value, **peaks}
        asked = {"solve": self.name, "fit_bytes": self.budget.host_bytes, "gpu_bytes": self.budget.gpu_bytes}
        found = {"value": self.value, **_peaks(self.plan), "overrides": [*self.overrides], "next": following}
        return {**asked, **found, "plan": self.plan.to_dict()}

    def text(self) -> str:
        """For a person; the last line is the overrides, ready to paste."""
        option, peak = OPTIONS[self.name], shown(self.plan)
        lines = [
            t("{option}={value} fits {budget}: {peak}", option=option, value=self.value, budget=self.budget, peak=peak)
        ]
        if self.next_plan is None:
            lines.append(t("no larger one would make a difference"))
        else:
            lines.append(t("the next, {value}, does not: {peak}", value=self.next_value, peak=shown(self.next_plan)))
        if self.plan.recomputed_blocks:
            message = "activations of {count} blocks are computed twice, so that they need not be kept"
            lines.append(t(message, count=self.plan.recomputed_blocks))
        return "\n".join([*lines, " ".join(self.overrides)])


def shown(plan: Plan) -> str:
    """The peak and where it is."""
    peak = t("{size} at the peak", size=size(plan.host_peak_bytes))
    return peak if not plan.gpu_peak_bytes else peak + t(", {size} on the GPU", size=size(plan.gpu_peak_bytes))


def _peaks(plan: Plan) -> dict[str, int]:
    return {"host_peak_bytes": plan.host_peak_bytes, "gpu_peak_bytes": plan.gpu_peak_bytes}


@dataclass
class Search:
    """One option, tried with several values on a budget. ``trials``: what was found of each."""

    recipe: Sections
    ready: Gathered
    budget: Budget
    generators: Generators
    folder: Path
    models: Mapping[str, Any] = field(default_factory=dict)
    trials: dict[Any, tuple[Plan | None, bool]] = field(default_factory=dict)

    def too_large(self, name: str, value: Any) -> bool:
        """Whether ``value`` does not fit. One that the rows do not allow, since it would cut answers off, is not."""
        plan, fits = self.tried(name, value)
        return plan is not None and not fits

    def tried(self, name: str, value: Any) -> tuple[Plan | None, bool]:
        """The plan, and whether it fits; no plan where the rows do not allow the value."""
        if value not in self.trials:
            with redirect_stderr(io.StringIO()):
                try:
                    recipe, given = self.with_value(name, value)
                except InputError:
                    self.trials[value] = None, False
                else:
                    self.trials[value] = self.on_budget(recipe, given)
        return self.trials[value]

    def on_budget(self, recipe: Any, given: Given) -> tuple[Plan, bool]:
        """The plan on the budget; where nothing that ``train.memory`` could do makes it fit, that of the least."""
        if recipe.train.memory != "auto":
            plan = planned(recipe, given)
            return plan, self.budget.holds(plan)
        try:
            plan = planned(with_memory(recipe, self.memory), given)
        except InputError:
            return planned(with_memory(recipe, "low"), given), False
        return plan, self.budget.holds(plan)

    @property
    def memory(self) -> str:
        """The budget as ``train.memory`` has it."""
        return f"{(self.budget.gpu_bytes or self.budget.host_bytes) >> 20}MiB"

    def with_value(self, name: str, value: Any) -> tuple[Any, Given]:
        """The recipe with this value, and what it is planned from. InputError where the rows do not allow it."""
        recipe: Any = self.recipe
        given = self.budget.given(self.ready.given)
        if name == "micro_batch_tokens":
            return recipe.model_copy(update={"train": recipe.train.model_copy(update={name: value})}), given
        if name == "max_length":
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={name: value})})
            return recipe, self.budget.given(gather(recipe, self.generators, self.folder).given)
        if name == "model":
            shape, file_bytes = self.models[value]
            return recipe, replace(given, shape=shape, file_bytes=file_bytes, fetched_bytes=file_bytes)
        method = recipe.method.model_copy(update={OPTIONS[name].partition(".")[2]: value})
        return recipe.model_copy(update={"method": method}), given

    def values(self, name: str) -> Sequence[Any]:
        """What is tried, in ascending order. InputError where the recipe has no such option."""
        given = self.ready.given
        longest = int(lengths_of(given.train).max())
        if name == "micro_batch_tokens":
            return [longest, *notches(longest + 1, self.recipe.train.batch_size * longest)]
        if name == "max_length":
            return [*notches(SHORTEST, longest - 1), longest]
        if name == "model":
            return sorted(self.models, key=lambda model: self.models[model][0].parameters)
        if name == "rank" and hasattr(self.recipe.method, "rank"):
            return notches(1, given.shape.hidden)
        if name == "unfrozen_blocks" and isinstance(self.recipe.method, Freeze):
            return range(1, given.shape.layers + 1)
        other = "method.name=freeze" if name == "unfrozen_blocks" else "method.name=lora"
        method = self.recipe.method.model_dump()["name"]
        raise InputError(t("--solve {name}: {method} has none; take {other}", name=name, method=method, other=other))


def with_memory(recipe: Any, memory: str) -> Any:
    """The recipe with this ``train.memory``."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"memory": memory})})


def notches(low: int, high: int) -> list[int]:
    """Round numbers from ``low`` to the first that is not below ``high``: eight between each power of two and the
    next, or all below sixteen."""
    found: list[int] = []
    number = 1
    while not found or found[-1] < high:
        if number >= low:
            found.append(number)
        number += max(1, 1 << (number.bit_length() - 4)) if number >= 8 else 1
    return found


def known_models(folders: Sequence[str]) -> dict[str, tuple[shapes.Shape, int]]:
    """Shapes and sizes of files of ``folders``, or, where none are named, of models that are published."""
    if folders:
        found = {}
        for name in folders:
            folder = base_folder(ModelOptions(path=name))
            found[name] = shapes.read(folder), inspect.weight_bytes(folder)
        return found
    listed = yaml.safe_load((files("weitiao.plan") / "models.yaml").read_text(encoding="utf-8"))
    read = {name: shapes.read(values) for name, values in listed.items()}
    return {name: (shape, PUBLISHED_ITEM * shape.parameters) for name, shape in read.items()}


def solve(
    recipe: Sections,
    ready: Gathered,
    name: str,
    budget: Budget,
    generators: Generators,
    folder: Path,
    models: Sequence[str] = (),
) -> Solved:
    """The largest value of the option ``name`` whose plan is within ``budget``. InputError where none is, with the
    smallest machine that would do."""
    known = known_models(models) if name == "model" else {}
    search = Search(recipe, ready, budget, generators, folder, known)
    values = search.values(name)
    with counting(t("planning values of {name}", name=OPTIONS[name])) as progress:

        def above(value: Any) -> bool:
            progress(len(search.trials), len(values).bit_length() + 1)
            return search.too_large(name, value)

        place = bisect_left(values, True, key=above)
    plan, _ = search.tried(name, values[place - 1]) if place else (None, False)
    following = values[place] if place < len(values) else None
    worse = None if following is None else search.tried(name, following)[0]
    if plan is None:
        raise _nothing(name, budget, following, worse)
    value = values[place - 1]
    overrides = [f"{OPTIONS[name]}={value}"]
    if recipe.train.memory == "auto":
        overrides.append(f"train.memory={search.memory}")
    return Solved(name, budget, value, plan, tuple(overrides), following, worse)


def _nothing(name: str, budget: Budget, value: Any, plan: Plan | None) -> InputError:
    """What is said where no value fits."""
    option = OPTIONS[name]
    if plan is None:
        return InputError(t("--solve {name}: the rows allow no value of {option}", name=name, option=option))
    enough = f"--fit {-(-plan.host_peak_bytes >> 20)}MiB"
    enough += f" --gpu {-(-plan.gpu_peak_bytes >> 20)}MiB" if plan.gpu_peak_bytes else ""
    message = "nothing fits {budget}: {option}={value} takes {peak}; the smallest machine that would do: {enough}"
    return InputError(t(message, budget=budget, option=option, value=value, peak=shown(plan), enough=enough))
