"""Plan against fact: the report of a finished run.

report(recipe, run, ready, done, figures={})        # report.md, report.json and loss.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from weitiao.errors import InputError, RunError, say, t
from weitiao.evaluate import summary
from weitiao.evaluate.compare import listing, markdown, shown
from weitiao.evaluate.plot import curves
from weitiao.evaluate.tasks import evaluate
from weitiao.generate.toolset import save_toolset
from weitiao.methods.io import Tuned, open_model, save
from weitiao.plan import history
from weitiao.plan.checks import Sections, measured_on
from weitiao.plan.curves import judged
from weitiao.plan.need import Plan, peak_bytes
from weitiao.plan.prepare import Prepared
from weitiao.plan.report import duration, size
from weitiao.runs import Run, command, folder_bytes
from weitiao.train import checkpoint
from weitiao.train.loop import Fit

SHOWN_VALIDATIONS = 50
LOSS = (
    "The loss says how far the model is from the rows: lower is better. Training falls as the rows are learnt; "
    "validation, on rows that are not trained on, is what counts. Where it rises while training falls, the rows are "
    "being learnt by heart."
)
INTERVAL = (
    "An interval says where the value would lie for nineteen in twenty other sets of as many cases; two values whose "
    "intervals overlap may differ by chance. Whether tuning was worth it: weitiao eval compare."
)


@dataclass(frozen=True)
class Result:
    """What a run came to. ``peak_bytes`` is the process's highest resident size, or None where it cannot be told;
    ``figures`` are those of the recipe's evaluation."""

    run: Run
    fit: Fit
    plan: Plan
    seconds: float
    peak_bytes: int | None
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as ``weitiao train --json`` prints it."""
        return {
            "run": str(self.run.path),
            "result": str(self.run.final),
            "steps": self.fit.steps,
            "best_step": self.fit.best_step,
            "best_metric": self.fit.best_metric,
            "seconds": round(self.seconds, 3),
            "planned_seconds": self.plan.total_seconds,
            "host_peak_bytes": self.peak_bytes,
            "planned_host_peak_bytes": self.plan.host_peak_bytes,
            "figures": self.figures,
        }


def measured(recipe: Sections, run: Run, tuned: Tuned) -> dict[str, Any]:
    """The figures of the recipe's evaluation; what was predicted goes to ``predictions.jsonl``."""
    if recipe.evaluate is None:
        return {}
    pictures = recipe.evaluate.pictures or str(run.path)
    options = recipe.evaluate.model_copy(update={"data": measured_on(recipe), "pictures": pictures})
    say("measuring {task} on {data}", task=options.task, data=options.data)
    found = evaluate(tuned, options)
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in found.predictions)
    run.write("predictions.jsonl", "".join(lines))
    return dict(found.figures)


def finished(run: Run) -> Result:
    """What a finished run came to, from what it left; its checkpoints may have been deleted. Nothing is done."""
    say("{path}: the run is finished; nothing is left to do", path=run.path)
    path, _ = checkpoint.newest(run.checkpoints)
    best = (checkpoint.facts(path).get("best") if path else None) or {}
    steps = max((line["step"] for line in run.metrics()), default=0)
    plan = Plan.of(json.loads((run.path / "plan.json").read_text(encoding="utf-8")))
    return Result(run, Fit(steps, best.get("step"), best.get("metric")), plan, seconds=0.0, peak_bytes=None)


def left(recipe: Sections, run: Run, ready: Prepared, done: Fit, model: Any, sharded: bool) -> dict[str, Any]:
    """Save the result of a run with all that goes with it, measure it, report; the figures. ``sharded``: other
    processes held parts of ``model``, so that what is measured is what was saved."""
    base = "" if recipe.model.config is not None else ready.model.path
    final = run.adapter if recipe.method.saves == "adapter" else run.model
    save(model, recipe.method, ready.tokenizer, ready.renderer, final, base)
    save_toolset(final, ready.tools)
    tuned = Tuned(model.eval(), ready.tokenizer, ready.renderer, recipe.method, base)
    figures = measured(recipe, run, open_model(final) if sharded and recipe.evaluate else tuned)
    report(recipe, run, ready, done, figures, recipe.method.outcome(model))
    say("done: {path}", path=final)
    return figures


def report(
    recipe: Sections,
    run: Run,
    ready: Prepared,
    done: Fit,
    figures: Mapping[str, Any],
    outcome: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write ``loss.png`` and ``report.md``: what was run, plan against fact, the curves, the measures, and the commands
    that go on from here; ``report.json`` has the same for programs, and for the summary of ``weitiao report``.
    ``outcome``: what the method says of its result."""
    plan, metrics, peak = ready.plan, run.metrics(), peak_bytes()
    curves(metrics, run.path / "loss.png")
    held = done.disk_bytes + (done.paged_bytes if plan.device == "cpu" else 0)
    planned, took = plan.total_seconds, sum(record.get("seconds", 0.0) for record in metrics)
    asked = {"method": recipe.method.model_dump()["name"], "optimizer": recipe.train.optimizer}
    history.append(run.path, asked, plan, peak, took)
    cost = {
        "memory": {"planned": size(plan.host_peak_bytes), "measured": "–" if peak is None else size(peak)},
        "time": {"planned": "–" if planned is None else duration(planned), "measured": duration(took)},
        "disk": {"planned": size(plan.disk_bytes), "measured": size(max(held, folder_bytes(run.path)))},
    }
    names = {"memory": t("peak memory"), "time": t("time"), "disk": t("disk")}
    compared = [[names[key], one["planned"], one["measured"]] for key, one in cost.items()]
    parts = [
        f"# {run.path.absolute().name}\n",
        markdown(["", ""], [*_facts(recipe, ready, done), *map(list, outcome.items())]),
        f"## {t('Plan and fact')}\n",
        t("What was foreseen before any weight was read, and what it came to.") + "\n",
        markdown(["", t("planned"), t("measured")], compared),
        f"## {t('Loss')}\n\n![loss](loss.png)\n",
        t(LOSS) + "\n",
        _judgement(run, metrics, done),
        _validations(metrics),
    ]
    if figures:
        parts += [f"## {t('Measures')}\n", listing(figures), t(INTERVAL) + "\n"]
    drawn = [name for name in ("confusion", "calibration") if (run.path / f"{name}.png").is_file()]
    parts += [f"![{name}]({name}.png)\n" for name in drawn]
    labels = recipe.task.name == "classify"
    measure = command("weitiao", "eval", run.path, "--task", "classify" if labels else "perplexity", "--data", "FILE")
    chat = [] if labels else [command("weitiao", "chat", run.path)]
    parts.append("\n".join([f"## {t('Next')}", "", "```sh", *chat, measure, "```", ""]))
    told = _told(recipe, ready, done, metrics) | {"cost": cost, "figures": figures, "outcome": dict(outcome)}
    run.write("report.json", {"run": str(run.path), "result": str(run.final), **told})
    return run.write("report.md", "\n".join(part for part in parts if part))


def _told(recipe: Sections, ready: Prepared, done: Fit, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of ``report.json``: numbers and names, no sentences, so that they are told in any language."""
    options = recipe.method.model_dump(mode="json")
    classify, chat = recipe.task.name == "classify", recipe.task.name not in ("classify", "pretrain")
    task = "classify" if classify else "perplexity" if not chat else "dialogue" if ready.tools else "generate"
    losses = [line["validation"].get("loss") for line in metrics if line.get("validation")]
    return {
        "base": ready.model.path if recipe.model.config is None else None,
        "method": options.pop("name"),
        "method_options": options,
        "saves": recipe.method.saves,
        "trainable_parameters": ready.plan.trainable_parameters,
        "parameters": ready.plan.parameters,
        "data": [one.path for one in recipe.data.sources],
        "examples": len(ready.train),
        "epochs": metrics[-1]["epoch"] if metrics else 0.0,
        "steps": done.steps,
        "best_step": done.best_step,
        "best_by": recipe.train.best,
        "best_metric": done.best_metric,
        "curves": (verdict := judged(metrics)) and asdict(verdict),
        "validation_losses": [loss for loss in losses if isinstance(loss, float)],
        "task": recipe.evaluate.task if recipe.evaluate else task,
        "test": measured_on(recipe),
        "chats": not classify,
    }


def _facts(recipe: Sections, ready: Prepared, done: Fit) -> list[list[str]]:
    """What was tuned, how, on how much, and which step was the best."""
    method = ", ".join(f"{name} {value}" for name, value in recipe.method.model_dump().items())
    best = "–" if done.best_step is None else f"{done.best_step} ({recipe.train.best} {done.best_metric:.4f})"
    return [
        [t("base model"), ready.model.path if recipe.model.config is None else t("new, with random weights")],
        [t("method"), method],
        [t("trained parameters"), f"{ready.plan.trainable_parameters:,} / {ready.plan.parameters:,}"],
        [t("training examples"), str(len(ready.train))],
        [t("steps"), str(done.steps)],
        [t("best step"), best],
    ]


def _judgement(run: Run, metrics: Sequence[Mapping[str, Any]], done: Fit) -> str:
    """What the curves say, and where the weights of the step to use are."""
    verdict = judged(metrics)
    if verdict is None:
        return ""
    kept = run.checkpoints / f"{checkpoint.PREFIX}{verdict.step:08d}"
    values = {"step": verdict.step, "epoch": f"{verdict.epoch:.3g}"}
    if verdict.step == (done.best_step or done.steps):
        use = t("the step to use is {step} (epoch {epoch}), which is the result", **values)
    elif kept.is_dir():
        use = t("the step to use is {step} (epoch {epoch}): {path}", path=kept, **values)
    else:
        use = t("the step to use would be {step} (epoch {epoch}); its checkpoint was not kept (train.keep)", **values)
    return f"{verdict.text}\n\n{use}\n"


def _validations(metrics: Sequence[Mapping[str, Any]]) -> str:
    """A table of the last validations, a column for each measure."""
    records = [record for record in metrics if record.get("validation")][-SHOWN_VALIDATIONS:]
    if not records:
        return ""
    names = list(records[-1]["validation"])
    rows = []
    for record in records:
        values = [_value(name, record["validation"].get(name)) for name in names]
        rows.append([str(record["step"]), f"{record['epoch']:.2f}", *values])
    return markdown([t("step"), t("epoch"), *names], rows)


def _value(name: str, value: Any) -> str:
    return f"{value:.4f}" if name == "loss" and isinstance(value, float) else shown(name, value)


def verb(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """What a run came to, for a reader who has never tuned a model: on the terminal, and as report.html."""
    run = Run.open(folder)
    run = run.stages[-1] if run.stages else run
    facts, compared = summary.read(run.path)
    answers = summary.summary(facts, compared) if facts else []
    if as_json:
        lines = run.metrics()
        steps = [line for line in lines if "loss" in line]
        measured = [line["validation"] for line in lines if line.get("validation")]
        found = {**(facts or {}), "run": str(run.path), "finished": run.finished}
        found |= {"last_step": steps[-1] if steps else None, "validation": measured[-1] if measured else None}
        found |= {"curves": (v := judged(lines)) and asdict(v), "answers": [asdict(one) for one in answers]}
        print(json.dumps(found | {"compare": compared}, ensure_ascii=False))
    elif (run.path / "report.md").is_file():
        short = summary.text(answers, facts) if facts else ""
        print(short + (run.path / "report.md").read_text(encoding="utf-8"), end="")
        page(run)
    else:
        again = command("weitiao", "train", "--resume", folder)
        raise InputError(t("{path}: the run has not finished; go on with: {command}", path=run.path, command=again))


def page(run: Run) -> None:
    """Write ``report.html``, one page without anything beside it; where the folder cannot be written to, that is
    said."""
    try:
        say("as a page: {path}", path=summary.write_run_page(run.path))
    except RunError as error:
        say("{line}", line=error)
