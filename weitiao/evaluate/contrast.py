"""Which differences are real: systems side by side, paired, in sentences, as Markdown and as JSON.

    for one in differences(comparison): print(one.sentence(comparison))
    report(comparison); as_dict(comparison)

A difference is called real where its paired 95 % interval excludes zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from weitiao.errors import t
from weitiao.evaluate.bootstrap import Figure, Measure
from weitiao.evaluate.compare import markdown, shown, table
from weitiao.evaluate.forgetting import THRESHOLD, Kept
from weitiao.evaluate.systems import LABELS, Comparison
from weitiao.evaluate.tasks import FEW as FEW_CASES

WORST = 10  # regressions that are listed


@dataclass(frozen=True)
class Difference:
    """One system less another on one measure, turned so that above 0 is better; ``ours`` and ``theirs`` are values."""

    system: str
    against: str
    measure: str
    ours: float
    theirs: float
    gain: Figure

    @property
    def real(self) -> bool:
        """Whether the interval excludes zero."""
        return self.gain.low > 0 or self.gain.high < 0

    def as_dict(self) -> dict[str, Any]:
        """The difference for JSON."""
        found = {"system": self.system, "against": self.against, "measure": self.measure, "ours": self.ours}
        return found | {"theirs": self.theirs, **asdict(self.gain), "real": self.real}

    def sentence(self) -> str:
        """The difference in words."""
        values = {
            "system": label(self.system),
            "against": label(self.against),
            "measure": self.measure,
            "ours": shown(self.measure, self.ours),
            "theirs": shown(self.measure, self.theirs),
            "gain": shown(self.measure, Figure(abs(self.gain.value), *_turned(self.gain), self.gain.count)),
        }
        if not self.real:
            message = (
                "{system} and {against}: {measure} {ours} and {theirs}. These rows cannot tell them apart (the "
                "difference, {gain}, may be zero)."
            )
            return t(message, **values)
        if self.gain.value > 0:
            return t(
                "{system} is better than {against}: {measure} {ours}, not {theirs}; a real gain, {gain}.", **values
            )
        return t("{system} is worse than {against}: {measure} {ours}, not {theirs}; a real loss, {gain}.", **values)


def _turned(gain: Figure) -> tuple[float, float]:
    return (gain.low, gain.high) if gain.value >= 0 else (-gain.high, -gain.low)


def label(key: str) -> str:
    """A system's name for people."""
    return t(LABELS[key]) if key in LABELS else key


def differences(comparison: Comparison, measures: Sequence[str] | None = None) -> list[Difference]:
    """Every model against each of the base's ways and against the first model, on every measure that both have.

    Systems that were not measured on the same cases (texts cut differently by another tokenizer) are left out."""
    keys, found = list(comparison.systems), []
    bases = [key for key in keys if key in LABELS]
    models = [key for key in keys if key not in LABELS]
    resampling = comparison.resampling
    for place, key in enumerate(models):
        for other in [*bases, *models[: min(place, 1)]]:
            ours, theirs = comparison.systems[key], comparison.systems[other]
            if ours.groups != theirs.groups or ours.groups != next(iter(comparison.systems.values())).groups:
                continue
            for name in [name for name in ours.measures if name in theirs.measures]:
                if measures is None or name in measures:
                    found.append(_difference(resampling, key, other, name, ours.measures[name], theirs.measures[name]))
    return [one for one in found if one.gain.count]


def _difference(resampling: Any, system: str, against: str, name: str, ours: Measure, theirs: Measure) -> Difference:
    gain = resampling.difference(ours, theirs) if ours.higher else resampling.difference(theirs, ours)
    return Difference(system, against, name, ours.value, theirs.value, gain)


def best_base(comparison: Comparison) -> str | None:
    """The base's best way on the measure that matters most."""
    measures = {key: found.measures[comparison.first] for key, found in comparison.systems.items() if key in LABELS}
    signed = {key: measure.value if measure.higher else -measure.value for key, measure in measures.items()}
    return max(signed, key=lambda key: signed[key]) if signed else None


def verdicts(comparison: Comparison) -> list[str]:
    """For every model whether it was worth it: the sentence against the base at its best."""
    against = best_base(comparison)
    found = differences(comparison, [comparison.first])
    return [one.sentence() for one in found if one.against == against]


# ---- row by row ------------------------------------------------------------------------------------------------------


def regressions(comparison: Comparison, system: str, against: str, count: int = WORST) -> list[dict[str, Any]]:
    """The rows on which ``system`` is worse than ``against`` by most, on the measure that matters most."""
    ours, theirs = comparison.systems[system], comparison.systems[against]
    if ours.groups != theirs.groups:
        return []
    mine, other = (one.measures[comparison.first] for one in (ours, theirs))
    sign = 1 if mine.higher else -1
    after, before = mine.values(mine.counts), other.values(other.counts)
    drop = np.nan_to_num(sign * (before - after))
    rows = [int(row) for row in np.argsort(-drop, kind="stable")[:count] if drop[row] > 0]
    return [
        {
            "id": ours.groups[row],
            "asked": ours.asked[row] if ours.asked else "",
            "gold": _line(ours.predictions, row).get("gold"),
            "before": _line(theirs.predictions, row).get("predicted"),
            "after": _line(ours.predictions, row).get("predicted"),
            "score_before": float(before[row]),
            "score_after": float(after[row]),
        }
        for row in rows
    ]


def _line(predictions: Sequence[Mapping[str, Any]], row: int) -> Mapping[str, Any]:
    return predictions[row] if row < len(predictions) else {}


def _said(value: Any, characters: int = 160) -> str:
    """A gold or predicted answer on one line."""
    if isinstance(value, Mapping) and set(value) == {"text", "calls"}:
        calls = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in value["calls"]]
        value = " ".join(filter(None, [value["text"], *calls]))
    text = value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= characters else text[:characters] + " …"


# ---- the report ------------------------------------------------------------------------------------------------------


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything as JSON."""
    options, against = comparison.options, best_base(comparison)
    return {
        "task": options.task,
        "data": options.data,
        "base": comparison.base,
        "measure": comparison.first,
        "cases": len(set(next(iter(comparison.systems.values())).groups)),
        "systems": {
            key: {
                "figures": found.figures,
                "cost_per_1000_answers": found.cost.per_thousand() if found.cost else None,
                "note": comparison.notes.get(key, ""),
            }
            for key, found in comparison.systems.items()
        },
        "differences": [one.as_dict() for one in differences(comparison)],
        "verdicts": verdicts(comparison),
        "regressions": {
            key: regressions(comparison, key, against)
            for key in comparison.systems
            if against is not None and key not in LABELS
        },
        "forgetting": {
            name: {part: _forgotten(found, comparison) for part, found in parts.items()}
            for name, parts in comparison.forgetting.items()
        },
    }


def _forgotten(found: Kept, comparison: Comparison) -> dict[str, Any]:
    options = comparison.options
    return {
        "before": found.before.value,
        "after": found.after.value,
        "change": found.change(options.samples, options.seed).as_dict(),
        "forgotten": found.forgotten(options.samples, options.seed),
    }


def report(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    options, against = comparison.options, best_base(comparison)
    cases = len(set(next(iter(comparison.systems.values())).groups))
    parts = [f"# {t('Was tuning worth it?')}\n", *(f"{sentence}\n" for sentence in verdicts(comparison))]
    head = t("Measured by {task} on {data}, {count} independent cases; intervals: 95 %, bootstrap over them.",
             task=options.task, data=options.data, count=cases)  # fmt: skip
    parts.append(head + "\n")
    if cases < FEW_CASES:
        few = "With fewer than {few} cases every interval here is wide, and itself uncertain: measure on more rows."
        parts.append(f"**{t(few, few=FEW_CASES)}**\n")
    figures = {label(key): _headed(found.figures) for key, found in comparison.systems.items()}
    parts += [f"## {t('Side by side')}\n", table(figures), *_notes(comparison)]
    parts += [f"## {t('Which differences are real')}\n", _difference_table(comparison)]
    parts += _costs(comparison) + _forgetting(comparison)
    for key in comparison.systems:
        if against is not None and key not in LABELS:
            parts += _regressions(comparison, key, against)
    return "\n".join(part for part in parts if part)


def _headed(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Without the figures of single classes, which would make the table too wide."""
    return {name: value for name, value in figures.items() if ": " not in name}


def _notes(comparison: Comparison) -> list[str]:
    return [f"{label(key)}: {note}.\n" for key, note in comparison.notes.items() if note]


def _difference_table(comparison: Comparison) -> str:
    found = differences(comparison, [comparison.first])
    if not found:
        return t("Nothing to compare: these systems were not measured on the same cases.") + "\n"
    real = {True: t("yes"), False: t("no")}
    rows = [[label(one.system), label(one.against), shown(one.measure, one.gain), real[one.real]] for one in found]
    text = markdown([t("system"), t("against"), t("gain in {measure}", measure=comparison.first), t("real?")], rows)
    told = t("Gains are taken row by row (paired bootstrap) and are real where the interval excludes zero.")
    if len(found) > 4:
        message = "{count} pairs are tested at 95 %: of equal systems one pair in twenty would look different."
        told += " " + t(message, count=len(found))
    return f"{text}\n{told}\n"


def _costs(comparison: Comparison) -> list[str]:
    costs = {key: found.cost.per_thousand() for key, found in comparison.systems.items() if found.cost is not None}
    if not costs:
        return []
    names = ("prompt_tokens", "new_tokens", "seconds")
    rows = [[label(key), *(f"{cost[name]:,.0f}" for name in names)] for key, cost in costs.items()]
    head = [t("system"), t("tokens read"), t("tokens written"), t("seconds")]
    return [f"## {t('What 1,000 answers cost')}\n", markdown(head, rows)]


def _forgetting(comparison: Comparison) -> list[str]:
    parts: list[str] = []
    for name, kept in comparison.forgetting.items():
        rows, worse = [], []
        for part, found in kept.items():
            told = _forgotten(found, comparison)
            rows.append([part, shown("", told["before"]), shown("", told["after"]), shown("", told["change"])])
            worse += [part] if told["forgotten"] else []
        parts += [f"## {t('What {name} forgot', name=name)}\n"]
        parts += [markdown([t("text"), t("bits per byte before"), t("after"), t("change")], rows)]
        if worse:
            message = (
                "Forgotten: {parts}, over {share} % more bits than before. Try replay (data.replay=FILE mixes general "
                "rows into the tuning rows), fewer epochs, a lower learning rate, or a lower rank."
            )
            parts.append(f"**{t(message, parts=', '.join(worse), share=round(100 * THRESHOLD))}**\n")
        else:
            parts.append(t("Nothing here rose by over {share} % beyond chance.", share=round(100 * THRESHOLD)) + "\n")
    return parts


def _regressions(comparison: Comparison, key: str, against: str) -> list[str]:
    found = regressions(comparison, key, against)
    title = f"## {t('Where {name} is worse than {against}', name=key, against=label(against))}\n"
    if not found:
        return [title, t("On no row.") + "\n"]
    head = [t("row"), t("asked"), t("expected"), label(against), key]
    rows = [[one["id"], *(_said(one[name]) for name in ("asked", "gold", "before", "after"))] for one in found]
    return [title, markdown(head, rows)]
