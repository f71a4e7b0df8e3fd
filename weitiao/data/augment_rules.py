"""Rules that say a conversation in other words, each leaving what its calls take true.

    talk = Talk(chat, random.Random(0))
    facilities(talk) and amounts(talk)              # whether a rule changed anything
    talk.chat, talk.said                            # the conversation, and the words that stand for values now

A rule changes what a guest says, and only around the values of calls, or where their own phrase is known
(``augment_phrases.yaml``). Noise touches no turn whose call takes something that is not said literally.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from weitiao.data.rows import Call, Chat, Message
from weitiao.data.truth import place_of, values_of, wanted

NUMBER = r"\d+(?:\.\d+)?"
RANGE = re.compile(rf"({NUMBER})元?[-~到至]({NUMBER})元(?!以)")
AT_MOST = re.compile(rf"({NUMBER})(?:元|块)(?:以下|以内|之内)")
AT_LEAST = re.compile(rf"({NUMBER})(元|块|分)以上")
DIGITS = "零一二三四五六七八九"


@cache
def words() -> dict[str, Any]:
    """The pieces of ``augment_phrases.yaml``."""
    import yaml

    return yaml.safe_load((files("weitiao.data") / "augment_phrases.yaml").read_text(encoding="utf-8"))


class Talk:
    """A conversation on its way: ``said`` maps values of calls to the words that stand for them now."""

    def __init__(self, chat: Chat, chance: random.Random):
        self.messages, self.chat_before, self.chance = list(chat.messages), chat, chance
        self.said: dict[str, str] = {}
        self.values = sorted(wanted(chat), key=len, reverse=True)

    @property
    def chat(self) -> Chat:
        """The conversation as it is now."""
        return replace(self.chat_before, messages=tuple(self.messages))

    def guests(self) -> Iterator[int]:
        """The places of the guest's turns, in a random order."""
        places = [place for place, message in enumerate(self.messages) if message.role == "user"]
        yield from self.chance.sample(places, len(places))

    def put(self, place: int, text: str) -> bool:
        """Let the guest say ``text`` at a place; whether that is something else."""
        before = self.messages[place].content
        self.messages[place] = replace(self.messages[place], content=text)
        return text != before

    def held(self, text: str) -> list[tuple[int, int]]:
        """The stretches of ``text`` that hold values, or what is said for them."""
        parts = [*self.values, *self.said.values()]
        found = [(place, place + len(part)) for part in parts if (place := place_of(part, text)) >= 0]
        return found + [match.span() for match in re.finditer(r"[\d.]+", text)]

    def literal(self, place: int) -> bool:
        """Whether everything that the call behind a guest's turn takes has been said literally by then."""
        rest = self.messages[place + 1 :]
        if not rest or not rest[0].calls:
            return False
        earlier = [message.content for message in self.messages[: place + 1] if message.role == "user"]
        values = {value for call in rest[0].calls for value in values_of(dict(call.arguments))}
        return all(any(place_of(self.said.get(v, v), text) >= 0 for text in earlier) for v in values)


def facilities(talk: Talk) -> bool:
    """A value in the words that people have for it."""
    for place in talk.guests():
        text = talk.messages[place].content
        known = [v for v in talk.values if v in words()["phrases"] and text.count(v) == 1 and v not in talk.said]
        known = [v for v in known if not any(v != other and v in other and other in text for other in talk.values)]
        if known:
            value = talk.chance.choice(known)
            phrase = talk.chance.choice(words()["phrases"][value])
            elsewhere = any(value in m.content for n, m in enumerate(talk.messages) if m.role == "user" and n != place)
            if not elsewhere and phrase not in text:
                talk.said[value] = phrase
                return talk.put(place, text.replace(value, phrase))
    return False


def names(talk: Talk) -> bool:
    """A name in the short form that guests use, in the turn and in its call; that it finds the same is for the caller
    to see to."""
    for place in talk.guests():
        text = talk.messages[place].content
        for number, message in enumerate(talk.messages[place + 1 : place + 2], place + 1):
            for call in message.calls:
                name = call.arguments.get("name")
                if not isinstance(name, str) or text.count(name) != 1 or name in talk.said:
                    continue
                short = re.sub(words()["name_endings"], "", name)
                if 2 <= len(short) < len(name) and not _named_again(talk, name, place, number):
                    talk.said[name] = short
                    called = Call(call.name, {**call.arguments, "name": short})
                    calls = tuple(called if one is call else one for one in message.calls)
                    talk.messages[number] = replace(message, calls=calls)
                    return talk.put(place, text.replace(name, short))
    return False


def _named_again(talk: Talk, name: str, place: int, number: int) -> bool:
    """Whether a guest or a call names it elsewhere, so that the short form would not be the only one."""
    return any(
        (message.role == "user" and name in message.content and at != place)
        or (at != number and any(call.arguments.get("name") == name for call in message.calls))
        for at, message in enumerate(talk.messages)
    )


def amounts(talk: Talk) -> bool:
    """A range or a bound in other words, in figures or, now and then, in Chinese numerals."""
    forms = ((RANGE, _between), (AT_MOST, _at_most), (AT_LEAST, _at_least))
    for place in talk.guests():
        text = talk.messages[place].content
        for pattern, form in talk.chance.sample(forms, len(forms)):
            match = pattern.search(text)
            numbers = [group for group in match.groups() if group[0].isdigit()] if match else []
            if match is None or not set(numbers) <= set(talk.values) or _negated(text, match.start()):
                continue
            spoken = [_spoken(number, talk.chance) for number in numbers]
            others = text[: match.start()] + text[match.end() :]
            if any(place_of(number, others) >= 0 for number in numbers):
                continue
            talk.said |= {number: said for number, said in zip(numbers, spoken, strict=True) if number != said}
            return talk.put(place, text[: match.start()] + form(talk.chance, match, spoken) + text[match.end() :])
    return False


def _between(chance: random.Random, match: re.Match[str], spoken: Sequence[str]) -> str:
    return chance.choice(words()["between"]).format(low=spoken[0], high=spoken[1])


def _at_most(chance: random.Random, match: re.Match[str], spoken: Sequence[str]) -> str:
    return chance.choice(words()["at_most"]).format(high=spoken[0])


def _at_least(chance: random.Random, match: re.Match[str], spoken: Sequence[str]) -> str:
    return chance.choice(words()["points_at_least" if match[2] == "分" else "at_least"]).format(low=spoken[0])


def _negated(text: str, place: int) -> bool:
    return bool(re.search("[不别没非]", text[max(0, place - 4) : place]))


def _spoken(number: str, chance: random.Random) -> str:
    return numeral(int(number)) if number.isdigit() and 10 <= int(number) < 10000 and chance.random() < 0.3 else number


def numeral(number: int) -> str:
    """A whole number from 0 to 9999 in Chinese numerals: 1050 is 一千零五十."""
    if number < 10:
        return DIGITS[number]
    said, zero = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // unit % 10
        if digit:
            said += ("零" if zero and said else "") + DIGITS[digit] + name
        zero = digit == 0
    return said.removeprefix("一") if said.startswith("一十") else said


def homophones(talk: Talk) -> bool:
    """A word written as another one that sounds alike."""
    for place in _noisy(talk):
        text, table = talk.messages[place].content, words()["homophones"]
        held = talk.held(text)
        known = [(text.find(word), word) for word in table if word in text]
        known = [(at, word) for at, word in known if _free(at, at + len(word), held)]
        if known:
            at, word = talk.chance.choice(known)
            return talk.put(place, text[:at] + talk.chance.choice(table[word]) + text[at + len(word) :])
    return False


def typos(talk: Talk) -> bool:
    """Two characters changed places, one left out, or one twice."""
    for place in _noisy(talk):
        text, telling = talk.messages[place].content, words()["telling"]
        held = talk.held(text)
        free = [
            at
            for at in range(len(text) - 1)
            if _free(at, at + 2, held) and all(char.isalpha() and char not in telling for char in text[at : at + 2])
        ]
        if free:
            at = talk.chance.choice(free)
            one, two = text[at], text[at + 1]
            return talk.put(place, text[:at] + talk.chance.choice((two + one, two, one + one + two)) + text[at + 2 :])
    return False


def order(talk: Talk) -> bool:
    """The parts of a sentence in another order, where none leans on another."""
    for place in _noisy(talk):
        text = talk.messages[place].content
        body, end = re.fullmatch(r"(.*?)([。！？!?.]*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        clauses = re.split("[，,]", body)
        first = next((1 for word in words()["openings"] if clauses[0].startswith(word)), 0)
        rest = clauses[first:]
        whole = all(len(clause) > 1 and not re.search("[。！？!?；;]", clause) for clause in rest)
        if len(rest) < 2 or not whole or any(word in body for word in words()["ordering"]):
            continue
        moved = talk.chance.sample(rest, len(rest))
        if moved != rest:
            return talk.put(place, "，".join([*clauses[:first], *moved]) + end)
    return False


def _noisy(talk: Talk) -> Iterator[int]:
    return (place for place in talk.guests() if talk.literal(place))


def _free(start: int, end: int, held: Sequence[tuple[int, int]]) -> bool:
    return all(end <= low or high <= start for low, high in held)


def follow_up(talk: Talk) -> bool:
    """One more question, about the one record that the last answer names, answered from that record."""
    if not _open(talk):
        return False
    said = "\n".join(message.content for message in talk.messages if message.role in ("user", "assistant"))
    record = _named_record(talk)
    fields = [f for f in words()["questions"] if record.get(f) and str(record[f]) not in said and f not in said]
    if not fields:
        return False
    field = talk.chance.choice(fields)
    value = "、".join(record[field]) if isinstance(record[field], list) else record[field]
    answer = words()["answer"].format(name=record["名称"], field=field, value=value)
    question = talk.chance.choice(words()["questions"][field])
    talk.messages += [Message("user", question), Message("assistant", answer)]
    return True


def _named_record(talk: Talk) -> dict[str, Any]:
    """The record of the last result that the last answer names, if it names exactly one."""
    results = [message.content for message in talk.messages if message.role == "tool"]
    try:
        found = list(_records(json.loads(results[-1]))) if results else []
    except ValueError:
        found = []
    named = [record for record in found if str(record["名称"]) in talk.messages[-1].content]
    return named[0] if len(named) == 1 else {}


def _records(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if value.get("名称"):
            yield value
        for one in value.values():
            yield from _records(one)
    elif isinstance(value, list):
        for one in value:
            yield from _records(one)


def goodbye(talk: Talk) -> bool:
    """The guest takes leave, and is answered."""
    if not _open(talk):
        return False
    farewell, reply = talk.chance.choice(words()["goodbyes"]), talk.chance.choice(words()["replies"])
    talk.messages += [Message("user", farewell), Message("assistant", reply)]
    return True


def _open(talk: Talk) -> bool:
    """Whether the conversation can go on: an answer in words stands last, and nobody has taken leave."""
    last = next((message.content for message in reversed(talk.messages) if message.role == "user"), "")
    end = talk.messages[-1]
    return end.role == "assistant" and not end.calls and not re.search(words()["closed"], last)


RULES: dict[str, tuple[float, Callable[[Talk], bool]]] = {
    "facilities": (0.5, facilities),
    "names": (0.3, names),
    "amounts": (0.5, amounts),
    "order": (0.3, order),
    "homophones": (0.2, homophones),
    "typos": (0.2, typos),
    "follow_up": (0.3, follow_up),
    "goodbye": (0.3, goodbye),
}
