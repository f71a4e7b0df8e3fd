"""A model that judges: is the answer better than the true one? Asked twice, in either order, so that place cannot win.

    options = EvaluateOptions(task="judge", data="test.jsonl", judge="https://api.example.com/v1#big-model")
    evaluate(open_model("runs/first"), options).figures["win_rate"]     # 0.5: as good as the true answers

``win_rate`` is the mean over both orders of 1 for a win, 1/2 for a tie and 0 for a loss. ``agreement`` is the share of
answers on which both orders say the same; a judge far below 1 judges by place, and its win rates mean little.
``unreadable`` is the share of verdicts that name neither answer nor a tie; they count as ties.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weitiao.data.endpoint import Endpoint
from weitiao.data.rows import Message
from weitiao.errors import InputError, t
from weitiao.evaluate.ask import CHINESE, Question, ask, conversations, draw_shots, questions
from weitiao.evaluate.bootstrap import mean
from weitiao.evaluate.endpoint import open_system
from weitiao.evaluate.generative import without_thought
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation, figures_of

if TYPE_CHECKING:
    from weitiao.methods.io import Tuned

ASKED = {
    True: "下面是一个问题和两个回答。哪个回答更好？先看对不对，再看清不清楚。"
    "只写一个字母：A（甲更好）、B（乙更好）或 C（一样好）。\n\n"
    "问题：\n{question}\n\n回答甲（A）：\n{first}\n\n回答乙（B）：\n{second}\n\n更好的是：",
    False: "Here are a question and two answers. Which answer is better? Look first at whether it is right, then at "
    "whether it is clear. Write one letter only: A, B, or C for equally good.\n\n"
    "Question:\n{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nThe better one is:",
}
VERDICT = re.compile(r"(?<![A-Za-z])([ABC])(?![A-Za-z])")
WORTH = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the answer that stood first


def task(tuned: Tuned | Endpoint, options: EvaluateOptions) -> Evaluation:
    """Win rate against the true answers of a file of conversations, and both verdicts on each answer."""
    if not options.judge:
        raise InputError(t("task judge needs judge: a run, a model or URL#MODEL that judges"))
    asked = [one for one in questions(conversations(options.data)) if not one.gold.calls]
    if not asked:
        message = "{path}: no turn of the assistant in words; calls are what task dialogue measures"
        raise InputError(t(message, path=options.data))
    replies, cost = ask(tuned, asked, options, draw_shots(options))
    said = [without_thought(reply.content) for reply in replies]
    first, second = verdicts(open_system(options.judge), asked, said, options)
    wins = [(WORTH[a or "C"] + 1 - WORTH[b or "C"]) / 2 for a, b in zip(first, second, strict=True)]
    agree = [WORTH[a or "C"] == 1 - WORTH[b or "C"] for a, b in zip(first, second, strict=True)]
    made = {
        "win_rate": mean(wins),
        "agreement": mean(agree),
        "unreadable": mean(
            [(a is None) / 2 + (b is None) / 2 for a, b in zip(first, second, strict=True)], higher=False
        ),
    }
    groups = [one.id for one in asked]
    lines: list[dict[str, Any]] = [
        {"id": one.id, "turn": one.turn, "prompt": one.asked, "gold": one.gold.content, "predicted": text}
        | {"verdicts": [a, b], "win": win}
        for one, text, a, b, win in zip(asked, said, first, second, wins, strict=True)
    ]
    return Evaluation(figures_of(made, groups, options), lines, made, groups, [one.asked for one in asked], cost=cost)


def verdicts(
    judge: Any, asked: Sequence[Question], said: Sequence[str], options: EvaluateOptions
) -> tuple[list[str | None], list[str | None]]:
    """A, B, C or None for every answer, standing first (the true one second) and then standing second."""
    pairs = [(text, one.gold.content) for one, text in zip(asked, said, strict=True)]
    prompts = [_prompt(one, *pair) for one, pair in zip(asked, pairs, strict=True)]
    prompts += [_prompt(one, *reversed(pair)) for one, pair in zip(asked, pairs, strict=True)]
    plain = options.model_copy(update={"thoughts": False, "max_new_tokens": min(options.max_new_tokens, 512)})
    replies, _ = ask(judge, prompts, plain)
    found = [verdict(reply.content) for reply in replies]
    return found[: len(asked)], found[len(asked) :]


def _prompt(question: Question, first: str, second: str) -> Question:
    text = "\n".join(f"{message.role}: {message.content}" for message in question.messages)
    told = ASKED[bool(CHINESE.search(text))].format(question=text, first=first, second=second)
    return Question(question.id, question.turn, (Message("user", told),), Message("assistant", ""))


def verdict(text: str) -> str | None:
    """The last letter that stands by itself in an answer; None where there is none."""
    found = VERDICT.findall(without_thought(text))
    return found[-1] if found else None
