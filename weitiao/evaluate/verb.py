"""The verb ``weitiao eval``: measure a run or a model on a file.

weitiao eval runs/hotel-lora --task dialogue --data test.jsonl --predictions out.jsonl --json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from weitiao.config import build
from weitiao.errors import say
from weitiao.evaluate.tasks import TASKS, EvaluateOptions, evaluate
from weitiao.runs import write_atomic


def verb(
    model: Annotated[str, typer.Argument(help="a run, an adapter or model folder, or a model's name")],
    task: Annotated[str, typer.Option(help=f"what is measured: {', '.join(TASKS)}")],
    data: Annotated[str, typer.Option(help="the file that is measured on")],
    shots: Annotated[int, typer.Option(help="example dialogues put before each conversation")] = 0,
    shot_data: Annotated[str | None, typer.Option(help="the file that the example dialogues come from")] = None,
    predictions: Annotated[str | None, typer.Option(help="write what was predicted here, a JSON object a line")] = None,
    pictures: Annotated[str | None, typer.Option(help="classify: a folder for its two pictures")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens after which an answer is cut")] = 256,
    batch_size: Annotated[int, typer.Option(help="prompts answered together")] = 32,
    seed: Annotated[int, typer.Option(help="seed of the intervals and of the choice of examples")] = 0,
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
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "seed": seed,
        },
    )
    from weitiao.evaluate.compare import listing
    from weitiao.methods.io import open_model

    evaluation = evaluate(open_model(model), options)
    if predictions is not None:
        write_predictions(predictions, evaluation.predictions)
        say("predictions: {path}", path=predictions)
    if as_json:
        print(json.dumps({"model": model, "task": task, "data": data, **evaluation.figures}, ensure_ascii=False))
    else:
        print(listing(evaluation.figures), end="")


def write_predictions(path: str | Path, lines: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
