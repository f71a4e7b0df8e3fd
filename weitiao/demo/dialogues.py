"""Dialogues between a guest and the hotel assistant, written from a seed.

    for chat in dialogues(Database.build(0), "train", count=800, seed=0): ...

What a guest says is put together from the pieces in ``phrases.yaml``; training uses the ``seen`` ones, validation and
test the ``held`` ones. The assistant calls ``search_hotels`` with all conditions that hold at that moment, reads the
records and answers from them in one fixed style, which is what tuning teaches.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from weitiao.data.crosswoz import SEARCH_HOTELS
from weitiao.data.rows import Call, Chat, Message
from weitiao.demo.database import TYPES, Database, Hotel, answer, search_hotels

SYSTEM = "你是酒店预订助手。"
ARGUMENTS = tuple(SEARCH_HOTELS["function"]["parameters"]["properties"])
AROUND = 100  # yuan: 左右 means this much less to this much more
GOODBYE = 0.3
SLOTS = ("type", "facilities", "price", "rating")

State = dict[str, Any]

_ALTERNATIVES = re.compile(r"\[([^\]]*)\]")


@cache
def phrases() -> dict[str, Any]:
    """The pieces of ``phrases.yaml``."""
    import yaml

    return yaml.safe_load((files("weitiao.demo") / "phrases.yaml").read_text(encoding="utf-8"))


def dialogues(database: Database, part: str, count: int, seed: int) -> Iterator[Chat]:
    """``count`` dialogues on the hotels of ``part`` (train, validation, test), each a ``Chat`` of its own group."""
    for number in range(count):
        random_ = random.Random(f"dialogue {seed} {part} {number}")
        guest = Guest(random_, "seen" if part == "train" else "held")
        name = f"{part}-{number:04d}"
        yield Chat(tuple(_dialogue(guest, database.part(part))), (SEARCH_HOTELS,), id=name, group=name)


class Guest:
    """Chooses what a guest wants and the pieces it is said with; ``pool`` is ``seen`` or ``held``."""

    def __init__(self, random_: random.Random, pool: str):
        self.random, self.pool = random_, pool

    def pick(self, *path: str) -> str:
        """A piece of ``phrases.yaml`` at ``path``, from this guest's pool, of each ``[a|b]`` one alternative."""
        piece: Any = phrases()
        for key in path:
            piece = piece[key]
        shared = phrases()["shared"]
        return _ALTERNATIVES.sub(
            lambda found: self.random.choice(shared.get(found[1], found[1]).split("|")),
            self.random.choice(piece[self.pool]),
        )

    def amount(self, price: int) -> str:
        """A price in figures, or now and then the way hundreds are spoken (三百, 一千)."""
        if price % 100 == 0 and price <= 1000 and self.random.random() < 0.15:
            return "一千" if price == 1000 else "一两三四五六七八九"[price // 100 - 1] + "百"
        return str(price)

    def type(self, hotel: Hotel | None) -> tuple[str, State]:
        """A clause that asks for a type, and what it sets."""
        type_ = hotel.type if hotel else self.random.choice(TYPES)
        return self.pick("type_clause").format(stem=phrases()["types"][type_]), {"type": type_}

    def facilities(self, hotel: Hotel | None, besides: Sequence[str] = ()) -> tuple[str, State]:
        """A clause that asks for one or two facilities not among ``besides``."""
        choice = [name for name in (hotel.facilities if hotel else phrases()["facilities"]) if name not in besides]
        wanted = self.random.sample(choice, min(len(choice), self.random.choice((1, 1, 1, 2))))
        if self.random.random() < 0.5:
            clause = self.pick("facility_clause").format(facility=self.pick("two_facilities").join(wanted))
        else:
            clause = "，".join(self.pick("facilities", name) for name in wanted)
        return clause, {"facilities": wanted}

    def price(self, hotel: Hotel | None) -> tuple[str, State]:
        """A clause that bounds the price from above, below, both, or around."""
        near = hotel.price if hotel else self.random.randint(100, 1500)
        step = self.random.choice((10, 50, 50, 100, 100, 100))
        low, high = max(step, near // step * step), near // step * step + step
        kind = self.random.choice(("upper", "lower", "between", "around"))
        if kind == "upper":
            bound = high + step * self.random.randint(0, 2)
            return self.pick("price_upper").format(p=self.amount(bound)), {"price_range_upper": bound}
        if kind == "lower":
            bound = max(step, low - step * self.random.randint(0, 2))
            return self.pick("price_lower").format(p=self.amount(bound)), {"price_range_lower": bound}
        if kind == "between":
            low, high = max(step, low - step * self.random.randint(0, 2)), high + step * self.random.randint(0, 2)
            values = {"price_range_lower": low, "price_range_upper": high}
            return self.pick("price_between").format(a=self.amount(low), b=self.amount(high)), values
        middle = max(200, round(near / 50) * 50)
        values = {"price_range_lower": middle - AROUND, "price_range_upper": middle + AROUND}
        return self.pick("price_around").format(p=self.amount(middle)), values

    def rating(self, hotel: Hotel | None) -> tuple[str, State]:
        """A clause that bounds the rating, mostly from below."""
        near = hotel.rating if hotel else self.random.uniform(3.5, 5.0)
        low = round(max(3.0, near - self.random.randint(0, 5) / 10), 1)
        high = round(min(5.0, max(low + 0.1, near + self.random.randint(0, 3) / 10)), 1)
        kind = self.random.choice(("lower", "lower", "lower", "upper", "between"))
        if kind == "lower":
            return self.pick("rating_lower").format(r=_number(low)), {"rating_range_lower": low}
        if kind == "upper":
            return self.pick("rating_upper").format(r=_number(high)), {"rating_range_upper": high}
        values = {"rating_range_lower": low, "rating_range_upper": high}
        return self.pick("rating_between").format(a=_number(low), b=_number(high)), values

    def conditions(self, hotel: Hotel | None, count: int) -> tuple[str, State]:
        """Several clauses joined to a request, and all that they set."""
        state: State = {}
        clauses = []
        for slot in self.random.sample(SLOTS, count):
            clause, values = getattr(self, slot)(hotel)
            clauses.append(clause)
            state |= values
        text = clauses[0]
        for clause in clauses[1:]:
            text += self.pick("join") + clause
        return text, state


def _number(value: float) -> str:
    return f"{value:g}"


def ordered(state: State) -> State:
    """A call's arguments in the schema's order, without the empty ones."""
    return {name: state[name] for name in ARGUMENTS if state.get(name) not in (None, [], "")}


def update(state: State, values: State) -> State:
    """The state after the guest said ``values``: a new bound replaces both old ones, facilities are added up."""
    kept = dict(state)
    for slot in ("price", "rating"):
        if any(name.startswith(slot) for name in values):
            kept = {name: value for name, value in kept.items() if not name.startswith(slot)}
    if "facilities" in values:
        values = values | {"facilities": [*kept.get("facilities", []), *values["facilities"]]}
    return ordered(kept | values)


def _dialogue(guest: Guest, hotels: Sequence[Hotel]) -> Iterator[Message]:
    yield Message("system", SYSTEM)
    random_, request, found = guest.random, opening(guest, hotels), []
    unseen = list(hotels)  # a guest asks by name only for hotels that no answer has shown yet
    for turn in range(random_.choice((1, 2, 2, 3))):
        if turn:
            request = following(guest, unseen, request.state, found)
        yield Message("user", request.said)
        found = search_hotels(hotels, **request.state)
        yield Message("assistant", calls=(Call("search_hotels", request.state),))
        yield Message("tool", json.dumps(answer(found), ensure_ascii=False), name="search_hotels")
        yield Message("assistant", reply(found[0], request.about) if found and request.about else describe(found))
        if found and random_.random() < 0.5:
            yield from _question(guest, found[:2])
        unseen = [hotel for hotel in unseen if hotel not in found[:2]]
    if random_.random() < GOODBYE:
        yield Message("user", guest.pick("bye"))
        yield Message("assistant", "不客气，祝您入住愉快，再见！")


@dataclass(frozen=True)
class Request:
    """What a guest says, the conditions that hold from then on, and the field asked about if it is a question."""

    said: str
    state: State
    about: str | None = None


def opening(guest: Guest, hotels: Sequence[Hotel]) -> Request:
    """How a conversation starts: a wish, or a hotel asked for by name."""
    if guest.random.random() < 0.25:
        return by_name(guest, guest.random.choice(hotels))
    hotel = guest.random.choice(hotels) if guest.random.random() < 0.85 else None
    text, state = guest.conditions(hotel, guest.random.choice((1, 2, 2, 3)))
    return Request(guest.pick("open") + text + guest.pick("close"), ordered(state))


def by_name(guest: Guest, hotel: Hotel) -> Request:
    """A hotel asked for by name or abbreviation, perhaps with a question about it."""
    name = hotel.short if guest.random.random() < 0.5 else hotel.name
    if guest.random.random() < 0.5:
        return Request(guest.pick("by_name").format(name=name), {"name": name})
    about = guest.random.choice(tuple(phrases()["ask"]))
    return Request(guest.pick("ask", about).format(ref=name), {"name": name}, about)


def following(guest: Guest, unseen: Sequence[Hotel], state: State, found: Sequence[Hotel]) -> Request:
    """What comes after an answer: another hotel by name, a condition added, changed or dropped."""
    move = guest.random.choice(("add", "add", "change", "change", "drop", "name"))
    if "name" in state:
        return opening(guest, unseen)
    if move == "name":
        return by_name(guest, guest.random.choice(unseen))
    held = sorted({name.split("_")[0] for name in state})
    if move == "drop" and len(held) > 1:
        return _drop(guest, state, guest.random.choice(held))
    changeable = [slot for slot in held if slot != "facilities"]
    addable = [slot for slot in SLOTS if slot not in held] or ["facilities"]
    if move != "change" or not changeable:
        move, slot = "add", guest.random.choice(addable)
    else:
        slot = guest.random.choice(changeable)
    wish = guest.random.choice(found) if found and move == "add" and guest.random.random() < 0.7 else None
    return _add_or_change(guest, state, move, slot, wish)


def _add_or_change(guest: Guest, state: State, move: str, slot: str, wish: Hotel | None) -> Request:
    after = state
    while after == state:  # a wish that changes nothing is no wish: draw again, freely
        if slot == "facilities":
            clause, values = guest.facilities(None, state.get("facilities", ()))
        else:
            clause, values = getattr(guest, slot)(wish)
        after, wish = update(state, values), None
    return Request(guest.pick(move).format(clause=clause) + "。", after)


def _drop(guest: Guest, state: State, slot: str) -> Request:
    if slot == "facilities" and len(state["facilities"]) > 1:
        gone = guest.random.choice(state["facilities"])
        kept = [name for name in state["facilities"] if name != gone]
        return Request(guest.pick("remove_facility").format(facility=gone) + "。", state | {"facilities": kept})
    said = guest.pick("drop").format(slot=guest.random.choice(phrases()["slots"][slot])) + "。"
    return Request(said, {name: value for name, value in state.items() if not name.startswith(slot)})


def describe(found: Sequence[Hotel]) -> str:
    """The assistant's answer to a search."""
    if not found:
        return "抱歉，没有符合条件的酒店，您可以放宽一下条件。"
    told = [f"{hotel.name}，{hotel.type}，{hotel.price}元，{_number(hotel.rating)}分" for hotel in found[:2]]
    if len(found) == 1:
        return f"为您找到1家：{told[0]}。"
    return f"为您找到{len(found)}家，推荐：一、{told[0]}；二、{told[1]}。"


def reply(hotel: Hotel, about: str) -> str:
    """The assistant's answer to a question about a hotel that the conversation already holds."""
    return {
        "phone": f"{hotel.name}的电话是{hotel.phone}。",
        "address": f"{hotel.name}的地址是{hotel.address}。",
        "facilities": f"{hotel.name}的设施有{'、'.join(hotel.facilities)}。",
        "price": f"{hotel.name}每晚{hotel.price}元。",
        "rating": f"{hotel.name}的评分是{_number(hotel.rating)}分。",
        "metro": f"{hotel.name}最近的地铁站是{hotel.metro}。",
    }[about]


def _question(guest: Guest, shown: Sequence[Hotel]) -> Iterator[Message]:
    index = guest.random.randrange(len(shown))
    hotel, about = shown[index], guest.random.choice(tuple(phrases()["ask"]))
    named = hotel.name if guest.random.random() < 0.5 else hotel.short
    which = "only" if len(shown) == 1 else ("first", "second")[index]
    ref = guest.pick("refs", which) if guest.random.random() < 0.6 else named
    yield Message("user", guest.pick("ask", about).format(ref=ref))
    yield Message("assistant", reply(hotel, about))
