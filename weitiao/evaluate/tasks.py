"""What can be measured: a table from a task's name to the function that measures it.

    options = EvaluateOptions(task="dialogue", data="test.jsonl", shots=2, shot_data="train.jsonl")
    evaluation = evaluate(open_model("runs/hotel-lora"), options)
    evaluation.figures["slot_f1"]                   # {"value": 0.97, "low": 0.95, "high": 0.98, "count": 612}

A task's function takes the tuned model and the options and returns an ``Evaluation``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from weitiao.config import Options
from weitiao.data.endpoint import Endpoint
from weitiao.errors import InputError, say, t
from weitiao.evaluate.ask import Cost
from weitiao.evaluate.bootstrap import Measure, Resampling
from weitiao.models import heads

if TYPE_CHECKING:
    from weitiao.generate.engine import Completion
    from weitiao.methods.io import Tuned

TASKS = {
    "perplexity": "weitiao.evaluate.perplexity:task",
    "generate": "weitiao.evaluate.generative:task",
    "choice": "weitiao.evaluate.choice:task",
    "dialogue": "weitiao.evaluate.dialogue:task",
    "judge": "weitiao.evaluate.judge:task",
    "hotel": "weitiao.evaluate.hotel:evaluate",
    "classify": "weitiao.evaluate.classify:task",
    "lm-eval": "weitiao.evaluate.harness:task",
}
CUSTOM = "weitiao.evaluate.custom:task"  # FILE.py:FUNCTION
ANSWERED = ("generate", "dialogue", "judge")  # tasks that read answers, which an address can give too
FEW = 30  # cases below which an interval says little
LABEL_MEASURES = ("accuracy", "macro_f1", "micro_f1", "r2")  # of task classify, by which a checkpoint can be chosen


class EvaluateOptions(Options):
    """What is measured, on which file, and how answers are made."""

    task: (
        Literal["perplexity", "generate", "choice", "dialogue", "judge", "hotel", "classify", "lm-eval"]
        | Annotated[str, Field(pattern=r"\.py:[A-Za-z_]\w*$")]
    ) = Field(
        description="perplexity: loss on text or conversations; generate: answers beside the true ones; choice: "
        "which of several answers is likelier; dialogue: calls, slots and answers of conversations; judge: answers "
        "beside the true ones, as another model sees them; hotel: the hotel turns of CrossWOZ; classify: the labels of "
        "texts; on the command line also lm-eval, whose tasks data names, and FILE.py:FUNCTION, a measure of your own"
    )
    data: str = Field(
        default="",
        description="the file that is measured on; in a recipe it may be left out for data.test or data.folder",
    )
    shots: int = Field(default=0, ge=0, description="example dialogues put before each conversation")
    shot_data: str | None = Field(default=None, description="the file that the example dialogues come from")
    thoughts: bool = Field(
        default=False, description="tell the model to think first; only what stands behind its last Answer: counts"
    )
    judge: str | None = Field(default=None, description="judge: the model that judges; a run, a model or URL#MODEL")
    per_byte: bool = Field(
        default=False,
        description="choice: the likeliest answer per byte is the one that counts, not the likeliest whole",
    )
    colloquial: bool = Field(
        default=False, description="hotel: the guests' facilities, types, prices and ratings in other words"
    )
    max_new_tokens: int = Field(default=256, ge=1, description="tokens after which an answer is cut")
    batch_size: int = Field(default=32, ge=1, description="prompts answered, or rows measured, together")
    pictures: str | None = Field(
        default=None, description="classify: a folder for confusion.png and calibration.png; in a recipe its run"
    )
    samples: int = Field(default=1000, ge=1, description="draws of the bootstrap behind each interval")
    seed: int = Field(default=0, ge=0, description="seed of the bootstrap and of the choice of example dialogues")


@dataclass(frozen=True)
class Evaluation:
    """``figures`` by name (a number, or value, low, high and count), and what was predicted, one JSON object a turn.

    ``measures``: what figures are made of, a row a case, so that two systems can be compared case by case, the one that
    matters most first; ``groups``: the dialogue of each case; ``asked``: what each case was about; ``details``: tables
    that are no figures; ``cost``: what the answers took."""

    figures: dict[str, Any]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    cost: Cost | None = None


def evaluate(tuned: Tuned | Endpoint, options: EvaluateOptions) -> Evaluation:
    """Measure ``tuned`` (of ``methods.io.open_model``, or a model behind an address) as ``options`` say. InputError
    where the data cannot be used."""
    if not options.data:
        raise InputError(t("data: name the file to measure on"))
    if options.shots and not options.shot_data and options.task != "lm-eval":  # whose tasks have examples of their own
        raise InputError(
            t("shots = {shots} needs shot_data, the file that the examples come from", shots=options.shots)
        )
    if isinstance(tuned, Endpoint):
        if options.task in TASKS and options.task not in ANSWERED:
            message = "{url} gives answers only; of the tasks it can be measured by {tasks}, not by {task}"
            raise InputError(t(message, url=tuned.options.url, tasks=", ".join(ANSWERED), task=options.task))
    elif options.task != "classify":
        heads.refuse(tuned.model.config, tuned.base)
    module, _, name = TASKS.get(options.task, CUSTOM).partition(":")
    task: Callable[[Any, EvaluateOptions], Evaluation] = getattr(import_module(module), name)
    evaluation = task(tuned, options)
    cases = len(set(evaluation.groups))
    if 0 < cases < FEW and options.samples > 1:
        message = "{path}: {count} independent cases; with fewer than {few} an interval is wide, and itself uncertain"
        say(message, path=options.data, count=cases, few=FEW)
    return evaluation


def figures_of(measures: Mapping[str, Measure], groups: Sequence[str], options: EvaluateOptions) -> dict[str, Any]:
    """The figure of every measure, its interval by drawing whole ``groups`` of cases."""
    resampling = Resampling(groups, options.samples, options.seed)
    return {name: resampling.of(measure).as_dict() for name, measure in measures.items()}


def answers(tuned: Tuned, prompts: Sequence[Sequence[int]], options: EvaluateOptions) -> list[str]:
    """The text of the likeliest answer to every prompt (token ids)."""
    return [completion.text for completion in completions(tuned, prompts, options)]


def completions(tuned: Tuned, prompts: Sequence[Sequence[int]], options: EvaluateOptions) -> list[Completion]:
    """The likeliest answer to every prompt (token ids), with progress; how many were cut is said."""
    from weitiao.generate.engine import generate
    from weitiao.generate.sample import SampleOptions
    from weitiao.train.progress import counting

    pad_id: Any = tuned.tokenizer.pad_token_id  # load_tokenizer sees to it that there is one
    ended: list[int] = []
    with counting(t("answering")) as progress:

        def tell(row: int, what: Completion | int) -> None:
            """Of a token too: the first answers of a batch may be long in coming."""
            ended.extend([] if isinstance(what, int) else [row])
            progress(len(ended), len(prompts))

        done = generate(
            tuned.model,
            prompts,
            SampleOptions(max_new_tokens=options.max_new_tokens),
            stop_ids=tuned.renderer.stop_ids,
            pad_id=pad_id,
            tokenizer=tuned.tokenizer,
            on_token=tell,
            on_done=tell,
            batch_size=options.batch_size,
        )
    cut = sum(completion.finish == "length" for completion in done)
    if cut:
        message = "{cut} of {total} answers were cut at {tokens} tokens (max_new_tokens, or the model's last position)"
        say(message, cut=cut, total=len(done), tokens=options.max_new_tokens)
    return done
