"""A run told to somebody who has never tuned a model: seven questions, each with an answer out of what the run left.

    facts, compared = read(Path("runs/first"))      # report.json and compare/compare.json of the run
    told = summary(facts, compared)
    text(told, facts)                               # as Markdown, with the words that are used
    write_run_page(Path("runs/first"))              # before the report and the comparison, as report.html

Nothing is measured here, and what was not measured is said, with the command that would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weitiao.errors import t
from weitiao.evaluate.bootstrap import Figure
from weitiao.evaluate.compare import listing, shown
from weitiao.evaluate.contrast import Difference, label
from weitiao.evaluate.page import write_page
from weitiao.evaluate.systems import LABELS
from weitiao.evaluate.tasks import FEW
from weitiao.runs import command

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A question that a reader of the report has, and its answer as Markdown."""

    question: str
    answer: str


def read(run: Path) -> tuple[Facts | None, Facts | None]:
    """The facts of a finished run, and its comparison; None for what is not there, or was cut."""
    found = []
    for path in (run / "report.json", run / "compare" / "compare.json"):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            found.append(None)
    facts, compared = found
    return facts and facts | {"run": str(run)}, compared  # it may lie elsewhere by now


def write_run_page(run: Path) -> Path:
    """Write ``report.html`` of a run: in short, its report and, if it was compared, the comparison."""
    facts, compared = read(run)
    short = text(summary(facts, compared), facts) if facts else ""
    more = run / "compare" / "compare.md"
    return write_page(run / "report.md", [more] if more.is_file() else [], before=short)


def summary(facts: Facts, compared: Facts | None) -> list[Answer]:
    """The questions in the order in which they are asked; ``compared`` is None where the run was never compared."""
    against = _against(compared)
    return [
        Answer(t("What was the base, and what was tuned?"), _tuned(facts)),
        Answer(t("Is it better than not tuning at all?"), _better(facts, compared, against)),
        Answer(t("Is the difference real?"), _real(compared, against)),
        Answer(t("What did it forget?"), _forgotten(compared)),
        Answer(t("Which checkpoint should be used?"), _checkpoint(facts)),
        Answer(t("What did it cost?"), _cost(facts, compared)),
        Answer(t("What should be tried next?"), _next(facts, compared, against)),
    ]


def text(answers: Sequence[Answer], facts: Facts) -> str:
    """The answers as Markdown, then the meaning of words that they use."""
    name = Path(facts["run"]).name
    parts = [f"# {t('In short: {name}', name=name)}\n"]
    parts += [f"## {one.question}\n\n{one.answer}\n" for one in answers]
    words = [f"- **{word}**: {meaning}" for word, meaning in _words().items()]
    return "\n".join([*parts, f"## {t('Words')}\n", *words, ""])


def _words() -> dict[str, str]:
    return {
        t("base"): t("the model before tuning, as it was downloaded or shipped"),
        t("tuning"): t("showing the base rows of questions with their answers, and moving it a little towards them"),
        t("step"): t("one such move, made after a handful of rows; an epoch is once through all of them"),
        t("loss"): t("how surprised the model is by the right answers: lower is better"),
        t("validation"): t("rows that are kept out of tuning, to see whether it learns or only memorises"),
        t("interval"): t("where a value would lie for nineteen in twenty other sets of as many test rows"),
    }


def _against(compared: Facts | None) -> Difference | None:
    """The run less the base at its best, on the measure that matters most; None where that was not measured."""
    if not compared:
        return None
    found = [
        Difference(
            **{name: one[name] for name in ("system", "against", "measure", "ours", "theirs")},
            gain=Figure(one["value"], one["low"], one["high"], one["count"]),
        )
        for one in compared.get("differences", [])
        if one["measure"] == compared["measure"] and one["against"] in LABELS and one["system"] == _own(compared)
    ]
    return min(found, key=lambda one: one.gain.value, default=None)


def _own(compared: Facts | None) -> str:
    """The run's own name in its comparison: the first that is none of the base's."""
    return next((name for name in (compared or {}).get("systems", {}) if name not in LABELS), "")


def _kept(compared: Facts | None) -> Facts:
    """What the run kept of each kind of general text; nothing where that was not measured."""
    return (compared or {}).get("forgetting", {}).get(_own(compared), {})


def _tuned(facts: Facts) -> str:
    share = facts["trainable_parameters"] / max(1, facts["parameters"])
    values = {
        "base": facts["base"],
        "all": f"{facts['parameters']:,}",
        "method": facts["method"],
        "count": f"{facts['trainable_parameters']:,}",
        "share": f"{share:.1%}",
        "rows": facts["examples"],
        "steps": facts["steps"],
        "epochs": f"{facts['epochs']:.3g}",
        "result": facts["result"],
    }
    if facts["base"] is None:
        start = t("There was no base: a new model of {all} numbers (parameters) began at random.", **values)
    else:
        start = t("The base is `{base}`, a model of {all} numbers (parameters).", **values)
    if facts["saves"] == "adapter":
        how = t(
            "Method {method} left it as it is and trained {count} numbers beside it ({share}); they are in "
            "`{result}` and work only together with the base.",
            **values,
        )
    else:
        how = t("Method {method} trained {count} numbers ({share}); the whole model is in `{result}`.", **values)
    much = t("It saw {rows} training examples, {epochs} times over, in {steps} steps.", **values)
    return f"{start} {how} {much}"


def _better(facts: Facts, compared: Facts | None, against: Difference | None) -> str:
    if against is None or compared is None:
        parts = [t("`weitiao eval compare` has not been run on it. Ask on rows that were not trained on:")]
        parts.append(f"\n\n```sh\n{_compare_command(facts)}\n```\n")
        if facts.get("figures"):
            parts.append("\n" + t("The run by itself reached this:") + "\n\n" + listing(facts["figures"]))
        elif len(losses := facts.get("validation_losses") or []) > 1:
            message = "On the validation rows the loss went from {first} to {last}."
            parts.append("\n" + t(message, first=f"{losses[0]:.3f}", last=f"{losses[-1]:.3f}"))
        return "".join(parts)
    values = {
        "measure": against.measure,
        "ours": shown(against.measure, against.ours),
        "theirs": shown(against.measure, against.theirs),
        "base": label(against.against),
        "cases": compared["cases"],
    }
    said = (
        t("Yes." if against.gain.value > 0 else "No: it became worse.")
        if against.real
        else t("These test rows cannot tell.")
    )
    figures = t("{measure} is {ours} for this run and {theirs} for {base}, on {cases} test cases.", **values)
    return " ".join([said, figures, _meaning(against.measure)]).strip() + _picture(facts)


def _picture(facts: Facts) -> str:
    drawn = Path(facts["run"]) / "compare" / "compare.png"
    return f"\n\n![{t('systems side by side')}](compare/compare.png)" if drawn.is_file() else ""


def _meaning(measure: str) -> str:
    """What a measure says, in a sentence; nothing for one that is not common."""
    meanings = {
        "exact_match": t("It is the share of answers that are the expected one, letter by letter."),
        "call_exact_match": t("It is the share of turns whose function calls are right in every argument."),
        "slot_f1": t("It says how many arguments of calls are right, neither missing nor too many; 1 is all."),
        "accuracy": t("It is the share of rows that got the right label or choice."),
        "macro_f1": t("It says how well every label is found, rare ones counting as much as common ones; 1 is best."),
        "bleu4": t("It says how many runs of words the answers share with the expected ones; 100 is the same text."),
        "chrf": t("It says how many runs of letters the answers share with the expected ones; 100 is the same text."),
        "task_success": t("It is the share of dialogues in which every call was right."),
        "perplexity": t("It says among how many words the model wavers at each; lower is better."),
        "bits_per_byte": t("It says how many bits the model needs for a byte of the text; lower is better."),
    }
    return meanings.get(measure, "")


def _real(compared: Facts | None, against: Difference | None) -> str:
    if against is None or compared is None:
        return t("Not known without that comparison.")
    low, high = against.gain.low, against.gain.high
    values = {"low": shown(against.measure, low), "high": shown(against.measure, high)}
    message = "On nineteen in twenty other sets of as many rows, the gain would lie between {low} and {high}: "
    ending = (
        t("zero is not among these, so it is no accident of these rows.")
        if against.real
        else t("zero is among these, so it may be an accident of these rows; more test rows would tell.")
    )
    few = "There are fewer than {few} test cases, so that this itself is uncertain."
    warning = " " + t(few, few=FEW) if compared["cases"] < FEW else ""
    return t(message, **values) + ending + warning


def _forgotten(compared: Facts | None) -> str:
    parts = _kept(compared)
    if not parts:
        return t("Not measured. `weitiao eval compare` measures it on general text that no tuning has seen.")
    worse = {name: one for name, one in parts.items() if one["forgotten"]}
    lines = [
        t(
            "{part}: {before} bits per byte before, {after} after ({change})",
            part=name,
            before=f"{one['before']:.3f}",
            after=f"{one['after']:.3f}",
            change=f"{one['after'] / one['before'] - 1:+.0%}" if one["before"] else "–",
        )
        for name, one in parts.items()
    ]
    said = (
        t("Some: text of the following kinds, marked in bold, surprises it clearly more than it surprised the base.")
        if worse
        else t("Nothing that matters: on general text it is as good as the base, within what chance explains.")
    )
    marked = [f"- **{line}**" if name in worse else f"- {line}" for name, line in zip(parts, lines, strict=True)]
    return said + "\n\n" + "\n".join(marked)


def _checkpoint(facts: Facts) -> str:
    curves = facts.get("curves")
    if not curves:
        return t("There are too few steps to say.")
    why = {
        "over-fitting": t("After it the model began to learn the rows by heart: validation got worse."),
        "diverging": t("After it the training went astray: both losses rose."),
        "under-fitting": t("The loss was still falling at the end: more training may help."),
        "plateau": t("From then on nothing changed any more."),
        "sound": t("The loss on the validation rows fell to the end."),
        "unknown": t("Without validations along the way nothing better is known than the last step."),
    }[curves["kind"]]
    step, best = curves["step"], facts["best_step"] or facts["steps"]
    if step == best:
        use = t("Step {step}; it is the result in `{result}`.", step=step, result=facts["result"])
    else:
        message = "The result in `{result}` is step {best}, chosen by {by}; by the validation loss it would be {step}."
        use = t(message, result=facts["result"], best=best, by=facts["best_by"], step=step)
    return f"{use} {why}"


def _cost(facts: Facts, compared: Facts | None) -> str:
    cost = facts["cost"]
    lines = [
        t("{what}: {measured} (planned: {planned})", what=name, measured=one["measured"], planned=one["planned"])
        for name, one in ((t("time"), cost["time"]), (t("memory"), cost["memory"]), (t("disk"), cost["disk"]))
    ]
    systems = (compared or {}).get("systems", {})
    for name, one in systems.items():
        answers = one.get("cost_per_1000_answers")
        if answers and (name in LABELS or name == _own(compared)):
            message = "1,000 answers of {system}: {read} tokens read, {written} written, {seconds} s"
            read, written = (f"{answers[key]:,.0f}" for key in ("prompt_tokens", "new_tokens"))
            system = label(name) if name in LABELS else t("this run")
            lines.append(t(message, system=system, read=read, written=written, seconds=f"{answers['seconds']:,.0f}"))
    return "\n".join(f"- {line}" for line in lines)


def _next(facts: Facts, compared: Facts | None, against: Difference | None) -> str:
    """What follows from the rest, the most urgent first, with commands."""
    recipe, again = Path(facts["run"]) / "recipe.yaml", f"output={facts['run']}-2"
    found: list[tuple[str, str]] = []
    if against is None:
        found.append((t("Compare it with the base."), _compare_command(facts)))
    elif not against.real:
        found.append((t("Measure on more test rows, then decide."), _compare_command(facts)))
    if any(one["forgotten"] for one in _kept(compared).values()):
        words = ["weitiao", "train", recipe, "data.replay=GENERAL.jsonl", again]
        found.append((t("Mix general rows into the tuning rows, lest it forget."), command(*words)))
    epochs = facts["epochs"]
    if (kind := (facts.get("curves") or {}).get("kind")) in ("over-fitting", "diverging"):
        change = f"train.epochs={max(1, epochs / 2):.3g}" if kind == "over-fitting" else "train.learning_rate=1e-4"
        message = t("Train less, or give it more rows.") if kind == "over-fitting" else t("Take smaller steps.")
        found.append((message, command("weitiao", "train", recipe, change, again)))
    elif kind == "under-fitting":
        found.append((t("Train longer."), command("weitiao", "train", recipe, f"train.epochs={2 * epochs:.3g}", again)))
    if against is not None and against.real and against.gain.value < 0:
        words = ["weitiao", "data", "show", *facts["data"][:1], "--check"]
        found.append((t("Look at what the rows teach: tuning made it worse."), command(*words)))
    if facts["chats"]:
        found.append((t("Talk to it."), command("weitiao", "chat", facts["run"])))
    return "\n\n".join(f"{said}\n\n```sh\n{line}\n```" for said, line in found)


def _compare_command(facts: Facts) -> str:
    words = [
        "weitiao",
        "eval",
        "compare",
        facts["run"],
        "--task",
        facts["task"],
        "--data",
        facts["test"] or "TEST.jsonl",
    ]
    return command(*words)
