"""One recipe by several methods, side by side: the same rows, budget and seeds.

    weitiao sweep recipes/mine.yaml --methods lora,adalora,prefix_tuning --seeds 0,1
    weitiao sweep recipes/mine.yaml --methods lora,full --minutes 5
    weitiao sweep recipes/mine.yaml --methods "lora,lora dora=true,peft kind=IA3,full train.learning_rate=1e-4"

Every run is a process of its own, so that its memory can be measured and a failure stays its own. A run that has
finished is not run again: after a stop the same command goes on. ``sweep.md`` and ``sweep.png`` lie in the output.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from weitiao import config, recipe
from weitiao.errors import InputError, RunError, redact, say, t
from weitiao.evaluate.compare import markdown
from weitiao.evaluate.plot import scatter
from weitiao.methods import METHODS, PRESETS
from weitiao.plan.report import duration, size
from weitiao.runs import Run, is_run, write_atomic

PROBE_STEPS = 6  # of a short run that finds out how many steps fit into --minutes


def verb(
    context: typer.Context,
    words: recipe.Words = None,
    methods: Annotated[
        str,
        typer.Option(
            help="methods by name, each with options of its own after blanks, such as dora=true or "
            "train.learning_rate=1e-4; commas between"
        ),
    ] = "",
    seeds: Annotated[str, typer.Option(help="seeds, with commas between; each method runs with each")] = "0",
    steps: Annotated[int | None, typer.Option(min=1, help="budget: optimiser steps of each run")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="budget: tokens read by each run")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="budget: minutes of training of each run")] = None,
    as_json: recipe.AsJson = False,
) -> None:
    """Run a recipe by several methods and compare what they reach and what they cost."""
    values, seed_list = _tree(words or ()), _numbers(seeds)
    names = [" ".join(name.split()) for name in methods.split(",") if name.strip()]
    known, problems = (*METHODS, *PRESETS), []
    for name in names:
        try:
            config.build(recipe.Recipe, _part(values, name, seed_list[0]))
        except InputError as error:
            missing = t('no method "{name}" ({names})', name=name.split()[0], names=", ".join(known))
            found = error.problems if name.split()[0] in known else [missing]
            problems += ["--methods: " + problem for problem in found]
    if not names:
        problems.append(t("--methods: name some of {names}", names=", ".join(known)))
    if sum(budget is not None for budget in (steps, tokens, minutes)) > 1:
        problems.append(t("--steps, --tokens and --minutes are three ways to say one budget; give one of them"))
    if problems:
        raise InputError(problems)
    found = sweep(values, names, seed_list, steps=steps, tokens=tokens, minutes=minutes,
                  generators=getattr(context.obj, "generators", {}))  # fmt: skip
    if as_json:
        print(json.dumps(found, ensure_ascii=False))


def sweep(
    values: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    steps: int | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    generators: recipe.Generators | None = None,
) -> list[dict[str, Any]]:
    """A row for every method and seed: what ``weitiao train --json`` says of the run, or why there is none.

    A method is a name, ``lora``, or a name with options, ``lora dora=true train.epochs=2``: the method's own, or a
    section's. The recipe's own options of a method hold for that method, and its learning rate for no other: the others
    take their own.
    """
    output, rows = Path(values["output"]), []
    for name in methods:
        for seed in seeds:
            part = _part(values, name, seed).values
            train = part["train"]
            if minutes is not None:
                steps = _steps_in(part, minutes)
            if tokens is not None:
                steps = _steps_for(part, tokens, generators or {})
            if steps is not None:
                part["train"] = train | {"max_steps": steps}
            say("sweep: {method}, seed {seed}", method=name, seed=seed)
            rows.append({"method": name, "seed": seed, **_row(part)})
            _write(output, rows)
    return rows


def _part(values: Mapping[str, Any], name: str, seed: int) -> config.Tree:
    """The recipe of one run."""
    method, *options = name.split()
    section, train = dict(values.get("method") or {}), dict(values.get("train") or {}) | {"seed": seed}
    if section.get("name", "lora") != method:
        section = {"name": method}
        train.pop("learning_rate", None)
    output = Path(values["output"]) / f"{re.sub(r'[^A-Za-z0-9_]+', '-', name)}-{seed}"
    part = {**values, "method": section, "train": train, "output": str(output)}
    sections = recipe.Recipe.model_fields
    whole = (option.partition(".")[0] in sections and "." in option.partition("=")[0] for option in options)
    return config.read(part, [name if full else f"method.{name}" for name, full in zip(options, whole, strict=True)])


def _tree(words: Sequence[str]) -> dict[str, Any]:
    """The recipe's values as written, checked as a whole."""
    _, tree = recipe.from_words(words)
    if tree.values.get("stages"):
        raise InputError(t("a sweep compares single runs; this recipe has stages"))
    return dict(tree.values)


def _numbers(text: str, option: str = "--seeds") -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(t('{option}: "{text}" is not a list of numbers', option=option, text=text)) from None


def _row(values: Mapping[str, Any]) -> dict[str, Any]:
    """One run, in a process of its own; a run that stands finished is read instead."""
    run = Run(Path(values["output"]))
    result = run.path / "result.json"
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    words = ["--resume", str(run.path)] if is_run(run.path) else [_written(values)]
    command = [sys.executable, "-m", "weitiao", "train", *words, "--json"]
    code, printed, reasons = _watched(command)
    if code:
        return {"error": " ".join(reasons) or t("the process ended with exit code {code}", code=code)}
    row = json.loads(printed.splitlines()[-1])
    plan = json.loads((run.path / "plan.json").read_text(encoding="utf-8"))
    row["trainable_parameters"] = plan["trainable_parameters"]
    row["disk_bytes"] = sum(file.stat().st_size for file in run.final.rglob("*") if file.is_file())
    write_atomic(result, json.dumps(row, ensure_ascii=False))
    return row


def _watched(command: Sequence[str]) -> tuple[int, str, list[str]]:
    """Run ``command`` with its words on our stderr as they come: exit code, stdout, and the lines that name an error. A
    Ctrl-C reaches it too, and it is given the time to write its checkpoint."""
    pipe = subprocess.PIPE
    child: Any = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")
    reasons = []
    try:
        for line in child.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            reasons += [line.strip()] if line.startswith("error: ") else []
        printed = child.stdout.read()  # one line at the end, which a pipe can hold
    finally:
        code = child.wait()
    return code, printed, reasons


def _written(values: Mapping[str, Any]) -> str:
    """The recipe of one run as a file beside its folder."""
    path = Path(values["output"]).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, redact(json.dumps(values, ensure_ascii=False, indent=1)))  # JSON is YAML
    return str(path)


def _steps_in(values: Mapping[str, Any], minutes: float) -> int:
    """Steps that a run takes in ``minutes``, from a few steps of it."""
    probe = Path(values["output"]).with_name(f".{Path(values['output']).name}.probe")
    train = {**values["train"], "max_steps": PROBE_STEPS, "evaluate_every": "none", "save_every": "none"}
    found = _row({**values, "train": train, "output": str(probe), "evaluate": None})
    if "error" in found:
        raise RunError(found["error"])
    seconds = sorted(line["seconds"] for line in Run(probe).metrics() if "loss" in line)
    return max(1, round(60 * minutes / seconds[len(seconds) // 2]))


def _steps_for(values: Mapping[str, Any], tokens: int, generators: recipe.Generators) -> int:
    """Steps after which a run has read ``tokens``, as the plan counts them."""
    from weitiao.plan.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="weitiao-") as scratch:
        plan = prepare(recipe.load(values)[0], generators, Path(scratch)).plan
    return max(1, round(tokens * plan.steps / plan.tokens))


def _write(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """sweep.md and sweep.png, anew after every run."""
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "sweep.md", table(rows))
    good = [row for row in rows if "error" not in row]
    measure = next((name for row in good for name in row["figures"]), "best on validation")
    points = {}
    for name in dict.fromkeys(row["method"] for row in good):
        own = [row for row in good if row["method"] == name]
        values = [_value(row["figures"].get(measure, row["best_metric"])) for row in own]
        if found := [value for value in values if value is not None]:
            points[name] = (own[0]["trainable_parameters"], fmean(found))
    if points:
        scatter(points, output / "sweep.png", "trainable parameters", measure)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Methods down; quality, parameters, memory planned and measured, time and size across."""
    measures = list(dict.fromkeys(name for row in rows for name in row.get("figures") or {}))
    head = [t("method"), *measures, t("best on validation"), t("trainable"), t("peak planned"), t("peak measured"),
            t("time"), t("on disk")]  # fmt: skip
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name and "error" not in row]
        if not own:
            reason = next(row["error"] for row in rows if row["method"] == name)
            lines.append([name, reason, *[""] * (len(head) - 2)])
            continue
        one = own[0]
        lines.append(
            [
                name,
                *(_mean([_value(row["figures"].get(measure)) for row in own]) for measure in measures),
                _mean([row["best_metric"] for row in own]),
                f"{one['trainable_parameters']:,}",
                size(one["planned_host_peak_bytes"]),
                size(one["host_peak_bytes"] or 0),
                duration(fmean(row["seconds"] for row in own)),
                size(one["disk_bytes"]),
            ]
        )
    return markdown(head, lines)


def _value(figure: Any) -> float | None:
    """None for what nothing was measured on."""
    if isinstance(figure, Mapping):
        return figure["value"] if figure.get("count", 1) else None
    return figure


def _mean(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{fmean(found):.3f}" if found else "–"


# ---- a ladder of runs for weitiao scaling ----------------------------------------------------------------------------


def scaling_verb(
    context: typer.Context,
    words: Annotated[
        list[str], typer.Argument(metavar="RUN…|RECIPE KEY=VALUE…", help="finished runs, or the recipe of a ladder")
    ],
    widths: Annotated[str, typer.Option(help="a recipe's sizes: hidden_size, with commas between")] = "",
    tokens: Annotated[str, typer.Option(help="tokens that each size reads, with commas between")] = "",
    held_out: Annotated[
        list[str] | None, typer.Option(help="a run, or WIDTHxTOKENS of the recipe, that checks the prediction")
    ] = None,
    predict: Annotated[
        list[str] | None, typer.Option(help="PARAMETERSxTOKENS of a run whose loss is to be predicted; may be repeated")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="a folder for scaling.md, .json, .html and .png")] = None,
    as_json: recipe.AsJson = False,
) -> None:
    """Fit L(N, D) to several runs, predict a larger one, say where more pays; a recipe runs its ladder first."""
    from weitiao.evaluate import scaling

    larger = [_pair(text, "--predict") for text in predict or ()]
    if all(is_run(word) for word in words):
        folders, checks = [Path(word) for word in words], [Path(word) for word in held_out or ()]
    else:
        values, generators = _tree(words), getattr(context.obj, "generators", {})
        rungs = [(width, count) for width in _numbers(widths, "--widths") for count in _numbers(tokens, "--tokens")]
        others = [(int(width), int(count)) for width, count in (_pair(text, "--held-out") for text in held_out or ())]
        folders, checks = (ladder(values, some, generators) for some in (rungs, others))
        output = output or Path(values["output"])
    found = scaling.fit([scaling.point(Run.open(folder)) for folder in folders])
    checked = [scaling.point(Run.open(folder)) for folder in checks]
    told = scaling.as_dict(found, larger, checked) | {"advice": scaling.advice(found)}
    text = scaling.report(found, told)
    if output is not None:
        scaling.write(output, found, told, text)
        say("report: {path}", path=output / "scaling.html")
    print(json.dumps(told, ensure_ascii=False) if as_json else text, end="\n" if as_json else "")


def ladder(values: Mapping[str, Any], rungs: Sequence[tuple[int, int]], generators: recipe.Generators) -> list[Path]:
    """The run folders of a recipe at each (width, tokens), run where they have not finished; a stopped ladder goes on.
    RunError names the runs that failed, InputError a recipe whose model cannot be widened."""
    parts = {(width, count): _rung(values, width, count) for width, count in rungs}
    for part in parts.values():
        recipe.check(recipe.load(part)[0], generators=generators)
    failed = []
    for (width, count), part in parts.items():
        steps = _packed_steps(part, count) or _steps_for(part, count, generators)
        part["train"] = {**part["train"], "max_steps": steps, "evaluate_every": -(-steps // 4)}
        say("ladder: width {width}, {tokens} tokens", width=width, tokens=f"{count:,}")
        row = _row(part)
        failed += [f"{part['output']}: {row['error']}"] if "error" in row else []
    if failed:
        raise RunError(failed)
    return [Path(part["output"]) for part in parts.values()]


def _rung(values: Mapping[str, Any], width: int, tokens: int) -> dict[str, Any]:
    model = dict(values.get("model") or {})
    if not isinstance(model.get("config"), Mapping):
        raise InputError(t("model.config: a ladder needs the shape of a new model"))
    model["config"] = widened(model["config"], width)
    output = str(Path(values["output"]) / f"{width}x{tokens}")
    return {**values, "model": model, "train": dict(values.get("train") or {}), "output": output}


def widened(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A model's shape at another width: heads of the same size, more of them, an MLP of the same proportion."""
    names = ("n_embd", "n_head") if "n_embd" in config else ("hidden_size", "num_attention_heads")
    if not all(isinstance(config.get(name), int) for name in names):
        raise InputError(t("model.config: a ladder changes {names}, which are not there", names=", ".join(names)))
    old, heads = (config[name] for name in names)
    size = config.get("head_dim") or old // heads
    if width < size or width % size:
        raise InputError(t("--widths: {width} is no multiple of the {size} of a head", width=width, size=size))
    changed = {names[0]: width, names[1]: width // size}
    if "num_key_value_heads" in config:
        changed["num_key_value_heads"] = max(1, config["num_key_value_heads"] * width // old)
    for name in ("intermediate_size", "n_inner"):
        if isinstance(config.get(name), int):
            changed[name] = round(config[name] * width / old)
    return {**config, **changed}


def _packed_steps(values: Mapping[str, Any], tokens: int) -> int | None:
    """Steps that read ``tokens`` where rows are packed to one length; None where they are not."""
    options = recipe.load(values)[0]
    packed = options.task.pack_tokens
    return max(1, round(tokens / (packed * options.train.batch_size))) if packed else None


def _pair(text: str, option: str) -> tuple[float, float]:
    """``1e6x2e7`` as two numbers."""
    left, _, right = text.lower().partition("x")
    try:
        pair = float(left), float(right)
    except ValueError:
        pair = (0.0, 0.0)
    if min(pair) <= 0:
        message = '{option}: "{text}" is not two numbers with an x between, such as 1e6x2e7'
        raise InputError(t(message, option=option, text=text))
    return pair
