"""Dialogues: slots and calls, character BLEU, task success, each with a bootstrap interval over dialogues.

    turns = replay(chats, answer, renderer)               # teacher-forced: one answer per assistant message
    figures = measure(turns, execute=lambda call: search_hotels(**call.arguments))
    figures["slot_f1"].value, figures["slot_f1"].low, figures["slot_f1"].high

Definitions. A slot is (function, argument, value); the elements of a list are slots of their own, null and empty values
are none. Numbers compare as numbers (400 = 400.0), texts without the space around them, lists without regard to order.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weitiao.config import build
from weitiao.data.rows import Call, Chat, Message
from weitiao.data.sources import DataOptions, read
from weitiao.errors import InputError, say, t
from weitiao.evaluate.bootstrap import Figure, Resampling
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation, answers

if TYPE_CHECKING:
    from weitiao.data.render import Renderer
    from weitiao.methods.io import Tuned

ORDERS = 4  # BLEU-4
NO_GRAMS = (0,) * (2 + 2 * ORDERS)
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
    counts = _table([call_counts(turn.gold_calls, turn.predicted_calls) for turn in turns], 5)
    right, given, wanted, exact, counted = counts.T
    grams = _table(
        [NO_GRAMS if turn.gold_calls else bleu_counts(turn.gold_text, turn.text) for turn in turns], len(NO_GRAMS)
    )
    figures = {
        "slot_precision": resampling.ratio(right, given),
        "slot_recall": resampling.ratio(right, wanted),
        "slot_f1": resampling.ratio(2 * right, given + wanted),
        "call_exact_match": resampling.ratio(exact, counted),
        "bleu4": resampling.figure(grams, _bleu, sum(not turn.gold_calls for turn in turns)),
    }
    if execute is not None:
        done = _table([success_counts(turn.gold_calls, turn.predicted_calls, execute) for turn in turns], 4)
        figures["task_success"] = resampling.ratio(done[:, 0], done[:, 1])
        figures["task_success_empty"] = resampling.ratio(done[:, 2], done[:, 3])
    return figures


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

    ``answer`` maps prompts (token ids) to texts and is called once. ``shots`` are whole dialogues put before each
    conversation as if they were its beginning; as many of the last ones are dropped as do not fit in ``limit`` prompt
    tokens, and it is said how often. A prompt that is too long without any is answered by nothing, which is said too.
    """
    asked = [
        (chat if chat.id else replace(chat, id=str(number)), place)
        for number, chat in enumerate(chats)
        for place, message in enumerate(chat.messages)
        if message.role == "assistant"
    ]
    prompts, dropped = [], 0
    for chat, place in asked:
        prompt, missing = _prompt(chat, place, renderer, shots, limit)
        prompts.append(prompt)
        dropped += missing > 0
    if dropped:
        say(
            "{count} of {total} prompts had no room for all {shots} example dialogues",
            count=dropped,
            total=len(asked),
            shots=len(shots),
        )
    fitting = [prompt for prompt in prompts if prompt is not None]
    if len(fitting) < len(prompts):
        count = len(prompts) - len(fitting)
        say(
            "{count} of {total} prompts are longer than {limit} tokens and count as wrong",
            count=count,
            total=len(asked),
            limit=limit,
        )
    texts = iter(answer(fitting) if fitting else ())
    turns, unreadable = [], 0
    for (chat, place), prompt in zip(asked, prompts, strict=True):
        gold, said = chat.messages[place], renderer.parsed("" if prompt is None else next(texts))
        unreadable += bool(said.problems)
        turns.append(Turn(chat.id, place, gold.calls, said.calls, gold.content, said.content))
    if unreadable:
        say("{count} of {total} answers hold a call that cannot be read", count=unreadable, total=len(asked))
    return turns


def _prompt(
    chat: Chat, place: int, renderer: Renderer, shots: Sequence[Chat], limit: int | None
) -> tuple[list[int] | None, int]:
    """The prompt of the message at ``place`` with as many shots as fit, and how many did not."""
    head = [message for message in chat.messages[:1] if message.role == "system"]
    rest = list(chat.messages[len(head) : place])
    for count in range(len(shots), -1, -1):
        before = [message for shot in shots[:count] for message in as_shot(shot)]
        ids = renderer.prompt([*head, *before, *rest], chat.tools)
        if limit is None or len(ids) <= limit:
            return list(ids), len(shots) - count
    return None, len(shots)


def as_shot(chat: Chat) -> list[Message]:
    """A dialogue as the beginning of another: without its system message and what no assistant's turn follows."""
    messages = [message for message in chat.messages if message.role != "system"]
    while messages and messages[-1].role != "assistant":
        messages.pop()
    return messages


# --- the task


def task(tuned: Tuned, options: EvaluateOptions) -> Evaluation:
    """Every measure of a file of conversations, and a prediction per assistant message.

    ``shots`` example dialogues are drawn from ``shot_data``, the same for every conversation.
    """
    from weitiao.generate.engine import positions
    from weitiao.generate.toolset import able

    chats = conversations(options.data)
    shots: list[Chat] = []
    if options.shots and options.shot_data:
        if Path(options.shot_data).resolve() == Path(options.data).resolve():
            raise InputError(t("shot_data: {path} is what is measured on; examples must be others", path=options.data))
        examples = conversations(options.shot_data)
        shots = random.Random(options.seed).sample(examples, min(options.shots, len(examples)))
    tuned = replace(tuned, renderer=able(tuned.renderer, any(chat.tools for chat in (*chats, *shots))))
    room = positions(tuned.model)
    limit = None if room is None else max(1, room - options.max_new_tokens)
    turns = replay(chats, lambda prompts: answers(tuned, prompts, options), tuned.renderer, shots, limit)
    figures = measure(turns, samples=options.samples, seed=options.seed)
    return Evaluation({name: figure.as_dict() for name, figure in figures.items()}, [as_line(turn) for turn in turns])


def conversations(path: str) -> list[Chat]:
    """The conversations of a file; InputError where a row is none, or has no assistant's turn."""
    source = read(path, build(DataOptions, {}))
    for line in source.said:
        say("{line}", line=line)
    chats = [row for row in source.rows if isinstance(row, Chat)]
    chats = [chat for chat in chats if any(message.role == "assistant" for message in chat.messages)]
    if not chats or len(chats) < len(source.rows):
        message = "{path}: {count} of {rows} rows are no conversation with an assistant's turn"
        raise InputError(t(message, path=path, count=len(source.rows) - len(chats), rows=len(source.rows)))
    return chats


def as_line(turn: Turn) -> dict[str, Any]:
    """A turn as a line of predictions: ``id``, ``turn``, and ``gold`` and ``predicted`` with their text and calls."""
    sides = {"gold": (turn.gold_text, turn.gold_calls), "predicted": (turn.text, turn.predicted_calls)}
    written = {
        side: {"text": text, "calls": [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]}
        for side, (text, calls) in sides.items()
    }
    return {"id": turn.id, "turn": turn.turn, **written}
