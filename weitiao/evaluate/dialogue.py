"""Dialogues: slots and calls, character BLEU, task success, each with a bootstrap interval over dialogues.

    turns = replay(chats, answer, renderer)               # teacher-forced: one answer per assistant message
    figures = measure(turns, execute=lambda call: search_hotels(**call.arguments))
    figures["slot_f1"].value, figures["slot_f1"].low, figures["slot_f1"].high

Definitions. A slot is (function, argument, value); the elements of a list are slots of their own, null and empty values
are none. Numbers compare as numbers (400 = 400.0), texts without the space around them, lists without regard to order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weitiao.data.endpoint import Endpoint
from weitiao.data.rows import Call, Chat
from weitiao.evaluate.ask import Question, Reply, ask, conversations, draw_shots, locally, questions
from weitiao.evaluate.ask import as_shot as as_shot
from weitiao.evaluate.bootstrap import Figure, Measure, Resampling, ratio
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation, figures_of

if TYPE_CHECKING:
    from weitiao.data.render import Renderer
    from weitiao.methods.io import Tuned

ORDERS = 4  # BLEU-4
NO_GRAMS = (0,) * (2 + 2 * ORDERS)
ERRORS = (
    *("missing call", "needless call", "unreadable", "wrong function", "wrong number of calls"),
    *("wrong value", "missing slot", "needless slot"),
)
Calls = Call | Sequence[Call] | None
Execute = Callable[[Call], Any]


@dataclass(frozen=True)
class Turn:
    """One assistant message as it should be and as it was answered; ``id`` names the dialogue, ``turn`` the message."""

    id: str
    turn: int
    gold_calls: tuple[Call, ...]
    predicted_calls: tuple[Call, ...]
    gold_text: str
    text: str


@dataclass(frozen=True)
class Scores:
    """Micro-averaged slot scores and exact match, 0 to 1; ``turns`` are those where gold or prediction has a call.

    A ratio whose denominator is zero is 0.
    """

    precision: float
    recall: float
    f1: float
    exact_match: float
    turns: int
    gold_slots: int
    predicted_slots: int


@dataclass(frozen=True)
class Success:
    """Share of gold calls that the prediction answers alike: of those with results, and apart of those without."""

    rate: float
    count: int
    empty_rate: float
    empty_count: int


# --- slots and calls


def slots(arguments: Mapping[str, Any]) -> Counter[tuple[str, Any]]:
    """The (argument, value) slots of a call's arguments, as a multiset; nested objects give dotted names."""
    counted: Counter[tuple[str, Any]] = Counter()
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            counted.update({(f"{name}.{inner}", v): n for (inner, v), n in slots(value).items()})
        elif isinstance(value, (list, tuple, set, frozenset)):
            for element in value:
                counted.update(slots({name: element}))
        elif (atom := _atom(value)) is not None:
            counted[name, atom] += 1
    return counted


def _atom(value: Any) -> Any:
    """A value in the form in which values are compared; None when it says nothing."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool):
        return ("bool", value)  # True is not 1
    return value  # 400 and 400.0 are equal and hash alike


def _calls(calls: Calls) -> tuple[Call, ...]:
    if calls is None:
        return ()
    return (calls,) if isinstance(calls, Call) else tuple(calls)


def _call_key(call: Call) -> tuple[str, frozenset[tuple[tuple[str, Any], int]]]:
    return call.name, frozenset(slots(call.arguments).items())


def _turn_slots(calls: Iterable[Call]) -> Counter[tuple[str, str, Any]]:
    counted: Counter[tuple[str, str, Any]] = Counter()
    for call in calls:
        counted.update({(call.name, name, value): n for (name, value), n in slots(call.arguments).items()})
    return counted


def calls_equal(gold: Calls, predicted: Calls) -> bool:
    """Whether two turns make the same calls: same functions, same slots, in any order."""
    return Counter(map(_call_key, _calls(gold))) == Counter(map(_call_key, _calls(predicted)))


def call_counts(gold: Calls, predicted: Calls) -> tuple[int, int, int, int, int]:
    """(slots right, slots predicted, slots gold, calls exactly right, turn counts) of one turn."""
    gold, predicted = _calls(gold), _calls(predicted)
    wanted, given = _turn_slots(gold), _turn_slots(predicted)
    counted = int(bool(gold or predicted))
    exact = int(bool(counted) and calls_equal(gold, predicted))
    return (wanted & given).total(), given.total(), wanted.total(), exact, counted


def score_calls(pairs: Iterable[tuple[Calls, Calls]]) -> Scores:
    """Slot precision, recall and F1 (micro) and call exact match of (gold, predicted) pairs; None or () is no call.

    A call where gold has none is wrong: its slots are false positives and its turn counts against exact match.
    """
    right, given, wanted, exact, counted = _table([call_counts(*pair) for pair in pairs], 5).sum(0).tolist()
    return Scores(
        precision=_ratio(right, given),
        recall=_ratio(right, wanted),
        f1=_ratio(2 * right, given + wanted),
        exact_match=_ratio(exact, counted),
        turns=counted,
        gold_slots=wanted,
        predicted_slots=given,
    )


# --- answers


def bleu_counts(gold: str, text: str) -> tuple[int, ...]:
    """(characters said, characters gold, 4 matched n-gram counts, 4 said n-gram counts); white space does not count."""
    said, wanted = "".join(text.split()), "".join(gold.split())
    matched, total = [], []
    for n in range(1, ORDERS + 1):
        ours, theirs = (Counter(string[i : i + n] for i in range(len(string) - n + 1)) for string in (said, wanted))
        matched.append((ours & theirs).total())
        total.append(ours.total())
    return (len(said), len(wanted), *matched, *total)


def bleu4(pairs: Iterable[tuple[str, str]]) -> float:
    """Corpus BLEU-4 over characters, 0 to 100, of (gold, predicted) texts: sacrebleu's with ``tokenize="char"``.

    Papineni et al. 2002; Post 2018.
    """
    return _bleu(_table([bleu_counts(*pair) for pair in pairs], len(NO_GRAMS)).sum(0))


def _bleu(counts: np.ndarray) -> float:
    from sacrebleu.metrics.bleu import BLEU

    said, wanted, *grams = (int(count) for count in counts)
    return BLEU.compute_bleu(grams[:ORDERS], grams[ORDERS:], said, wanted, smooth_method="exp").score


# --- what the calls bring


def success_counts(gold: Calls, predicted: Calls, execute: Execute) -> tuple[int, int, int, int]:
    """(right, counted) among golds with results and (right, counted) among golds without, of one turn."""
    gold = _calls(gold)
    if not gold:
        return 0, 0, 0, 0
    wanted = [execute(call) for call in gold]
    right = calls_equal(gold, predicted) or _results(_calls(predicted), execute) == wanted
    return (right, 1, 0, 0) if any(wanted) else (0, 0, right, 1)


def _results(calls: Sequence[Call], execute: Execute) -> list[Any] | None:
    """What predicted calls return; None where one of them cannot be executed."""
    try:
        return [execute(call) for call in calls]
    except Exception:  # a model may call anything with anything, and a call that fails brings nothing
        return None


def success(pairs: Iterable[tuple[Calls, Calls]], execute: Execute) -> Success:
    """Task success of (gold, predicted) calls: the predicted call, executed, returns what the gold call returns.

    Only turns with a gold call count, those whose gold call returns nothing (empty or None) apart from the others.
    """
    counts = _table([success_counts(*pair, execute) for pair in pairs], 4).sum(0).tolist()
    right, counted, empty_right, empty_counted = counts
    return Success(_ratio(right, counted), counted, _ratio(empty_right, empty_counted), empty_counted)


# --- all measures, with intervals


def measure(
    turns: Sequence[Turn], execute: Execute | None = None, samples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """Every measure of ``turns``: slot_precision, slot_recall, slot_f1, call_exact_match, bleu4, and with ``execute``
    task_success and task_success_empty. BLEU is taken over the turns whose gold is an answer and no call.

    Intervals are bootstrapped by drawing whole dialogues (``Turn.id``), see ``bootstrap.py``.
    """
    resampling = Resampling([turn.id for turn in turns], samples, seed)
    return {name: resampling.of(made) for name, made in measures(turns, execute).items()}


def measures(turns: Sequence[Turn], execute: Execute | None = None) -> dict[str, Measure]:
    """What the figures of :func:`measure` are made of, a row a turn."""
    counts = _table([call_counts(turn.gold_calls, turn.predicted_calls) for turn in turns], 5)
    right, given, wanted, exact, counted = counts.T
    grams = _table(
        [NO_GRAMS if turn.gold_calls else bleu_counts(turn.gold_text, turn.text) for turn in turns], len(NO_GRAMS)
    )
    made = {
        "slot_precision": ratio(right, given),
        "slot_recall": ratio(right, wanted),
        "slot_f1": ratio(2 * right, given + wanted),
        "call_exact_match": ratio(exact, counted),
        "bleu4": Measure(grams, _bleu, sum(not turn.gold_calls for turn in turns)),
    }
    if execute is not None:
        done = _table([success_counts(turn.gold_calls, turn.predicted_calls, execute) for turn in turns], 4)
        made["task_success"] = ratio(done[:, 0], done[:, 1])
        made["task_success_empty"] = ratio(done[:, 2], done[:, 3])
    return made


def _table(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# --- from chats to turns


def replay(
    chats: Sequence[Chat],
    answer: Callable[[list[list[int]]], Sequence[str]],
    renderer: Renderer,
    shots: Sequence[Chat] = (),
    limit: int | None = None,
) -> list[Turn]:
    """Answer every assistant message of ``chats``, each after the gold messages before it (teacher-forced).

    ``answer``, ``shots`` and ``limit`` are those of ``ask.locally``.
    """
    asked = questions(chats)
    return turns_of(asked, locally(asked, answer, renderer, shots, limit))


def turns_of(asked: Sequence[Question], replies: Sequence[Reply]) -> list[Turn]:
    """What was asked and what was replied, as turns."""
    return [
        Turn(one.id, one.turn, one.gold.calls, reply.calls, one.gold.content, reply.content)
        for one, reply in zip(asked, replies, strict=True)
    ]


# --- the task


def task(tuned: Tuned | Endpoint, options: EvaluateOptions) -> Evaluation:
    """Every measure of a file of conversations, a prediction per assistant message, and in ``details`` a table of the
    slots and the kinds of errors with examples.

    ``shots`` example dialogues are drawn from ``shot_data``, the same for every conversation.
    """
    asked = questions(conversations(options.data))
    replies, cost = ask(tuned, asked, options, draw_shots(options))
    turns = turns_of(asked, replies)
    made, groups = measures(turns), [turn.id for turn in turns]
    first = "call_exact_match" if any(turn.gold_calls for turn in turns) else "bleu4"
    details = {"slots": slot_table(turns), "errors": errors(turns, [bool(reply.problems) for reply in replies])}
    return Evaluation(
        figures_of(made, groups, options),
        [as_line(turn) for turn in turns],
        {first: made[first], **made},
        groups,
        [one.asked for one in asked],
        details,
        cost,
    )


def as_line(turn: Turn) -> dict[str, Any]:
    """A turn as a line of predictions: ``id``, ``turn``, and ``gold`` and ``predicted`` with their text and calls."""
    sides = {"gold": (turn.gold_text, turn.gold_calls), "predicted": (turn.text, turn.predicted_calls)}
    written = {
        side: {"text": text, "calls": [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]}
        for side, (text, calls) in sides.items()
    }
    return {"id": turn.id, "turn": turn.turn, **written}


# --- where it goes wrong


def slot_table(turns: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of every argument by its name (``function.argument``), the most frequent first;
    ``count`` is how often it is right to give it."""
    right: Counter[str] = Counter()
    given, wanted = right.copy(), right.copy()
    for turn in turns:
        ours, theirs = _turn_slots(turn.predicted_calls), _turn_slots(turn.gold_calls)
        for counter, found in ((right, ours & theirs), (given, ours), (wanted, theirs)):
            for (function, name, _), number in found.items():
                counter[f"{function}.{name}"] += number
    names = sorted(given | wanted, key=lambda name: (-wanted[name], name))
    return {
        name: {
            "precision": _ratio(right[name], given[name]),
            "recall": _ratio(right[name], wanted[name]),
            "f1": _ratio(2 * right[name], given[name] + wanted[name]),
            "count": wanted[name],
        }
        for name in names
    }


def errors(turns: Sequence[Turn], unreadable: Sequence[bool], shown: int = 3) -> dict[str, dict[str, Any]]:
    """How many turns err in their calls, by kind, with ``shown`` examples of each; a turn may err in several ways."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ERRORS}
    for turn, broken in zip(turns, unreadable, strict=True):
        for kind in error_kinds(turn.gold_calls, turn.predicted_calls, broken):
            found[kind].append(as_line(turn))
    return {kind: {"count": len(lines), "examples": lines[:shown]} for kind, lines in found.items() if lines}


def error_kinds(gold: Calls, predicted: Calls, unreadable: bool = False) -> list[str]:
    """What is wrong with the calls of one turn, in the words of ``ERRORS``; empty where nothing is."""
    gold, predicted = _calls(gold), _calls(predicted)
    if calls_equal(gold, predicted):
        return []
    if not predicted:
        return ["unreadable" if unreadable else "missing call"]
    if not gold:
        return ["needless call"]
    if {call.name for call in gold} != {call.name for call in predicted}:
        return ["wrong function"]
    ours, theirs = _turn_slots(predicted), _turn_slots(gold)
    needless, missing = ({slot[:2] for slot in left} for left in (ours - theirs, theirs - ours))
    kinds = {"wrong value": needless & missing, "missing slot": missing - needless, "needless slot": needless - missing}
    return [kind for kind, slots_ in kinds.items() if slots_] or ["wrong number of calls"]
