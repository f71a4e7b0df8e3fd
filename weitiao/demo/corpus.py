"""What the embedded base ``weitiao-tiny-zh`` reads: text that is written here, from a seed, and nothing else.

    for row in rows(seed=0): print(row.text)            # read first, whole
    for chat in talks(seed=0): print(chat.messages)     # then; the assistant's turns are learnt
    for chat in searches(seed=0): print(chat.messages)  # at last, with records in between

Hotel talk with its meaning noted beside it, records and questions about them, conversations with made-up tools, copying
and arithmetic drills, simple sentences. It never names ``search_hotels``, holds only hotels of the train part and only
pieces of speech from the ``seen`` pool, so that validation and test stay unseen.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from weitiao.data.crosswoz import SEARCH_HOTELS
from weitiao.data.rows import Call, Chat, Message, Text
from weitiao.demo import dialogues
from weitiao.demo.database import FIELDS, FIRST, SECOND, Hotel, invent, record
from weitiao.demo.dialogues import ARGUMENTS, Guest, phrases, reply
from weitiao.demo.drills import CITIES, DOES, LOOKS, THINGS, WHO, arithmetic, chinese, copying, sentences

COUNT = 12_000
TALKS = 40_000
SEARCHES = 7_000

_BOXES = (("items", "total"), ("list", "n"), ("results", "found"), ("hotels", "number"))
_FIELDS = tuple(FIELDS)
_END = "<|im_end|>\n"
_FIGURES = "零一二两三四五六七八九十百千"
_TAKEN = "不没无消去掉随便限弃略免可任意管罢都行"  # characters by which something is taken back
_SYSTEMS = "你是助手。 你帮客人订房。 你是客服。 你负责查询。 你是前台。 请回答客人。 你是一个有用的助手。".split()


def rows(seed: int = 0, count: int = COUNT) -> Iterator[Text]:
    """``count`` texts drawn from ``seed``."""
    makers = [maker for maker, weight in _MIX.items() for _ in range(weight)]
    for number in range(count):
        random_ = random.Random(f"corpus {seed} {number}")
        text = ""
        while not text or _kept_back().search(text):
            text = random_.choice(makers)(random_)
        yield Text(text, id=f"corpus-{number}")


@cache
def _kept_back() -> re.Pattern[str]:
    """What only validation and test may say: of every held piece its longest part between the holes."""

    def held(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from node.get("held", ())
            for child in node.values():
                yield from held(child)

    parts = {max(re.split(r"\{\w+\}", piece), key=len) for piece in held(phrases())} - {"，"}
    return re.compile("|".join(map(re.escape, sorted(parts))))


def _hotel(random_: random.Random) -> Hotel:
    return invent(random_, tuple(phrases()["facilities"]), "train")


class _Mumbling(Guest):
    """A guest who also says what means nothing: stray characters around the pieces. Whoever reads this learns to look
    for the words that carry the meaning, wherever they stand, and not for the sentences around them."""

    def pick(self, *path: str) -> str:
        piece = super().pick(*path)
        if self.random.random() < 0.4:
            piece = self._stray() + piece
        if self.random.random() < 0.3:
            piece += self._stray()
        if "{" in piece and self.random.random() < 0.3:
            place = piece.index("{")
            piece = piece[:place] + self._stray() + piece[place:]
        if path[0] in ("ask", "by_name") and self.random.random() < 0.2:
            place = piece.index("}") + 1
            piece = piece[:place] + self._stray().rstrip("，") + piece[place:]
        return piece

    def facilities(self, hotel: Hotel | None, besides: Sequence[str] = ()) -> tuple[str, dialogues.State]:
        """Now and then one of them is said again in other words."""
        clause, values = super().facilities(hotel, besides)
        if self.random.random() < 0.15:
            again = self.pick("facilities", self.random.choice(values["facilities"]))
            clause += self.random.choice(("，", "")) + again
        return clause, values

    def _stray(self) -> str:
        if self.random.random() < 0.5:
            stray = _chatter(self.random, (1, 1, 2, 3))
        else:
            characters = self.random.choice(_unmeant())
            stray = "".join(self.random.choices(characters, k=self.random.choice((1, 1, 2, 2, 3, 4))))
        return stray + ("，" if self.random.random() < 0.15 else "")


def _guest(random_: random.Random) -> Guest:
    return (_Mumbling if random_.random() < 0.5 else Guest)(random_, "seen")


def _talk(random_: random.Random, turns: int, guest: Guest) -> Iterator[tuple[dialogues.Request, Hotel]]:
    """A guest's requests one after another, each with the hotel it names, or with any, which is not named again: what
    is asked about a hotel that was shown needs no other call."""
    hotels = [_hotel(random_) for _ in range(turns + 2)]
    request = dialogues.opening(guest, hotels)
    for turn in range(turns):
        if turn:
            request = dialogues.following(guest, hotels, request.state, hotels[:3])
        named = [hotel for hotel in hotels if request.state.get("name") in (hotel.name, hotel.short)]
        hotel = random_.choice(named or hotels)
        hotels.remove(hotel)
        yield request, hotel


def _notation(random_: random.Random) -> tuple[str, Callable[[dialogues.State], str]]:
    """One of several ways to note what a guest wants: the line that declares its names, and what writes it."""
    _, keys = _names(random_)
    style = random_.randrange(3)

    def note(state: dialogues.State) -> str:
        noted = {keys[name]: value for name, value in state.items()}
        if style == 0:
            return json.dumps(noted, ensure_ascii=False)
        between, equals = ("；", "=") if style == 1 else ("，", "是")
        return between.join(key + equals + _plain(value) for key, value in noted.items())

    return f"记录({', '.join(keys.values())})", note


def _meanings(random_: random.Random) -> str:
    """Single clauses and what each of them sets."""
    guest, (declared, note) = _guest(random_), _notation(random_)
    lines = [declared]
    for _ in range(random_.randint(5, 9)):
        kind = random_.choice(("name", "type", "facilities", "facilities", "price", "price", "rating"))
        if kind == "name":
            request = dialogues.by_name(guest, _hotel(random_))
            clause, values = request.said, request.state
        else:
            clause, values = getattr(guest, kind)(None)
        lines.append(f"{clause}：{note(dialogues.ordered(values))}")
    return "\n".join(lines)


def _notes(random_: random.Random) -> str:
    """What guests say, with all that holds noted after each turn."""
    declared, note = _notation(random_)
    lines = [declared]
    for _ in range(random_.choice((1, 1, 2))):
        lines += [
            f"客人：{_said(random_, request.said)}\n要求：{note(request.state)}"
            for request, _ in _talk(random_, random_.randint(1, 4), _guest(random_))
        ]
    return "\n".join(lines)


def _tool_talk(random_: random.Random) -> str:
    """A conversation in the chat format with a hotel function nobody else has: its names come from the system turn."""
    function, keys = _names(random_)
    text = _turn("system", f"{random_.choice(_SYSTEMS)}\n工具：{function}({', '.join(keys.values())})")
    box, total = random_.choice(_BOXES)
    for request, hotel in _talk(random_, random_.choice((1, 1, 2, 2, 3)), _guest(random_)):
        text += _turn("user", request.said)
        text += _turn("assistant", _call(function, {keys[name]: value for name, value in request.state.items()}))
        found, fields = [hotel, _hotel(random_)][: random_.choice((0, 1, 1, 2))], _some_fields(random_)
        shown = [record(one, fields) for one in found]
        text += _turn("tool", json.dumps({total: len(found), box: shown}, ensure_ascii=False))
        asked = request.about if found and request.about in fields else None
        text += _turn("assistant", _answer(random_, hotel, asked) if asked else _other_style(random_, shown))
        if found and random_.random() < 0.6:
            text += _asked(random_, found, fields)
    return text.removesuffix(_END)  # the tokenizer's end of text is the same token


def talks(seed: int = 0, count: int = TALKS) -> Iterator[Chat]:
    """``count`` conversations drawn from ``seed``, of which the assistant's turns are to be learnt: what a call looks
    like, when there is one, and where its arguments come from, with functions that nobody else has."""
    for number in range(count):
        yield _drawn(random.Random(f"talk {seed} {number}"), f"talk-{number}", answered=0.35, whole=0.6)


def searches(seed: int = 0, count: int = SEARCHES) -> Iterator[Chat]:
    """``count`` conversations more, in which every call brings records, mostly whole ones: what holds has to be found
    behind hundreds of tokens of other names and numbers."""
    for number in range(count):
        yield _drawn(random.Random(f"search {seed} {number}"), f"search-{number}", answered=1.0, whole=0.9)


def _drawn(random_: random.Random, name: str, answered: float, whole: float) -> Chat:
    """A conversation without anything that only validation and test may say."""
    chat = None
    while chat is None or any(_kept_back().search(message.content) for message in chat.messages):
        chat = _talked(random_, name, answered, whole)
    return chat


def _talked(random_: random.Random, name: str, answered_share: float, whole_share: float) -> Chat:
    """One conversation. What the assistant says follows from what stands before, so that it can be learnt."""
    function, keys = _names(random_)
    box, total = random_.choice(_BOXES)
    messages = [Message("system", random_.choice(_SYSTEMS))]
    answered = (
        random_.random() < answered_share
    )  # without results and answers, one request follows the other's call at once
    turns = random_.choice((1, 2, 2, 3, 3, 4) if answered else (3, 4, 5, 6))
    for request, hotel in _talk(random_, turns, _guest(random_)):
        if random_.random() < 0.12:  # talk that asks for nothing calls nothing
            messages += [Message("user", _aside(random_) + "。"), Message("assistant", "您请说。")]
        messages.append(Message("user", _said(random_, request.said)))
        arguments = {keys[argument]: value for argument, value in request.state.items()}
        messages.append(Message("assistant", calls=(Call(function, arguments),)))
        if not answered:
            continue
        found = [hotel, _hotel(random_)][: random_.choice((0, 1, 1, 2))]
        fields = list(_FIELDS) if random_.random() < whole_share else _some_fields(random_)
        shown = [record(one, fields) for one in found]
        messages.append(Message("tool", json.dumps({total: len(found), box: shown}, ensure_ascii=False), name=function))
        asked = request.about if found and request.about in fields else None
        told = _plain(getattr(hotel, asked)) if asked else "；".join(one[FIELDS["name"]] for one in shown) or "没有找到"
        messages.append(Message("assistant", told + "。"))
        if found and random_.random() < 0.4:
            asks, one, about, ref = _reference(random_, found, fields)
            messages.append(Message("user", _said(random_, asks.pick("ask", about).format(ref=ref))))
            messages.append(Message("assistant", _plain(getattr(one, about)) + "。" if about in fields else "没有写。"))
    if random_.random() < 0.4:
        messages += [Message("user", _guest(random_).pick("bye")), Message("assistant", "再见。")]
    return Chat(tuple(messages), (_schema(function, keys),), id=name, group=name)


def _said(random_: random.Random, said: str) -> str:
    """A request with, now and then, something before it or behind it that has nothing to do with it."""
    if random_.random() < 0.4:
        said = _aside(random_) + "，" + said
    return said + _aside(random_) + random_.choice("。，！？") if random_.random() < 0.25 else said


def _aside(random_: random.Random) -> str:
    (who, _), (does, _) = random_.choice(WHO), random_.choice(DOES)
    city, thing, looks = random_.choice(CITIES), random_.choice(THINGS), random_.choice(LOOKS)
    drill = random_.choice((f"{who}{does}", f"我们从{city}来", f"{thing}{looks}", f"{who}说{thing}{looks}", "嗯"))
    chatter = _chatter(random_, (2, 3, 4, 5))
    return random_.choice((drill, chatter, chatter, Guest(random_, "seen").pick("aside")))


def _chatter(random_: random.Random, lengths: Sequence[int]) -> str:
    """Common words that make no sense together."""
    words = phrases()["words"].split()
    return "".join(random_.choices(words, k=random_.choice(lengths)))


def _names(random_: random.Random) -> tuple[str, dict[str, str]]:
    """A function's name and its parameters', put together anew each time, so that they have to be read off."""
    if random_.random() < 0.6:
        function, words = f"{random_.choice(_VERBS)}_{random_.choice(_NOUNS)}", _ENGLISH
    else:
        function, words = (
            random_.choice("查找搜寻选问") + random_.choice(("酒店", "宾馆", "住处", "房间", "旅店")),
            _CHINESE,
        )
    keys = {name: random_.choice(words[name]) for name in ("name", "type", "facilities")}
    lower, upper = random_.choice(words["bounds"])
    for slot in ("price", "rating"):
        base = random_.choice(words[slot])
        keys |= {f"{slot}_range_lower": lower.format(base), f"{slot}_range_upper": upper.format(base)}
    return function, keys


# No "search": a model that has met it, and hotels, but never the two together, holds that they do not belong together.
_VERBS = "find get query list lookup fetch filter select request check browse show pick scan seek match load".split()
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


def _schema(function: str, keys: Mapping[str, str]) -> dict[str, Any]:
    """The JSON schema of an invented hotel function: that of ``search_hotels`` under other names."""
    known = SEARCH_HOTELS["function"]["parameters"]["properties"]
    properties = {keys[name]: {"type": known[name]["type"]} for name in ARGUMENTS}
    properties[keys["facilities"]]["items"] = {"type": "string"}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": function, "parameters": parameters}}


def _some_fields(random_: random.Random) -> list[str]:
    """The name and some other fields, in the record's order: whole records, mostly digits to copy, are rare."""
    count = 7 if random_.random() < 0.06 else random_.choice((1, 1, 2, 2, 3))
    chosen = {"name", *random_.sample(_FIELDS[1:], count)}
    return [field for field in _FIELDS if field in chosen]


def _other_style(random_: random.Random, shown: list[dict[str, Any]]) -> str:
    if not shown:
        return random_.choice(("没有找到。", "没有这样的酒店。", "查不到，换个要求吧。"))
    field = random_.choice(list(shown[0]))
    return "；".join(_told(one, field) for one in shown) + "。"


def _told(one: dict[str, Any], field: str) -> str:
    name = one[FIELDS["name"]]
    return name if field == FIELDS["name"] else f"{name}，{_plain(one[field])}"


def _plain(value: Any) -> str:
    return "、".join(value) if isinstance(value, (list, tuple)) else f"{value}"


def _asked(random_: random.Random, found: Sequence[Hotel], fields: Sequence[str]) -> str:
    guest, hotel, about, ref = _reference(random_, found, fields)
    said = "没有写。" if about not in fields else _answer(random_, hotel, about)
    return _turn("user", guest.pick("ask", about).format(ref=ref)) + _turn("assistant", said)


def _reference(random_: random.Random, found: Sequence[Hotel], fields: Sequence[str]) -> tuple[Guest, Hotel, str, str]:
    """A guest who asks, the hotel among those found, the field that is asked for, and how the guest refers to it."""
    guest, index = _guest(random_), random_.randrange(len(found))
    hotel, about = found[index], random_.choice([field for field in fields if field in phrases()["ask"]] or ["price"])
    which = "only" if len(found) == 1 else ("first", "second")[index]
    ref = guest.pick("refs", which) if random_.random() < 0.6 else random_.choice((hotel.name, hotel.short))
    return guest, hotel, about, ref


def _answer(random_: random.Random, hotel: Hotel, about: str) -> str:
    return _plain(getattr(hotel, about)) if random_.random() < 0.7 else reply(hotel, about)


def _records(random_: random.Random) -> str:
    """Database records, as JSON or prose, and questions about them."""
    guest, fields = Guest(random_, "seen"), _some_fields(random_)
    hotels = [_hotel(random_) for _ in range(random_.randint(1, 3))]
    if random_.random() < 0.5:
        lines = [json.dumps(record(hotel, fields), ensure_ascii=False) for hotel in hotels]
    else:
        words = {
            "type": "是",
            "facilities": "有",
            "price": "每晚",
            "rating": "评分",
            "address": "在",
            "phone": "电话",
            "metro": "靠近",
        }
        lines = [
            hotel.name + "，".join(words[f] + _plain(getattr(hotel, f)) for f in fields[1:]) + "。" for hotel in hotels
        ]
    for hotel in random_.sample(hotels, len(hotels)):
        about = random_.choice([field for field in fields if field in phrases()["ask"]] or ["type"])
        if about != "type":
            question = guest.pick("ask", about).format(ref=random_.choice((hotel.name, hotel.short)))
            lines.append(f"问：{question}\n答：{_answer(random_, hotel, about)}")
    return "\n".join(lines)


def _tools(random_: random.Random) -> str:
    """Other functions than hotels': weather, sums, tables, tickets."""
    city, day = random_.choice(CITIES), random_.choice(("今天", "明天", "后天", "周末"))
    a, b = random_.randint(1, 999), random_.randint(1, 999)
    people, hour = random_.randint(1, 9), random_.randint(6, 22)
    asked, function, arguments, result, said = random_.choice(
        (
            (
                f"{day}{city}天气怎么样？",
                "get_weather(city, day)",
                {"city": city, "day": day},
                {"weather": "晴", "high": b % 35},
                f"{city}{day}晴，最高{b % 35}度。",
            ),
            (f"算一下{a}加{b}。", "add(x, y)", {"x": a, "y": b}, {"value": a + b}, f"等于{a + b}。"),
            (
                f"订{day}{hour}点{people}个人的桌子。",
                "book_table(day, hour, people)",
                {"day": day, "hour": hour, "people": people},
                {"ok": True},
                "订好了。",
            ),
            (
                f"查{a}年{city}的新闻。",
                "search_news(city, year)",
                {"city": city, "year": a},
                {"found": b},
                f"有{b}条。",
            ),
            (
                f"买{day}去{city}的票，{people}张。",
                "buy_ticket(to, day, count)",
                {"to": city, "day": day, "count": people},
                {"ok": False},
                "没有票了。",
            ),
        )
    )
    text = _turn("system", f"{random_.choice(_SYSTEMS)}\n工具：{function}") + _turn("user", asked)
    text += _turn("assistant", _call(function.split("(")[0], arguments))
    text += _turn("tool", json.dumps(result, ensure_ascii=False)) + _turn("assistant", said)
    return text.removesuffix(_END)


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}{_END}"


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}</tool_call>"


@cache
def _unmeant() -> tuple[str, str]:
    """Characters that mean nothing by themselves: all common ones, and those that stand in what guests say of
    facilities and around their requests. Those that say how a number is meant, or that take something back, and those
    of hotels' names are left out."""

    def characters(keys: Sequence[str]) -> str:
        return json.dumps([phrases()[key] for key in keys], ensure_ascii=False)

    telling = [key for key in phrases() if key.startswith(("price", "rating", "type", "slots"))]
    said = characters(["facilities", "open", "close", "by_name", "ask", "aside"])
    telling += ["types", "refs", "two_facilities", "join", "change"]
    left_out = characters(telling) + FIRST + SECOND + _FIGURES + _TAKEN
    common = "".join(character for character in chinese() if character not in left_out)
    return common, "".join(character for character in common if character in said)


_MIX: dict[Callable[[random.Random], str], int] = {
    _meanings: 5,
    _notes: 6,
    _tool_talk: 8,
    _records: 2,
    _tools: 1,
    copying: 2,
    arithmetic: 1,
    sentences: 1,
}
