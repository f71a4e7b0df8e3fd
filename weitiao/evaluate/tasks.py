"""What can be measured: a table from a task's name to the function that measures it.

    options = EvaluateOptions(task="dialogue", data="test.jsonl", shots=2, shot_data="train.jsonl")
    evaluation = evaluate(open_model("runs/hotel-lora"), options)
    evaluation.figures["slot_f1"]                   # {"value": 0.97, "low": 0.95, "high": 0.98, "count": 612}

A task's function takes the tuned model and the options and returns an ``Evaluation``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from weitiao.config import Options
from weitiao.errors import InputError, say, t
from weitiao.models import heads

if TYPE_CHECKING:
    from weitiao.methods.io import Tuned

TASKS = {
    "perplexity": "weitiao.evaluate.perplexity:task",
    "dialogue": "weitiao.evaluate.dialogue:task",
    "hotel": "weitiao.evaluate.hotel:evaluate",
    "classify": "weitiao.evaluate.classify:task",
}
LABEL_MEASURES = ("accuracy", "macro_f1", "micro_f1", "r2")  # of task classify, by which a checkpoint can be chosen


class EvaluateOptions(Options):
    """What is measured, on which file, and how answers are made."""

    task: Literal["perplexity", "dialogue", "hotel", "classify"] = Field(
        description="perplexity: loss on text or conversations; dialogue: calls, slots and answers of conversations; "
        "hotel: the hotel turns of CrossWOZ; classify: the labels of texts"
    )
    data: str = Field(
        default="",
        description="the file that is measured on; in a recipe it may be left out for data.test or data.folder",
    )
    shots: int = Field(default=0, ge=0, description="example dialogues put before each conversation")
    shot_data: str | None = Field(default=None, description="the file that the example dialogues come from")
    max_new_tokens: int = Field(default=256, ge=1, description="tokens after which an answer is cut")
    batch_size: int = Field(default=32, ge=1, description="prompts answered, or rows measured, together")
    pictures: str | None = Field(
        default=None, description="classify: a folder for confusion.png and calibration.png; in a recipe its run"
    )
    samples: int = Field(default=1000, ge=1, description="draws of the bootstrap behind each interval")
    seed: int = Field(default=0, ge=0, description="seed of the bootstrap and of the choice of example dialogues")


@dataclass(frozen=True)
class Evaluation:
    """``figures`` by name (a number, or value, low, high and count), and what was predicted, one JSON object a turn."""

    figures: dict[str, Any]
    predictions: list[dict[str, Any]] = field(default_factory=list)


def evaluate(tuned: Tuned, options: EvaluateOptions) -> Evaluation:
    """Measure ``tuned`` (of ``methods.io.open_model``) as ``options`` say. InputError where the data cannot be used."""
    if not options.data:
        raise InputError(t("data: name the file to measure on"))
    if options.shots and not options.shot_data:
        raise InputError(
            t("shots = {shots} needs shot_data, the file that the examples come from", shots=options.shots)
        )
    if options.task != "classify":
        heads.refuse(tuned.model.config, tuned.base)
    module, _, name = TASKS[options.task].partition(":")
    task: Callable[[Tuned, EvaluateOptions], Evaluation] = getattr(import_module(module), name)
    return task(tuned, options)


def answers(tuned: Tuned, prompts: Sequence[Sequence[int]], options: EvaluateOptions) -> list[str]:
    """The likeliest answer to every prompt (token ids), with a progress bar; how many were cut is said."""
    from rich.console import Console
    from rich.progress import Progress

    from weitiao.generate.engine import generate
    from weitiao.generate.sample import SampleOptions

    console = Console(stderr=True)
    pad_id: Any = tuned.tokenizer.pad_token_id  # load_tokenizer sees to it that there is one
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(t("answering"), total=len(prompts))
        done = generate(
            tuned.model,
            prompts,
            SampleOptions(max_new_tokens=options.max_new_tokens),
            stop_ids=tuned.renderer.stop_ids,
            pad_id=pad_id,
            tokenizer=tuned.tokenizer,
            on_done=lambda row, completion: progress.advance(bar),
            batch_size=options.batch_size,
        )
    cut = sum(completion.finish == "length" for completion in done)
    if cut:
        message = "{cut} of {total} answers were cut at {tokens} tokens (max_new_tokens, or the model's last position)"
        say(message, cut=cut, total=len(done), tokens=options.max_new_tokens)
    return [completion.text for completion in done]
