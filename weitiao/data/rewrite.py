"""What an endpoint is asked, and which of its answers are believed: rewritten turns, and questions about a text.

prompt = rewrite_prompt(chat, "zh")
chat, problems = rewritten(chat, reply)             # None and sentences where the reply is not to be used
pairs, problems = questions(text, reply)            # [(question, answer)]
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Literal

from weitiao.data.rows import Chat
from weitiao.data.truth import Functions, differences, place_of, wanted
from weitiao.errors import InputError, t

Language = Literal["zh", "en"]
LONGER, SPARE = 3, 40  # a turn grows to at most thrice its characters, and a few more
GROUNDED = 0.6  # share of an answer's pairs of characters that the text has
NUMBER = re.compile(r"\d+(?:\.\d+)?")
LEANS = re.compile(
    r"本文|文中|资料中|上文|原文|according to the (?:text|passage|document)|in the (?:text|passage)", re.I
)


@cache
def shipped() -> dict[str, Any]:
    """The prompts of ``prompts.yaml``."""
    import yaml

    return yaml.safe_load((files("weitiao.data") / "prompts.yaml").read_text(encoding="utf-8"))


def prompt(task: str, language: Language, own: Path | None = None, **values: object) -> list[dict[str, str]]:
    """The messages of a task; ``own``: a file whose text is the user's turn instead, with the same ``$`` names."""
    known = shipped()[task][language]
    try:
        text = own.read_text(encoding="utf-8") if own else known["user"]
        user = Template(text).substitute({name: str(value) for name, value in values.items()})
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(t("{path}: cannot be read: {reason}", path=own, reason=error)) from None
    except (KeyError, ValueError) as error:
        names = ", ".join(f"${name}" for name in values)
        raise InputError(
            t("{path}: {error} cannot be filled in; there are {names}", path=own, error=error, names=names)
        ) from None
    return [{"role": "system", "content": known["system"].strip()}, {"role": "user", "content": user.strip()}]


def guests(chat: Chat) -> list[str]:
    """What the user says, turn by turn."""
    return [message.content for message in chat.messages if message.role == "user"]


def rewrite_prompt(chat: Chat, language: Language, own: Path | None = None) -> list[dict[str, str]]:
    """The messages that ask for other words of a conversation's user."""
    turns = guests(chat)
    values = sorted(value for value in wanted(chat) if any(place_of(value, turn) >= 0 for turn in turns))
    dumped = {"turns": json.dumps(turns, ensure_ascii=False), "values": json.dumps(values, ensure_ascii=False)}
    return prompt("rewrite", language, own, **dumped)


def rewritten(chat: Chat, reply: str, functions: Functions | None = None) -> tuple[Chat | None, list[str]]:
    """The conversation with the turns of a reply, or None and everything that is wrong with them."""
    turns, found = guests(chat), read_list(reply)
    if found is None or not all(isinstance(turn, str) for turn in found):
        return None, [t("the reply is not a JSON list of strings")]
    if len(found) != len(turns):
        return None, [t("{found} turns, not {expected}", found=len(found), expected=len(turns))]
    problems = [problem for one, two in zip(turns, found, strict=True) for problem in _turn(one, two)]
    if all(_plain(one) == _plain(two) for one, two in zip(turns, found, strict=True)):
        problems.append(t("a copy: every turn is as it was"))
    rest = iter(found)
    messages = [replace(m, content=next(rest).strip()) if m.role == "user" else m for m in chat.messages]
    made = replace(chat, messages=tuple(messages))
    problems += differences(chat, made, functions)
    return (None, problems) if problems else (made, [])


def _turn(before: str, after: str) -> list[str]:
    """What is wrong with one turn by itself."""
    if not after.strip():
        return [t("an empty turn")]
    found = []
    if len(after) > LONGER * len(before) + SPARE:
        found.append(t("{after} characters for {before}", after=len(after), before=len(before)))
    new = sorted(set(NUMBER.findall(after)) - set(NUMBER.findall(before)))
    return found + [t("says {number}, which was not said before", number=number) for number in new]


def _plain(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def questions(text: str, reply: str) -> tuple[list[tuple[str, str]], list[tuple[Any, str]]]:
    """The pairs of a reply that ``text`` bears out, and the others, each with what is wrong."""
    found = read_list(reply)
    if found is None:
        return [], [(reply, t("the reply is not a JSON list of questions and answers"))]
    good: list[tuple[str, str]] = []
    bad: list[tuple[Any, str]] = []
    for pair in found:
        question, answer = (pair.get("question"), pair.get("answer")) if isinstance(pair, dict) else (None, None)
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip() or not answer.strip():
            bad.append((pair, t("the reply is not a JSON list of questions and answers")))
        elif problem := _unfounded(text, question, answer):
            bad.append((pair, problem))
        elif any(_plain(question) == _plain(other) for other, _ in good):
            bad.append((pair, t("the same question twice")))
        else:
            good.append((question.strip(), answer.strip()))
    return good, bad


def _unfounded(text: str, question: str, answer: str) -> str:
    """Why an answer cannot be taken from ``text``; "" if it can."""
    if LEANS.search(question):
        return t("the question leans on the text: {question}", question=question)
    if new := sorted(set(NUMBER.findall(answer)) - set(NUMBER.findall(text))):
        return t("says {number}, which the text does not", number=new[0])
    whole, said = _plain(text), _plain(answer)
    pairs = [said[place : place + 2] for place in range(len(said) - 1)] or [said]
    share = sum(pair in whole for pair in pairs) / len(pairs)
    return t("only {share:.0%} of the answer is in the text", share=share) if share < GROUNDED else ""


def read_list(reply: str) -> list[Any] | None:
    """The JSON list in a reply, with or without words or a fence around it; None if there is none."""
    candidates: Sequence[str] = [reply, reply[reply.find("[") : reply.rfind("]") + 1]]
    for text in candidates:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, list):
            return found
    return None
