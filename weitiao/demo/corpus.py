"""What the embedded base ``weitiao-tiny-zh`` reads first: text that is written here, from a seed, and nothing else.

    for row in rows(seed=0): print(row.text)

Hotel talk with its meaning noted beside it, records and questions about them, conversations with made-up tools, copying
and arithmetic drills, simple sentences. Here and in ``talks`` stand only hotels of the train part and only pieces of
speech from the ``seen`` pool, so that validation and test stay unseen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from weitiao.data.rows import Call, Text
from weitiao.demo import dialogues
from weitiao.demo.database import record
from weitiao.demo.dialogues import Guest, phrases
from weitiao.demo.drills import CITIES, arithmetic, copying, sentences
from weitiao.demo.noise import guest, kept_back, said
from weitiao.demo.talks import SYSTEMS, Voice, any_hotel, conversation, names, plain, requests, some_fields

COUNT = 10_000

_END = "<|im_end|>\n"


def rows(seed: int = 0, count: int = COUNT) -> Iterator[Text]:
    """``count`` texts drawn from ``seed``."""
    makers = [maker for maker, weight in _MIX.items() for _ in range(weight)]
    for number in range(count):
        random_ = random.Random(f"corpus {seed} {number}")
        text = ""
        while not text or kept_back().search(text):
            text = random_.choice(makers)(random_)
        yield Text(text, id=f"corpus-{number}")


def _notation(random_: random.Random) -> tuple[str, Callable[[dialogues.State], str]]:
    """One of several ways to note what a guest wants: the line that declares its names, and what writes it."""
    _, keys = names(random_)
    style = random_.randrange(3)

    def note(state: dialogues.State) -> str:
        noted = {keys[name]: value for name, value in state.items()}
        if style == 0:
            return json.dumps(noted, ensure_ascii=False)
        between, equals = ("；", "=") if style == 1 else ("，", "是")
        return between.join(key + equals + plain(value) for key, value in noted.items())

    return f"记录({', '.join(keys.values())})", note


def _meanings(random_: random.Random) -> str:
    """Single clauses and what each of them sets."""
    speaker, (declared, note) = guest(random_), _notation(random_)
    lines = [declared]
    for _ in range(random_.randint(5, 9)):
        kind = random_.choice(("name", "type", "facilities", "facilities", "price", "price", "rating"))
        if kind == "name":
            request = dialogues.by_name(speaker, any_hotel(random_))
            clause, values = request.said, request.state
        else:
            clause, values = getattr(speaker, kind)(None)
        lines.append(f"{clause}：{note(dialogues.ordered(values))}")
    return "\n".join(lines)


def _notes(random_: random.Random) -> str:
    """What guests say, with all that holds noted after each turn."""
    declared, note = _notation(random_)
    lines = [declared]
    for _ in range(random_.choice((1, 1, 2))):
        lines += [
            f"客人：{said(random_, request.said)}\n要求：{note(request.state)}"
            for request, _ in requests(random_, random_.randint(1, 4), guest(random_))
        ]
    return "\n".join(lines)


def _tool_talk(random_: random.Random) -> str:
    """A conversation in the chat format with a hotel function nobody else has: its names come from the system turn."""
    chat = conversation(random_, "", answered_share=1.0, whole_share=0.06)
    system, function = chat.messages[0].content, chat.tools[0]["function"]
    text = _turn("system", f"{system}\n工具：{function['name']}({', '.join(function['parameters']['properties'])})")
    for message in chat.messages[1:]:
        text += _turn(message.role, message.content + "".join(map(_call, message.calls)))
    return text.removesuffix(_END)  # the tokenizer's end of text is the same token


def _records(random_: random.Random) -> str:
    """Database records, as JSON or prose, and questions about them."""
    asks, fields, voice = Guest(random_, "seen"), some_fields(random_), Voice(random_)
    hotels = [any_hotel(random_) for _ in range(random_.randint(1, 3))]
    if random_.random() < 0.5:
        lines = [json.dumps(record(hotel, fields), ensure_ascii=False) for hotel in hotels]
    else:
        lines = [f"{hotel.name}：{'，'.join(voice.facts(hotel, fields[1:]))}。" for hotel in hotels]
    for hotel in random_.sample(hotels, len(hotels)):
        about = random_.choice([field for field in fields if field in phrases()["ask"]] or ["type"])
        if about != "type":
            question = asks.pick("ask", about).format(ref=random_.choice((hotel.name, hotel.short)))
            lines.append(f"问：{question}\n答：{voice.tell(hotel, about)}")
    return "\n".join(lines)


def _tools(random_: random.Random) -> str:
    """Other functions than hotels': weather, sums, tables, tickets."""
    city, day = random_.choice(CITIES), random_.choice(("今天", "明天", "后天", "周末"))
    a, b = random_.randint(1, 999), random_.randint(1, 999)
    people, hour = random_.randint(1, 9), random_.randint(6, 22)
    asked, function, arguments, result, told = random_.choice(
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
    text = _turn("system", f"{random_.choice(SYSTEMS)}\n工具：{function}") + _turn("user", asked)
    text += _turn("assistant", _call(Call(function.split("(")[0], arguments)))
    text += _turn("tool", json.dumps(result, ensure_ascii=False)) + _turn("assistant", told)
    return text.removesuffix(_END)


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}{_END}"


def _call(call: Call) -> str:
    noted: dict[str, Any] = {"name": call.name, "arguments": call.arguments}
    return f"<tool_call>{json.dumps(noted, ensure_ascii=False)}</tool_call>"


_MIX: dict[Callable[[random.Random], str], int] = {
    _meanings: 5,
    _notes: 6,
    _tool_talk: 8,
    _records: 2,
    _tools: 1,
    copying: 2,
    arithmetic: 2,
    sentences: 1,
}
