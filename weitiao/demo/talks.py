"""Conversations for the embedded base: guests, and assistants with hotel functions that nobody else has.

    for chat in talks(seed=0): print(chat.messages)     # many requests, some with records in between
    for chat in searches(seed=0): print(chat.messages)  # every call brings records

The assistant's turns are learnt: what a call looks like, when there is one, and where its arguments come from. So a
function's names are put together anew each time, and every assistant has words of its own for what it found.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weitiao.data.crosswoz import SEARCH_HOTELS
from weitiao.data.rows import Call, Chat, Message
from weitiao.demo import dialogues
from weitiao.demo.database import FIELDS, Hotel, invent, record
from weitiao.demo.dialogues import ARGUMENTS, Guest, phrases
from weitiao.demo.noise import aside, guest, kept_back, said

TALKS = 30_000
SEARCHES = 14_000
BOXES = (("items", "total"), ("list", "n"), ("results", "found"), ("hotels", "number"))
SYSTEMS = "你是助手。 你帮客人订房。 你是客服。 你负责查询。 你是前台。 请回答客人。 你是一个有用的助手。".split()

_FIELDS = tuple(FIELDS)


def talks(seed: int = 0, count: int = TALKS) -> Iterator[Chat]:
    """``count`` conversations drawn from ``seed``; in half of them the calls bring nothing and follow one another."""
    for number in range(count):
        yield _drawn(random.Random(f"talk {seed} {number}"), f"talk-{number}", answered=0.5, whole=0.5)


def searches(seed: int = 0, count: int = SEARCHES) -> Iterator[Chat]:
    """``count`` conversations more, in which every call brings records, mostly whole ones: what holds has to be found
    behind hundreds of tokens of other names and numbers."""
    for number in range(count):
        yield _drawn(random.Random(f"search {seed} {number}"), f"search-{number}", answered=1.0, whole=0.9)


def _drawn(random_: random.Random, name: str, answered: float, whole: float) -> Chat:
    """A conversation without anything that only validation and test may say."""
    chat = None
    while chat is None or any(kept_back().search(message.content) for message in chat.messages):
        chat = conversation(random_, name, answered, whole)
    return chat


def conversation(random_: random.Random, name: str, answered_share: float, whole_share: float) -> Chat:
    """One conversation. What the assistant says follows from what stands before, so that it can be learnt."""
    function, keys = names(random_)
    box, total = random_.choice(BOXES)
    voice, messages = Voice(random_), [Message("system", random_.choice(SYSTEMS))]
    answered = random_.random() < answered_share
    turns = random_.choice((1, 2, 2, 3, 3) if answered else (3, 4, 5, 6))
    for request, hotel in requests(random_, turns, guest(random_)):
        if random_.random() < 0.12:  # talk that asks for nothing calls nothing
            messages += [Message("user", aside(random_) + "。"), Message("assistant", "您请说。")]
        messages.append(Message("user", said(random_, request.said)))
        arguments = {keys[argument]: value for argument, value in request.state.items()}
        messages.append(Message("assistant", calls=(Call(function, arguments),)))
        if not answered:
            continue
        found = [hotel, any_hotel(random_)][: random_.choice((0, 1, 1, 2, 2))]
        fields = list(_FIELDS) if random_.random() < whole_share else some_fields(random_)
        shown = [record(one, fields) for one in found]
        count = len(found) if len(found) < 2 else random_.choice((2, random_.randint(3, 9), random_.randint(10, 400)))
        messages.append(Message("tool", json.dumps({total: count, box: shown}, ensure_ascii=False), name=function))
        asked = request.about if found and request.about in fields else None
        messages.append(Message("assistant", voice.tell(hotel, asked) if asked else voice.show(found, fields, count)))
        while found and random_.random() < 0.45:
            asks, one, about, ref = reference(random_, found, fields)
            messages.append(Message("user", said(random_, asks.pick("ask", about).format(ref=ref))))
            messages.append(Message("assistant", voice.tell(one, about) if about in fields else "没有写。"))
    if random_.random() < 0.4:
        messages += [Message("user", guest(random_).pick("bye")), Message("assistant", "再见。")]
    return Chat(tuple(messages), (_schema(function, keys),), id=name, group=name)


def requests(random_: random.Random, turns: int, speaker: Guest) -> Iterator[tuple[dialogues.Request, Hotel]]:
    """A guest's requests one after another, each with the hotel it names, or with any, which is not named again: what
    is asked about a hotel that was shown needs no other call."""
    hotels = [any_hotel(random_) for _ in range(turns + 2)]
    request = dialogues.opening(speaker, hotels)
    for turn in range(turns):
        if turn:
            request = dialogues.following(speaker, hotels, request.state, hotels[:3])
        named = [hotel for hotel in hotels if request.state.get("name") in (hotel.name, hotel.short)]
        hotel = random_.choice(named or hotels)
        hotels.remove(hotel)
        yield request, hotel


class Voice:
    """How the assistant of one conversation speaks of hotels: what it tells of them, and in which words.

    Whoever has heard many of them takes no number from what an assistant said for what a guest asked for.
    """

    def __init__(self, random_: random.Random):
        pick = random_.choice
        self.fields = random_.sample(_FIELDS[1:], pick((0, 0, 1, 2, 3, 3, 3, 4)))
        if random_.random() < 0.5:
            self.fields = [field for field in _FIELDS if field in self.fields]
        self.words = {field: pick(words) for field, words in _TOLD.items()}
        self.start, self.end, self.none = pick(_START), pick("。。！ "), pick(_NONE)
        self.first, self.second = pick(_NUMBERED)
        self.between, self.comma = pick("；；。，"), pick("，，、 ")
        self.answer = pick(("{name}的{field}是{value}", "{name}：{value}", "{value}", "{value}", "{field}是{value}"))

    def show(self, found: Sequence[Hotel], fields: Sequence[str], count: int) -> str:
        """What a search brought: ``count`` hotels, of which ``found`` came with their ``fields``."""
        if not found:
            return self.none
        fields = [field for field in self.fields if field in fields]
        told = [self.comma.join([one.name, *self.facts(one, fields)]) for one in found]
        if len(told) > 1:
            told = [self.first + told[0], self.second + told[1]]
        return self.start.format(count=count) + self.between.join(told) + self.end.strip()

    def facts(self, hotel: Hotel, fields: Sequence[str]) -> list[str]:
        """What the ``fields`` of a hotel say, one by one."""
        return [self.words[field].format(plain(getattr(hotel, field))) for field in fields]

    def tell(self, hotel: Hotel, about: str) -> str:
        """One field of a hotel."""
        value = plain(getattr(hotel, about))
        return self.answer.format(name=hotel.name, field=FIELDS[about], value=value) + self.end.strip()


_TOLD = {
    "type": ("{}", "属于{}", "是{}", "{}酒店"),
    "facilities": ("有{}", "设施有{}", "{}"),
    "price": ("{}元", "每晚{}元", "{}块", "房价{}", "{}元一晚", "{}"),
    "rating": ("{}分", "评分{}", "得了{}分", "口碑{}", "{}"),
    "address": ("在{}", "地址{}", "位于{}", "{}"),
    "phone": ("电话{}", "可以打{}", "{}"),
    "metro": ("靠近{}", "地铁{}", "{}下车"),
}
_START = (
    *(
        "",
        "",
        "有{count}家：",
        "找到{count}家，",
        "共{count}家，推荐：",
        "查到{count}家：",
        "一共{count}家，先看",
        "合适的有",
    ),
    *("可以看看", "您好，有{count}家：", "推荐", "好的，", "{count}家，有："),
)
_NONE = ("没有找到。", "没有这样的酒店。", "查不到，换个要求吧。", "抱歉，没有。", "一家也没有，要不要放宽？")
_NUMBERED = (("", ""), ("", ""), ("一、", "二、"), ("1. ", "2. "), ("第一家", "第二家"), ("", "还有"), ("一是", "二是"))


def reference(random_: random.Random, found: Sequence[Hotel], fields: Sequence[str]) -> tuple[Guest, Hotel, str, str]:
    """A guest who asks, the hotel among those found, the field that is asked for, and how the guest refers to it."""
    speaker, index = guest(random_), random_.randrange(len(found))
    hotel, about = found[index], random_.choice([field for field in fields if field in phrases()["ask"]] or ["price"])
    which = "only" if len(found) == 1 else ("first", "second")[index]
    ref = speaker.pick("refs", which) if random_.random() < 0.6 else random_.choice((hotel.name, hotel.short))
    return speaker, hotel, about, ref


def some_fields(random_: random.Random) -> list[str]:
    """The name and some other fields, in the record's order: whole records, mostly digits to copy, are rare."""
    count = 7 if random_.random() < 0.06 else random_.choice((1, 1, 2, 2, 3))
    chosen = {"name", *random_.sample(_FIELDS[1:], count)}
    return [field for field in _FIELDS if field in chosen]


def any_hotel(random_: random.Random) -> Hotel:
    """A hotel that neither validation nor test can hold."""
    return invent(random_, tuple(phrases()["facilities"]), "train")


def plain(value: Any) -> str:
    """A field's value as it is spoken."""
    return "、".join(value) if isinstance(value, (list, tuple)) else f"{value}"


def names(random_: random.Random) -> tuple[str, dict[str, str]]:
    """A function's name and its parameters', put together anew each time, so that they have to be read off."""
    if random_.random() < 0.6:
        function, words = f"{random_.choice(_VERBS)}_{random_.choice(_NOUNS)}", _ENGLISH
    else:
        function = random_.choice("查找搜寻选问") + random_.choice(("酒店", "宾馆", "住处", "房间", "旅店"))
        words = _CHINESE
    keys = {name: random_.choice(words[name]) for name in ("name", "type", "facilities")}
    lower, upper = random_.choice(words["bounds"])
    for slot in ("price", "rating"):
        base = random_.choice(words[slot])
        keys |= {f"{slot}_range_lower": lower.format(base), f"{slot}_range_upper": upper.format(base)}
    return function, keys


def _schema(function: str, keys: Mapping[str, str]) -> dict[str, Any]:
    """The JSON schema of an invented hotel function: that of ``search_hotels`` under other names."""
    known = SEARCH_HOTELS["function"]["parameters"]["properties"]
    properties = {keys[name]: {"type": known[name]["type"]} for name in ARGUMENTS}
    properties[keys["facilities"]]["items"] = {"type": "string"}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": function, "parameters": parameters}}


_VERBS = (
    "search find get query list lookup fetch filter select request check browse show pick scan seek match load".split()
)
_NOUNS = "hotel hotels room rooms stay stays inn inns lodging places accommodation motels resorts beds".split()
_ENGLISH: dict[str, Any] = {
    "name": "name hotel hotel_name title brand called".split(),
    "type": "type kind category level grade class".split(),
    "facilities": "facilities services amenities features equipment offers".split(),
    "price": "price cost rate fee price_range cost_range".split(),
    "rating": "rating score stars rating_range score_range points".split(),
    "bounds": [
        *(("min_{}", "max_{}"), ("{}_min", "{}_max"), ("{}_from", "{}_to"), ("{}_low", "{}_high")),
        *(("lowest_{}", "highest_{}"), ("{}_lower", "{}_upper"), ("lower_{}", "upper_{}"), ("{}_above", "{}_below")),
    ],
}
_CHINESE: dict[str, Any] = {
    "name": "名称 酒店名 名字 店名 叫什么".split(),
    "type": "类型 档次 级别 种类 等级".split(),
    "facilities": "设施 服务 配套 设备 要求".split(),
    "price": "价格 房价 价钱 费用 花费".split(),
    "rating": "评分 分数 口碑 星级 得分".split(),
    "bounds": [("最低{}", "最高{}"), ("{}下限", "{}上限"), ("{}从", "{}到"), ("{}不低于", "{}不高于")],
}
