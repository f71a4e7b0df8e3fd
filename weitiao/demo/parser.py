"""What can be had without a model: an untrained parser of lexicon and regular expressions, the report's last row.

    parse("要豪华型的，400元以下", known)            # {"type": "豪华型", "price_range_upper": 400}
    next_call(messages, known)                      # the call it would make, or None

It knows the hotels' names and the facilities' words, reads bounds by the words around a number, and keeps the
conditions of the call before. It learns nothing, so whatever it lacks is what tuning has to add.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weitiao.data.rows import Call, Message
from weitiao.demo.database import TYPES, Hotel
from weitiao.demo.dialogues import AROUND, ordered, phrases, update

FIGURES = {word + "百": (number + 1) * 100 for number, word in enumerate("一两三四五六七八九")} | {"一千": 1000}
NUMBER = r"(\d+(?:\.\d+)?|[一两三四五六七八九]百|一千)"
RANGE = re.compile(NUMBER + r"(?:元|块|分)?(?:到|至|-|~|和|以上)" + NUMBER)
BETWEEN = re.compile(rf"(?:最低|不低于|起步){NUMBER}\D{{0,4}}?(?:最高|不超过|也不超过){NUMBER}")
SINGLE = re.compile(NUMBER)
UPPER = re.compile(r"以下|以内|不超过|不要超过|别超|不高于|最多|最高|低于|顶多|不能超过|之内|压在")
LOWER = re.compile(r"以上|不低于|不能低于|不少于|至少|最少|起码|最低|高于|超过|往上")
NEAR = re.compile(r"左右|上下|大概|大约|差不多")
DROP = re.compile(
    r"不限|随便|无所谓|都可以|没有要求|不要求|取消|不用考虑|去掉|不需要|不用了|不要.+了|就算了|没有.+也行"
)
WORDS = re.compile(r"评分|打分|分数|星|评价|口碑|给分|分")


def parse(text: str, known: Sequence[Hotel]) -> dict[str, Any]:
    """The search arguments that ``text`` states by itself."""
    if name := _name(text, known):
        return {"name": name}
    stated: dict[str, Any] = {}
    for type_ in TYPES:
        if type_[:-1] in text:
            stated["type"] = type_
    if facilities := [name for name in phrases()["facilities"] if _mentions(text, name)]:
        stated["facilities"] = sorted(facilities, key=lambda name: _place(text, name))
    for clause in re.split(r"[，。；？！]|并且|还要|而且|同时|另外|、", text):
        stated |= _bounds(clause)
    return stated


def _name(text: str, known: Sequence[Hotel]) -> str | None:
    """The longest name or abbreviation of a known hotel that stands in ``text``."""
    found = [name for hotel in known for name in (hotel.name, hotel.short) if name in text]
    return max(found, key=len, default=None)


def _stem(facility: str) -> str:
    for ending in ("服务", "电话", "房", "室", "厅", "场", "池", "机", "网络"):
        if facility.endswith(ending) and len(facility) > len(ending) + 1:
            return facility.removesuffix(ending)
    return facility


def _mentions(text: str, facility: str) -> bool:
    return facility in text or _stem(facility) in text


def _place(text: str, facility: str) -> int:
    return text.find(facility) if facility in text else text.find(_stem(facility))


def _value(word: str) -> float:
    value = FIGURES.get(word) or float(word)
    return int(value) if float(value).is_integer() else value


def _bounds(clause: str) -> dict[str, Any]:
    """The bounds that one clause puts on price or rating: numbers up to 5 beside a word for rating are ratings."""
    pair = BETWEEN.search(clause) or RANGE.search(clause)
    values = [_value(word) for word in (pair.groups() if pair else SINGLE.findall(clause)[:1])]
    if not values:
        return {}
    rating = max(values) <= 5 and WORDS.search(clause)
    slot = "rating_range" if rating else "price_range"
    if len(values) == 2:
        return {f"{slot}_lower": min(values), f"{slot}_upper": max(values)}
    if NEAR.search(clause) and not rating:
        return {f"{slot}_lower": values[0] - AROUND, f"{slot}_upper": values[0] + AROUND}
    if UPPER.search(clause) and not re.search(r"以上|不低于|不能低于", clause):
        return {f"{slot}_upper": values[0]}
    return {f"{slot}_lower": values[0]} if LOWER.search(clause) else {}


def next_call(messages: Sequence[Message], known: Sequence[Hotel]) -> Call | None:
    """The call that follows ``messages``; None when the last of them is no guest's, or asks for what was shown."""
    if messages[-1].role != "user":
        return None
    before = [dict(call.arguments) for message in messages for call in message.calls]
    shown = "".join(message.content for message in messages if message.role == "tool")
    text, state = messages[-1].content, before[-1] if before else {}
    stated = parse(text, known)
    if "name" in stated:
        return None if stated["name"] in shown else Call("search_hotels", stated)
    state = {name: value for name, value in state.items() if name != "name"}
    if DROP.search(text) and (kept := _dropped(text, state, stated)) != state:
        return Call("search_hotels", ordered(kept))
    return Call("search_hotels", update(state, stated)) if stated else None


def _dropped(text: str, state: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` without the condition that ``text`` takes back."""
    if "facilities" in stated and "facilities" in state:
        return dict(state) | {"facilities": [name for name in state["facilities"] if name not in stated["facilities"]]}
    gone = [slot for slot, words in phrases()["slots"].items() if any(word in text for word in words)]
    return {name: value for name, value in state.items() if not name.startswith(tuple(gone) or ("-",))}
