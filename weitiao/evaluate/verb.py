"""The verbs ``weitiao eval``, measure a run or a model on a file, and ``weitiao eval compare``, was tuning worth it.

weitiao eval runs/hotel-lora --task dialogue --data test.jsonl --predictions out.jsonl --json
weitiao eval compare runs/a runs/b URL#MODEL --task generate --data test.jsonl --shot-data train.jsonl
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from weitiao.config import build
from weitiao.errors import InputError, say, t
from weitiao.evaluate.endpoint import open_system
from weitiao.evaluate.tasks import TASKS, EvaluateOptions, Evaluation, evaluate
from weitiao.runs import is_run, write_atomic

Task = Annotated[str, typer.Option(metavar=f"{'|'.join(TASKS)}|FILE.py:FUNCTION", help="what is measured")]
Data = Annotated[str, typer.Option(help="the file that is measured on")]
Judge = Annotated[str | None, typer.Option(help="task judge: the model that judges; a run, a model or URL#MODEL")]
PerByte = Annotated[bool, typer.Option("--per-byte", help="task choice: what counts is likelihood per byte")]
General = Annotated[
    list[str] | None,
    typer.Option(help="rows on which to see what was forgotten: a file, or generate:NAME; may be repeated"),
]
NewTokens = Annotated[int, typer.Option(help="tokens after which an answer is cut")]
BatchSize = Annotated[int, typer.Option(help="prompts answered together")]
Seed = Annotated[int, typer.Option(help="seed of the intervals and of the choice of examples")]


def verb(
    model: Annotated[str, typer.Argument(help="a run, an adapter or model folder, a model's name, or URL#MODEL")],
    task: Task,
    data: Data,
    shots: Annotated[int, typer.Option(help="example dialogues put before each conversation")] = 0,
    shot_data: Annotated[str | None, typer.Option(help="the file that the example dialogues come from")] = None,
    predictions: Annotated[str | None, typer.Option(help="write what was predicted here, a JSON object a line")] = None,
    pictures: Annotated[str | None, typer.Option(help="classify: a folder for its two pictures")] = None,
    thoughts: Annotated[bool, typer.Option("--thoughts", help="tell the model to think before it answers")] = False,
    per_byte: PerByte = False,
    colloquial: Annotated[bool, typer.Option("--colloquial", help="task hotel: the guests in other words")] = False,
    judge: Judge = None,
    max_new_tokens: NewTokens = 256,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="the figures as one JSON object")] = False,
) -> None:
    """Measure a run or a model."""
    options = build(
        EvaluateOptions,
        {
            "task": task,
            "data": data,
            "shots": shots,
            "shot_data": shot_data,
            "pictures": pictures,
            "thoughts": thoughts,
            "per_byte": per_byte,
            "colloquial": colloquial,
            "judge": judge,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "seed": seed,
        },
    )
    from weitiao.evaluate.compare import detailed, listing

    evaluation = evaluate(open_system(model), options)
    if predictions is not None:
        write_predictions(predictions, evaluation.predictions)
        say("predictions: {path}", path=predictions)
    if as_json:
        found = {"model": model, "task": task, "data": data, **evaluation.figures, **evaluation.details}
        if evaluation.cost is not None:
            found["cost_per_1000_answers"] = evaluation.cost.per_thousand()
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(listing(evaluation.figures) + detailed(evaluation.details), end="")


def compare_verb(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="runs, folders, models' names, or URL#MODEL")],
    task: Task,
    data: Data,
    base: Annotated[str | None, typer.Option(help="the untuned model; by default the first one's own base")] = None,
    shot_data: Annotated[str | None, typer.Option(help="training rows, for examples in the base's prompt")] = None,
    shots: Annotated[str, typer.Option(help="numbers of examples to choose from, with commas between")] = "1,2,4",
    thoughts: Annotated[bool, typer.Option(help="also the base told to think first")] = True,
    forgetting: Annotated[bool, typer.Option(help="also what tuning forgot of general text")] = True,
    general: General = None,
    output: Annotated[Path | None, typer.Option(help="a folder for the report; default: RUN/compare")] = None,
    per_byte: PerByte = False,
    judge: Judge = None,
    max_new_tokens: NewTokens = 256,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="everything as one JSON object")] = False,
) -> None:
    """Compare models with their untuned base: was tuning worth it, and what was forgotten?"""
    values = {"task": task, "data": data, "shot_data": shot_data, "judge": judge, "seed": seed, "per_byte": per_byte}
    options = build(EvaluateOptions, {**values, "max_new_tokens": max_new_tokens, "batch_size": batch_size})
    from weitiao.evaluate import contrast
    from weitiao.evaluate.summary import write_run_page
    from weitiao.evaluate.systems import compare

    folder = output or (Path(models[0]) / "compare" if is_run(models[0]) else None)
    comparison = compare(
        models,
        options,
        base,
        shots=_numbers(shots),
        thoughts=thoughts,
        forgetting=forgetting,
        texts=general or (),
        generators=getattr(context.obj, "generators", {}),
        cache=folder / "answers.jsonl" if folder else None,
    )
    found, text = contrast.as_dict(comparison), contrast.report(comparison)
    if folder is not None:
        _write(folder, comparison.systems, found, text)
        if output is None and (folder.parent / "report.md").is_file():  # the run's own page shows it too
            write_run_page(folder.parent)
        say("report: {path}", path=folder / "compare.html")
    print(json.dumps(found, ensure_ascii=False) if as_json else text, end="\n" if as_json else "")


def _numbers(text: str) -> list[int]:
    """``1,2,4`` as numbers."""
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise InputError(t('--shots: "{text}" is not a list of numbers', text=text)) from None


def _write(folder: Path, systems: Mapping[str, Evaluation], found: Mapping[str, Any], text: str) -> None:
    """compare.md, .json, .html and .png, and what each system answered."""
    from weitiao.evaluate.page import write_page
    from weitiao.evaluate.plot import intervals

    shown = {
        key: evaluation.figures[found["measure"]]
        for key, evaluation in systems.items()
        if isinstance(evaluation.figures.get(found["measure"]), Mapping)
    }
    folder.mkdir(parents=True, exist_ok=True)
    if shown:
        intervals(shown, folder / "compare.png", found["measure"])
        text += f"\n![{found['measure']}](compare.png)\n"
    for number, (key, evaluation) in enumerate(systems.items()):
        name = key if key.startswith("base_") else f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', key).strip('-')}"
        write_predictions(folder / f"predictions-{name}.jsonl", evaluation.predictions)
    write_atomic(folder / "compare.json", json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    write_atomic(folder / "compare.md", text)
    write_page(folder / "compare.md")


def write_predictions(path: str | Path, lines: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
