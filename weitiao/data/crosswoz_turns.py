"""What a CrossWOZ guest's utterance teaches: what it states by itself, and the search that it leads to.

    for turn in turns_of(dialogue): turn.text, turn.own, turn.history, turn.search

The training segments carry calls and no dialogue acts. Their acts are worked out here: what is new in a call, or stands
in the utterance. So are their calls: the segments add up all that the guest ever said, whereas CrossWOZ's wizards added
up only while the guest chose among the hotels offered, and began anew when another one was wanted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weitiao.data.crosswoz_raw import HOTEL, RATING_EXACT
from weitiao.data.rows import Message

HISTORY_MESSAGES = 8

Arguments = dict[str, Any]
Dialogue = Mapping[str, Any]

SEEKS = re.compile(r"(找|推荐|介绍|换|选|安排|打算|想|要|订|定).*(酒店|宾馆|住)|(找|推荐|介绍)(一|个|家|下)")
AMONG_OFFERED = re.compile(
    r"[这那][些几两俩三]|以上酒店|刚才|你说的|补充|该酒店|这家酒店(?!附近|周边)|[他它]家|想(了解|知道|问)"
)
WHICH = re.compile(r"哪|这[些几两俩三]|那[些几两俩三]|其中|里面|有没有.*的(酒店)?[？?吗么]")
QUESTION = re.compile(r"[吗么？?呢]|是否|有没有|没有")
# Bigrams that many facilities share say nothing about which of them is meant.
COMMON_PAIRS = frozenset(("服务", "提供", "设施", "酒店", "房间", "部分", "公共", "区域", "免费", "电话"))


@dataclass(frozen=True)
class Turn:
    """A guest's utterance: what its own words inform of (``own``), what was said before it in the hotel segment, and
    the search that it leads to (None: none is known). ``stated`` is all that it mentions, questions included."""

    text: str
    own: Arguments
    history: tuple[Message, ...] = ()
    search: Arguments | None = None
    stated: Arguments | None = None


def call_turns(dialogue: Dialogue) -> Iterator[int]:
    """Indices of the guest's messages that lead to a clean gold call: one that the guest asked for, that
    ``search_hotels`` can say in full, and that rests on no other domain's results."""
    for index, message in enumerate(dialogue["messages"]):
        unclean = message.get("search_kind") == "bookkeeping" or message.get("search_unmapped")
        if "search_args" in message and not unclean and not message.get("cross_domain_ref"):
            yield index


def acts_turns(dialogue: Dialogue) -> Iterator[int]:
    """Indices of the guest's messages that are about a hotel, whether they state a condition or not."""
    for index, message in enumerate(dialogue["messages"]):
        acts = message.get("acts", ())
        if message["role"] == "user" and ("act_args" in message or any(act[1] == HOTEL for act in acts)):
            yield index


def history(dialogue: Dialogue, index: int) -> tuple[Message, ...]:
    """What was said before message ``index`` in its hotel segment, the last ``HISTORY_MESSAGES`` messages of it.

    A dialogue cut down to one segment (``segment_only``) is all history; a message outside any segment has none."""
    messages = dialogue["messages"]
    segment = messages[index].get("segment")
    if segment is None and not dialogue.get("segment_only"):
        return ()
    said = [message for message in messages[:index] if message.get("segment") == segment]
    return tuple(Message(message["role"], message["text"]) for message in said[-HISTORY_MESSAGES:])


def turns_of(dialogue: Dialogue) -> list[Turn]:
    """The turns of one training dialogue; where it carries no acts (a segment), they are worked out from its calls."""
    messages = dialogue["messages"]
    if dialogue.get("segment_only"):
        return _segment_turns(dialogue)
    calls = set(call_turns(dialogue))
    turns = []
    for index in sorted(calls | set(acts_turns(dialogue))):
        own = messages[index].get("act_args", {})
        search = messages[index]["search_args"] if index in calls else None
        turns.append(Turn(messages[index]["text"], own, history(dialogue, index), search, own))
    return turns


def _segment_turns(dialogue: Dialogue) -> list[Turn]:
    turns = []
    called: Arguments = {}
    state: Arguments = {}
    offered: list[str] = []
    for index, message in enumerate(dialogue["messages"]):
        if message["role"] != "user" or "search_args" not in message:
            continue
        text, call = message["text"], message["search_args"]
        mentioned = stated(text, call, called)
        state = mentioned if wants_another(text) else merge(state, mentioned)
        names = sorted((name for name in offered if name in text), key=len)
        named = mentioned | ({"name": names[-1]} if names else {})
        turns.append(Turn(text, informs(text, named), history(dialogue, index), state or None, named))
        called = call
        offered += message.get("results", ())
    return turns


def stated(text: str, call: Arguments, former: Arguments) -> Arguments:
    """The part of ``call`` that the utterance says; what is new since the ``former`` call may be in other words."""
    found: Arguments = {}
    for name, value in call.items():
        if name == "facilities":
            new = set(value) - set(former.get("facilities", ()))
            if here := [word for word in value if word in text or (word in new and _alike(word, text))]:
                found[name] = sorted(here, key=lambda word: (text.find(word) < 0, text.find(word)))
        elif name == "type":
            if value in text or (value != former.get(name) and value[:2] in text):
                found[name] = value
        elif re.search(rf"(?<![\d.]){value:g}(?![\d.])", text):
            found[name] = value
    if not RATING_EXACT.search(text) and "评分" not in text:
        found = {name: value for name, value in found.items() if not name.startswith("rating")}
    return found


def _alike(facility: str, text: str) -> bool:
    """Whether another wording or a slip of the pen of ``facility`` may stand in the text."""
    text = text.lower()
    pairs = {facility[at : at + 2] for at in range(len(facility) - 1)} - COMMON_PAIRS
    shared = sum(character in text for character in facility.lower()) / len(facility)
    return any(pair.lower() in text for pair in pairs) or shared >= 2 / 3


def merge(state: Arguments, new: Arguments) -> Arguments:
    """The conditions after ``new`` was said as well: a slot said again is replaced, both bounds of a range at once."""
    said = {slot_of(name) for name in new}
    return {name: value for name, value in state.items() if slot_of(name) not in said} | new


def slot_of(name: str) -> str:
    """The slot that an argument belongs to: both bounds of a range are one."""
    return name.removesuffix("_range_lower").removesuffix("_range_upper")


def wants_another(text: str) -> bool:
    """Whether the guest looks for a hotel afresh, rather than among those offered."""
    return bool(SEEKS.search(text)) and not AMONG_OFFERED.search(text)


def asks_about_one(text: str) -> bool:
    """Whether the guest asks about a hotel already found ("有暖气吗"), and not for a hotel that has something."""
    return bool(QUESTION.search(text)) and not WHICH.search(text) and not wants_another(text)


def informs(text: str, mentioned: Arguments) -> Arguments:
    """What the utterance informs of, out of all that it mentions: for CrossWOZ, a question whether a hotel already
    found has a facility is a Request and not a condition."""
    if set(mentioned) <= {"name", "facilities"} and asks_about_one(text):
        return {name: value for name, value in mentioned.items() if name != "facilities"}
    return mentioned
