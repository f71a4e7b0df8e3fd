"""What can be asked of ``weitiao plan`` beside the plan itself.

found, text = answer(recipe, generators, Asked(fit="8GiB", solve="rank"))
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao.data.sources import Generators
from weitiao.errors import InputError, t
from weitiao.plan.checks import Sections

if TYPE_CHECKING:
    from weitiao.plan.solve import Budget

SIZE = re.compile(r"[0-9]+(\.[0-9]+)?(MiB|GiB)")  # as train.memory has it

Fit = Annotated[str | None, typer.Option(metavar="SIZE", help="plan for a machine with so much memory, such as 8GiB")]
Gpu = Annotated[str | None, typer.Option(metavar="SIZE", help="and a GPU with so much of its own, such as 24GiB")]
Solve = Annotated[
    str | None,
    typer.Option(
        metavar="OPTION",
        help="the largest that fits: micro_batch_tokens, max_length, rank, unfrozen_blocks or model",
    ),
]
Models = Annotated[
    str, typer.Option(help="with --solve model: folders to choose from, commas between; else published models")
]
AllMethods = Annotated[bool, typer.Option("--all-methods", help="memory, time and what trains, method by method")]
History = Annotated[bool, typer.Option("--history", help="how far plans were from the runs on this machine")]
Clients = Annotated[int, typer.Option(min=1, help="how many will be answered at once, for the phase generate")]
Context = Annotated[
    int, typer.Option(min=0, help="tokens of each one's prompt and answer; 0: the longest row and 512 more")
]


@dataclass(frozen=True)
class Asked:
    """The options of the verb, as they are given."""

    fit: str | None = None
    gpu: str | None = None
    solve: str | None = None
    models: str = ""
    all_methods: bool = False
    clients: int = 1
    context: int = 0

    def check(self) -> None:
        """InputError with everything that is wrong."""
        from weitiao.plan.solve import OPTIONS

        problems = []
        for name, given in (("--fit", self.fit), ("--gpu", self.gpu)):
            if given is not None and not SIZE.fullmatch(given):
                problems.append(
                    t('{name}: "{given}" is no size; give one such as 8GiB or 900MiB', name=name, given=given)
                )
        if self.solve is not None and self.solve not in OPTIONS:
            names = ", ".join(OPTIONS)
            problems.append(t('--solve: "{given}" cannot be solved for ({names})', given=self.solve, names=names))
        if self.models and self.solve != "model":
            problems.append(t("--models goes with --solve model"))
        if self.solve and self.all_methods:
            problems.append(t("--solve and --all-methods are two questions; ask one of them"))
        if problems:
            raise InputError(problems)


def answer(recipe: Sections, generators: Generators, asked: Asked) -> tuple[dict[str, Any], str]:
    """What is asked, as plain JSON and for a person. InputError where it cannot be told."""
    from weitiao.plan import compared, report
    from weitiao.plan.later import Answers
    from weitiao.plan.prepare import gather, planned
    from weitiao.plan.solve import solve

    asked.check()
    with tempfile.TemporaryDirectory(prefix="weitiao-") as scratch:
        known = gather(recipe, generators, Path(scratch))
        budget = budget_of(asked, known.given.facts)
        if asked.solve:
            models = [word.strip() for word in asked.models.split(",") if word.strip()]
            found = solve(recipe, known, asked.solve, budget, generators, Path(scratch), models)
            return found.to_dict(), found.text()
    given = budget.given(known.given) if asked.fit or asked.gpu else known.given
    given = replace(given, answers=Answers(asked.clients, asked.context))
    if asked.all_methods:
        rows = compared.by_method(recipe, given)
        return {"methods": [row.to_dict() for row in rows]}, compared.table(rows)
    plan = planned(recipe, given)
    changes = [] if budget.holds(plan) else compared.instead(recipe, given, budget)
    lines = [report.text(plan)]
    lines += [t("this would fit: {options}", options=" ".join(changes))] if changes else []
    return plan.to_dict() | {"instead": changes}, "\n".join(lines)


def misses() -> tuple[dict[str, Any], str]:
    """How far plans were from the runs on this machine."""
    from weitiao.plan import history

    found = history.lines()
    return {"runs": found}, history.table(found)


def budget_of(asked: Asked, facts: Any) -> Budget:
    """The machine that is asked about: this one, but for what is given."""
    from weitiao.plan.solve import Budget
    from weitiao.train.memory import size_bytes

    gpu = facts.gpu_available_bytes if facts.device != "cpu" else 0
    return Budget(
        host_bytes=size_bytes(asked.fit) if asked.fit else facts.available_bytes,
        gpu_bytes=size_bytes(asked.gpu) if asked.gpu else gpu,
    )
