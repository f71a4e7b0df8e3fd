"""The hotel turns of CrossWOZ: are the searches right that a guest's words lead to?

    evaluation = evaluate(open_model("runs/hotel-crosswoz"), EvaluateOptions(task="hotel", data="val.jsonl"))
    evaluation.figures["call_slot_f1"]              # {"value": 0.96, "low": 0.95, "high": 0.97, "count": 2000}

``call``: the search after what was said so far in the hotel segment, on clean gold calls. ``acts``: what one utterance
states by itself, on every utterance about a hotel; where it states nothing, nothing is right, be it no call or a call
without arguments. The data is read and rendered by ``data/crosswoz.py``, as in training; no prompt holds a gold call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weitiao.data import crosswoz
from weitiao.data.crosswoz_turns import acts_turns, call_turns, history
from weitiao.data.rows import Call, Message
from weitiao.errors import InputError, t
from weitiao.evaluate.bootstrap import Measure, Resampling, ratio
from weitiao.evaluate.colloquial import colloquial
from weitiao.evaluate.dialogue import call_counts
from weitiao.evaluate.hotel_parser import Parser
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation, answers
from weitiao.generate.toolset import able

if TYPE_CHECKING:
    from weitiao.methods.io import Tuned

Kind = Literal["call", "acts"]
KINDS = ("call", "acts")


@dataclass(frozen=True)
class Case:
    """One turn of one measure: the prompt's messages and the gold arguments."""

    id: str
    turn: int
    measure: Kind
    messages: tuple[Message, ...]
    gold: dict[str, Any]


def cases(dialogues: Sequence[crosswoz.Dialogue], spoken: bool = False) -> list[Case]:
    """Every case of ``dialogues``, in their order; a turn may have one of each measure. ``spoken``: with all that the
    guests say in other words (``colloquial.py``)."""
    found = []
    for dialogue in dialogues:
        messages = dialogue["messages"]
        for index in call_turns(dialogue):
            prompt = crosswoz.call_prompt(messages[index]["text"], history(dialogue, index))
            found.append(_case(dialogue, index, "call", prompt, messages[index]["search_args"]))
        for index in acts_turns(dialogue):
            prompt = crosswoz.acts_prompt(messages[index]["text"])
            found.append(_case(dialogue, index, "acts", prompt, messages[index].get("act_args", {})))
    return [replace(case, messages=tuple(map(_spoken, case.messages))) for case in found] if spoken else found


def _spoken(message: Message) -> Message:
    return replace(message, content=colloquial(message.content)) if message.role == "user" else message


def _case(
    dialogue: crosswoz.Dialogue, index: int, measure: Kind, prompt: tuple[Message, ...], gold: dict[str, Any]
) -> Case:
    return Case(dialogue["id"], dialogue["messages"][index].get("turn", index), measure, prompt, gold)


def evaluate(tuned: Tuned, options: EvaluateOptions) -> Evaluation:
    """Figures of both measures and a prediction per case (``id``, ``turn``, ``measure``, ``gold``, ``predicted``).

    ``options.data`` is a file in the form of the hotel extract, a zip that CrossWOZ publishes, or a folder with the
    validation part of either. ``predicted`` is null where ``call`` was answered without a call. Beside the figures
    stand an untrained parser's, and how much better they are, case by case. InputError: a file that is not in the
    format, one without any case, or examples (``shots``), which this task does not take."""
    if options.shots:
        raise InputError(t("task hotel takes no example dialogues: shots = {shots}", shots=options.shots))
    path = Path(options.data)
    if path.is_dir():
        path = crosswoz.find(path, "validation")
    dialogues = crosswoz.read(path)
    found = cases(dialogues, options.colloquial)
    if not found:
        raise InputError(t("{path}: no hotel turn with a gold answer (search_args, act_args, acts)", path=path))
    tuned = replace(tuned, renderer=able(tuned.renderer, tools=True))
    prompts = [tuned.renderer.prompt(case.messages, (crosswoz.SEARCH_HOTELS,)) for case in found]
    predicted = [arguments_of(text, tuned.renderer) for text in answers(tuned, prompts, options)]
    predicted = [
        {} if arguments is None and case.measure == "acts" else arguments
        for case, arguments in zip(found, predicted, strict=True)
    ]
    lines = [
        {"id": case.id, "turn": case.turn, "measure": case.measure, "gold": case.gold, "predicted": arguments}
        for case, arguments in zip(found, predicted, strict=True)
    ]
    made, asked = measures(lines), [case.messages[-1].content for case in found]
    made = {"call_exact_match": made["call_exact_match"], **made}  # what matters most, first
    parser = parsed(found, crosswoz.names(path, dialogues)[0])
    figures = score(lines, options.samples, options.seed) | over(lines, parser, options.samples, options.seed)
    return Evaluation(figures, lines, made, [case.id for case in found], asked)


def parsed(found: Sequence[Case], hotels: Sequence[str]) -> list[dict[str, Any]]:
    """The untrained parser's line of every case; it knows the names of ``hotels``."""
    parser = Parser(hotels)
    answer = {"call": parser.search, "acts": lambda messages: parser.stated(messages[-1].content)}
    return [
        {"id": case.id, "measure": case.measure, "gold": case.gold, "predicted": answer[case.measure](case.messages)}
        for case in found
    ]


def over(
    lines: Sequence[dict[str, Any]], parser: Sequence[dict[str, Any]], samples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """The untrained parser's figures (``parser_…``), and by how much ``lines`` are better on the same cases
    (``…_over_parser``, paired)."""
    figures = {}
    for kind in KINDS:
        ours, theirs = ([line for line in one if line["measure"] == kind] for one in (lines, parser))
        resampling, made, base = (
            Resampling([line["id"] for line in ours], samples, seed),
            measures(ours),
            measures(theirs),
        )
        for name in (f"{kind}_slot_f1", f"{kind}_exact_match"):
            figures[f"parser_{name}"] = resampling.of(base[name])
            figures[f"{name}_over_parser"] = resampling.difference(made[name], base[name])
    return {name: figure.as_dict() for name, figure in figures.items()}


def arguments_of(text: str, renderer: Any) -> dict[str, Any] | None:
    """The arguments of the first search in an answer; None where there is none."""
    for call in renderer.parse(text).calls:
        if call.name == crosswoz.NAME:
            return dict(call.arguments)
    return None


def score(lines: Sequence[dict[str, Any]], samples: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """Slot precision, recall, F1 (micro) and exact match of either measure, from prediction lines."""
    figures = {}
    for measure in KINDS:
        part = [line for line in lines if line["measure"] == measure]
        resampling = Resampling([line["id"] for line in part], samples, seed)
        made = measures(part).items()
        figures |= {name: resampling.of(one) for name, one in made if name.startswith(measure)}
    return {name: figure.as_dict() for name, figure in figures.items()}


def measures(lines: Sequence[dict[str, Any]]) -> dict[str, Measure]:
    """What the figures are made of, a row a line; a line counts for its own measure only."""
    counts = [call_counts(_call(line["gold"]), _call(line["predicted"])) for line in lines]
    table, made = np.array(counts, dtype=np.int64).reshape(-1, 5), {}
    for kind in KINDS:
        own = np.array([line["measure"] == kind for line in lines], dtype=np.int64)
        right, given, wanted, exact, counted = (table * own[:, None]).T
        made |= {
            f"{kind}_slot_precision": ratio(right, given),
            f"{kind}_slot_recall": ratio(right, wanted),
            f"{kind}_slot_f1": ratio(2 * right, given + wanted),
            f"{kind}_exact_match": ratio(exact, counted),
        }
    return made


def _call(arguments: dict[str, Any] | None) -> Call | None:
    """Arguments as a call that compares as it should: blanks in a hotel's name do not count."""
    return None if arguments is None else Call(crosswoz.NAME, crosswoz.canonical(arguments))
