"""More turns out of the training ones: other values in the same sentences, and the turns that the segments leave out.

    for turn in vary(turns, hotels, places, seed=0): ...

Facilities, types, prices and ratings are exchanged in utterance and arguments alike, so that a rare facility is seen as
often as a common one, and some are said as people talk. The training segments hold no question about a hotel already
found and no search by name; such turns are put together from the pieces in ``crosswoz_phrases.yaml``. Everything
follows from the seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from weitiao.data.augment_rules import numeral, words
from weitiao.data.crosswoz_raw import FACILITIES, TYPES
from weitiao.data.crosswoz_turns import HISTORY_MESSAGES, Arguments, Turn, merge, slot_of, wants_another
from weitiao.data.rows import Message

VARIANTS = 3  # of each sentence whose values are known
QUESTIONS = 0.8  # questions and searches by name, per sentence
DIALOGUES = 1.0  # composed dialogues, per sentence
SPOKEN_SHARE = 0.3  # of the values are said as people talk
SOME_HOTEL = "北京饭店"

SPOKEN = re.compile(
    "|".join(
        (
            rf"(?P<facility>{'|'.join(map(re.escape, sorted(FACILITIES, key=len, reverse=True)))})",
            rf"(?P<type>{'|'.join(TYPES)})",
            r"(?P<range>\d{2,5}[-到至~]\d{2,5}元)",
            r"(?P<bound>\d{3,5}元(?:以上|以下|以内))",
            r"(?P<rating>(?<![\d.])\d(?:\.\d)?分(?:以上)?)",
        )
    )
)
NUMBERS = re.compile(r"\d+(?:\.\d+)?")


@cache
def phrases() -> dict[str, Any]:
    """The pieces of ``crosswoz_phrases.yaml``."""
    import yaml

    return yaml.safe_load((files("weitiao.data") / "crosswoz_phrases.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Sentence:
    """A training utterance in pieces: plain text, and kinds of value (a tuple of one) between."""

    pieces: tuple[str | tuple[str], ...]
    turn: Turn


def vary(turns: Sequence[Turn], hotels: Sequence[str], places: Sequence[str], seed: int) -> Iterator[Turn]:
    """Turns made of the training ``turns``, of names of ``hotels`` and ``places``; none without turns to learn from."""
    chance = random.Random(f"crosswoz turns {seed}")
    sentences = [found for turn in turns if (found := sentence(turn))]
    maker = Maker(chance, sentences, hotels or [SOME_HOTEL], places)
    for one in sentences:
        for _ in range(VARIANTS):
            yield maker.revalued(one)
    for _ in range(round(QUESTIONS * len(sentences))):
        yield maker.question()
    for _ in range(round(DIALOGUES * len(sentences))):
        yield maker.dialogue()


def sentence(turn: Turn) -> Sentence | None:
    """The utterance in pieces; None where it does not hold its values literally, each once, and nothing beside them."""
    pieces: list[str | tuple[str]] = []
    found: Arguments = {}
    end = 0
    for match in SPOKEN.finditer(turn.text):
        kind = str(match.lastgroup)
        pieces += [turn.text[end : match.start()], (kind,)]
        values = spoken(kind, match.group())
        if values.keys() & found.keys() - {"facilities"}:
            return None
        found = _added(found, values)
        end = match.end()
    pieces.append(turn.text[end:])
    left = any(NUMBERS.search(piece) for piece in pieces if isinstance(piece, str))
    same = _unordered(found) == _unordered(turn.stated or {})
    return Sentence(tuple(pieces), turn) if found and same and not left else None


def spoken(kind: str, text: str) -> Arguments:
    """The arguments that one value of ``SPOKEN`` states."""
    if kind == "facility":
        return {"facilities": [text]}
    if kind == "type":
        return {"type": text}
    numbers = [float(number) if "." in number else int(number) for number in NUMBERS.findall(text)]
    if kind == "range":
        return {"price_range_lower": numbers[0], "price_range_upper": numbers[1]}
    if kind == "bound":
        return {f"price_range_{'lower' if text.endswith('以上') else 'upper'}": numbers[0]}
    return {"rating_range_lower": numbers[0]} | ({} if text.endswith("以上") else {"rating_range_upper": numbers[0]})


def _added(found: Arguments, values: Arguments) -> Arguments:
    """``values`` put to ``found``; facilities add up."""
    facilities = [*found.get("facilities", []), *values.get("facilities", [])]
    return found | values | ({"facilities": facilities} if facilities else {})


def _unordered(arguments: Arguments) -> Arguments:
    return arguments | {"facilities": sorted(arguments.get("facilities", []))}


class Maker:
    """Makes turns out of ``sentences``, names of ``hotels`` and ``places``, as ``chance`` has it."""

    def __init__(
        self, chance: random.Random, sentences: Sequence[Sentence], hotels: Sequence[str], places: Sequence[str]
    ):
        self.chance, self.hotels, self.places = chance, hotels, places
        self.seeking = [one for one in sentences if wants_another(one.turn.text)] or sentences
        self.narrowing = [one for one in sentences if not wants_another(one.turn.text) and one.turn.history]

    def pick(self, name: str, *values: object, **named: object) -> str:
        """One of the phrases called ``name``, filled in."""
        return self.chance.choice(phrases()[name]).format(*values, **named)

    def revalued(self, one: Sentence) -> Turn:
        """The sentence with other values; its search is known where nothing was said before it."""
        text, stated = "", Arguments()
        for piece in one.pieces:
            if isinstance(piece, str):
                text += piece
            else:
                words, values = self.value(piece[0], taken=stated.get("facilities", ()))
                text += words
                stated = _added(stated, values)
        if self.places and wants_another(text) and self.chance.random() < 0.15:
            near = f"在{self.chance.choice(self.places)}{self.pick('near')}"
            text = re.sub("(找|推荐|介绍)(?=一[个家])", lambda match: f"{near}{match[1]}", text, count=1)
        kept = {slot_of(name) for name in one.turn.own}
        own = {name: value for name, value in stated.items() if slot_of(name) in kept}
        return Turn(text, own, (), None if one.turn.history else stated, stated)

    def value(self, kind: str, taken: Sequence[str] = ()) -> tuple[str, Arguments]:
        """Words for a value of a kind, and the arguments that they state; often not those of the annotation."""
        text = getattr(self, f"_{kind}")(taken) if kind == "facility" else getattr(self, f"_{kind}")()
        return (self.spoken(kind, text) if self.chance.random() < SPOKEN_SHARE else text), spoken(kind, text)

    def _facility(self, taken: Sequence[str]) -> str:
        return self.chance.choice([name for name in FACILITIES if name not in taken])

    def _type(self) -> str:
        return self.chance.choice(TYPES)

    def _range(self) -> str:
        chance = self.chance
        low = 100 * chance.randint(1, 9) if chance.random() < 0.85 else 50 * chance.randint(1, 30)
        high = low + (100 if chance.random() < 0.8 else 50 * chance.randint(1, 12))
        return f"{low}{'-' if chance.random() < 0.85 else chance.choice('到至~')}{high}元"

    def _bound(self) -> str:
        chance = self.chance
        text = f"{1000 if chance.random() < 0.6 else 100 * chance.randint(2, 20)}元"
        return text + ("以上" if chance.random() < 0.75 else chance.choice(("以下", "以内")))

    def _rating(self) -> str:
        chance = self.chance
        rating = chance.choice(("4", "4.5", "5")) if chance.random() < 0.85 else f"{chance.randint(35, 49) / 10:g}"
        return rating + ("分" if rating == "5" or chance.random() < 0.15 else "分以上")

    def spoken(self, kind: str, text: str) -> str:
        """A value as people say it, where there are words for it."""
        if kind == "facility":
            return self.chance.choice(
                [*phrases()["other_words"].get(text, []), *words()["phrases"].get(text, []), text]
            )
        if kind == "type":
            return self.chance.choice(phrases()["other_types"][text])
        numbers = NUMBERS.findall(text)
        if self.chance.random() < 0.6:
            numbers = ["点".join(map(numeral, map(int, number.split(".")))) for number in numbers]
        way = "" if kind == "range" else "_least" if text.endswith("以上") else "_most"
        return self.pick(f"said_{kind}{way}", low=numbers[0], high=numbers[-1])

    def question(self) -> Turn:
        """A question about a hotel already found, a search by name, or another search near a hotel."""
        kind = self.chance.random()
        hotel = self.chance.choice(self.hotels) if kind < 0.7 else ""
        stated: Arguments = {"name": hotel} if hotel else {}
        if kind < 0.12:
            return Turn(self.pick("openings") + self._near(hotel), stated, (), None, stated)
        if kind < 0.24:
            return Turn(self._by_name(hotel), stated, (), stated, stated)
        text, asked = self._asked(hotel)
        return Turn(self.pick("openings") + text, stated, (), None, stated | asked)

    def dialogue(self) -> Turn:
        """A search, perhaps questions about what it found, and a last utterance that leads to a call."""
        chance = self.chance
        first = self.revalued(chance.choice(self.seeking))
        state = first.stated or {}
        found = chance.sample(self.hotels, min(len(self.hotels), chance.randint(1, 3)))
        said = [Message("user", first.text), Message("assistant", self.pick("offers", "、".join(found)))]
        for _ in range(chance.choice((0, 0, 1, 1, 2, 3))):
            asked, _ = self._asked(chance.choice(found) if chance.random() < 0.3 else "")
            said += [Message("user", self.pick("openings") + asked), Message("assistant", self._answer())]
        kind = chance.random()
        if kind < 0.3:
            last = self.revalued(chance.choice(self.seeking))
            text, own, search = last.text, last.own, last.stated
        elif kind < 0.38:
            own = search = {"name": chance.choice(self.hotels)}
            text = self._by_name(own["name"])
        elif kind < 0.58:
            text, own, asked = self._checked(chance.choice(found) if chance.random() < 0.3 else "")
            search = merge(state, asked)
        else:
            text, own = self._narrowed()
            search = merge(state, own)
        return Turn(text, own, tuple(said[-HISTORY_MESSAGES:]), search, search)

    def _narrowed(self) -> tuple[str, Arguments]:
        """A choice among the hotels offered: a training sentence that makes one, or pieces of our own."""
        if self.narrowing and self.chance.random() < 0.6:
            last = self.revalued(self.chance.choice(self.narrowing))
            if last.own == last.stated:
                return last.text, last.own
        price = self.chance.choice(("range", "range", "bound"))
        clauses, stated = [], Arguments()
        for kind in self.chance.sample(("facility", "type", price, "rating"), self.chance.choice((1, 1, 2))):
            words, values = self.value(kind)
            clauses.append(self.chance.choice(phrases()["clauses"][kind]).format(words))
            stated |= values
        joined = self.chance.choice(("，", "、", "，而且")).join(clauses)
        return self.pick("openings") + self.pick("choices", joined), stated

    def _checked(self, name: str) -> tuple[str, Arguments, Arguments]:
        """A question whether an offered hotel meets a condition: what it informs of, and the condition."""
        hotel, own = name or self.pick("this_hotel"), Arguments(name=name) if name else Arguments()
        if self.chance.random() < 0.7:
            text, asked = self._has()
        else:
            words, asked = self.value(self.chance.choice(("type", "range", "rating")))
            text, own = self.pick("checks", words), own | asked
        return self.pick("openings") + hotel + text + self.pick("endings"), own, asked

    def _has(self) -> tuple[str, Arguments]:
        wanted = self.chance.sample(FACILITIES, self.chance.choice((1, 1, 2)))
        return self.pick("has", self.chance.choice("和、与").join(wanted)), {"facilities": wanted}

    def _asked(self, name: str) -> tuple[str, Arguments]:
        """A question about one hotel, and the facilities that it asks after."""
        asked: Arguments = {}
        parts = []
        has_first = self.chance.random() < 0.35
        for number in range(self.chance.choice((1, 1, 2))):
            if has_first if number == 0 else self.chance.random() < 0.35:
                text, wanted = self._has()
                parts.append(text)
                asked = _added(asked, wanted)
            else:
                parts.append(self.pick("asks"))
        text = self.chance.choice(("，", "？", "，还有")).join(parts)
        if name and self.chance.random() < 0.35:
            return self.pick("takes", name) + text + "？", asked
        hotel = name or self.pick("this_hotel")
        of = "的" if hotel and not has_first and self.chance.random() < 0.5 else ""
        return hotel + of + text + self.pick("endings"), asked

    def _by_name(self, hotel: str) -> str:
        ask = self.pick("asks") if self.chance.random() < 0.7 else self._has()[0]
        return self.pick("openings") + self.pick("by_name", hotel) + ask + "？"

    def _near(self, hotel: str) -> str:
        low = 50 * self.chance.randint(1, 6)
        rating, _ = self.value("rating")
        return self.pick("near_hotel", hotel=hotel, rating=rating, low=low, high=low + 50, place=self.pick("else"))

    def _answer(self) -> str:
        rating, price = self.chance.randint(38, 50) / 10, self.chance.randint(100, 1500)
        return self.pick("answers", rating=f"{rating:g}", price=price)
