"""Multiple choice by likelihood: which of several answers does the model find likelier?

    {"question": "冰是什么？", "choices": ["固体", "液体"], "answer": 0}     # or "A", or "固体"
    evaluate(open_model("runs/first"), EvaluateOptions(task="choice", data="choices.jsonl")).figures["accuracy"]

Each choice stands as the assistant's answer behind the question, which does not list them. ``accuracy`` takes the
likeliest whole answer, ``accuracy_normalised`` the likeliest per byte, so that a long answer is at no disadvantage
(``options.per_byte`` puts that one first); ``chance`` is what guessing would reach.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weitiao.config import build
from weitiao.data.examples import examples as make_examples
from weitiao.data.formats import Unreadable, format_of, records
from weitiao.data.rows import Chat, Message
from weitiao.data.sources import DataOptions
from weitiao.data.turns import shown
from weitiao.errors import InputError, first_of, t
from weitiao.evaluate.ask import with_shots
from weitiao.evaluate.bootstrap import mean
from weitiao.evaluate.perplexity import row_losses
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation, figures_of

if TYPE_CHECKING:
    from weitiao.methods.io import Tuned

QUESTION_NAMES = ("question", "prompt", "query", "问题")
CHOICE_NAMES = ("choices", "options", "选项")
ANSWER_NAMES = ("answer", "label", "答案")


@dataclass(frozen=True)
class Choice:
    """A question, what may be answered, and the place of the right answer."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int

    def chat(self, choice: int) -> Chat:
        """The conversation in which ``choice`` was answered."""
        return Chat((Message("user", self.question), Message("assistant", self.choices[choice])), id=self.id)


def read_choices(path: str) -> list[Choice]:
    """The questions of a file; InputError names every row that is none."""
    if not Path(path).is_file():
        raise InputError(t("{path}: no such file", path=path))
    found, problems = [], []
    for line, record in records(Path(path), format_of(Path(path))):
        where = f"{path}:{line}"
        try:
            found.append(_choice(record, where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if not found and not problems:
        problems.append(t("{path}: the file has no rows", path=path))
    if problems:
        raise InputError(first_of(problems))
    return found


def _choice(record: Any, where: str) -> Choice:
    if isinstance(record, Unreadable):
        raise ValueError(record.reason)
    if not isinstance(record, Mapping):
        raise ValueError(t("found {found}, expected an object with keys", found=shown(record)))
    values = []
    for names in (QUESTION_NAMES, CHOICE_NAMES, ANSWER_NAMES):
        key = next((name for name in names if record.get(name) is not None), None)
        if key is None:
            raise ValueError(t("none of the keys {names}", names=", ".join(names)))
        values.append(record[key])
    question, choices, answer = values
    if not isinstance(question, str) or not question.strip():
        raise ValueError(t("{key}: empty", key=QUESTION_NAMES[0]))
    choices = list(choices.values()) if isinstance(choices, Mapping) else choices
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(one, str) and one.strip() for one in choices)
    ):
        raise ValueError(t("choices: expected a list of at least two texts, found {found}", found=shown(choices)))
    place = _place(answer, choices)
    if place is None:
        message = "answer: expected a choice, its letter or its place from 0 on, found {found}"
        raise ValueError(t(message, found=shown(answer)))
    return Choice(str(record.get("id", where)), question, tuple(choices), place)


def _place(answer: Any, choices: Sequence[str]) -> int | None:
    """Where the right choice stands: a place from 0 on, the choice itself, or its letter."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str):
        return None
    letters = string.ascii_uppercase[: len(choices)]
    if answer in choices:
        return choices.index(answer)
    if answer.strip().isdecimal():
        return _place(int(answer), choices)
    return letters.index(answer.strip().upper()) if answer.strip().upper() in list(letters) else None


def task(tuned: Tuned, options: EvaluateOptions) -> Evaluation:
    """Accuracy on a file of questions with choices, and the choice taken for each."""
    found = read_choices(options.data)
    losses, lengths = likelihoods(tuned, found, _shots(options))
    taken = [int(np.argmin(row)) for row in losses]
    by_byte = [int(np.argmin(row / size)) for row, size in zip(losses, lengths, strict=True)]
    made = {
        "accuracy": mean([place == one.answer for place, one in zip(taken, found, strict=True)]),
        "accuracy_normalised": mean([place == one.answer for place, one in zip(by_byte, found, strict=True)]),
    }
    if options.per_byte:
        made, taken = dict(reversed(made.items())), by_byte
    groups = [f"{place}" for place in range(len(found))]
    figures = figures_of(made, groups, options) | {"chance": float(np.mean([1 / len(one.choices) for one in found]))}
    lines = [
        {"id": one.id, "prompt": one.question, "gold": one.choices[one.answer], "predicted": one.choices[place]}
        for one, place in zip(found, taken, strict=True)
    ]
    return Evaluation(figures, lines, made, groups, [one.question for one in found])


def likelihoods(
    tuned: Tuned, found: Sequence[Choice], shots: Sequence[Chat] = ()
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Negative log-likelihood (nats) and UTF-8 bytes of every choice, [choices] of each question."""
    from weitiao.generate.engine import positions

    chats = [
        Chat(tuple(with_shots(one.chat(place).messages, shots)), id=f"{one.id}/{place}")
        for one in found
        for place in range(len(one.choices))
    ]
    data = build(DataOptions, {"train_on": "last", "allow_truncated": 0})
    examples = make_examples(chats, tuned.renderer, data, "sft", max_positions=positions(tuned.model))
    pad_id: Any = tuned.tokenizer.pad_token_id
    losses = row_losses(tuned.model, examples, pad_id)
    ends = np.cumsum([len(one.choices) for one in found])[:-1]
    sizes = np.array([len(choice.encode()) for one in found for choice in one.choices])
    return np.split(losses, ends), np.split(sizes, ends)


def _shots(options: EvaluateOptions) -> list[Chat]:
    """Questions with their right answers, from ``shot_data``."""
    if not options.shots or not options.shot_data:
        return []
    if Path(options.shot_data).resolve() == Path(options.data).resolve():
        raise InputError(t("shot_data: {path} is what is measured on; examples must be others", path=options.data))
    pool = read_choices(options.shot_data)
    drawn = random.Random(options.seed).sample(pool, min(options.shots, len(pool)))
    return [one.chat(one.answer) for one in drawn]
