"""Guests as the embedded base meets them: they say more than they mean, from the ``seen`` pieces alone.

guest(random_).pick("ask", "phone")     # half of them mumble: stray characters and words around the pieces
said(random_, "要能停车")                # now and then something before or behind it that asks for nothing
kept_back().search(text)                # None, or what only validation and test may say
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from weitiao.demo import dialogues
from weitiao.demo.database import FIRST, SECOND, Hotel
from weitiao.demo.dialogues import Guest, phrases
from weitiao.demo.drills import CITIES, DOES, LOOKS, THINGS, WHO, chinese

_FIGURES = "零一二两三四五六七八九十百千"
_TAKEN = "不没无消去掉随便限弃略免可任意管罢都行"  # characters by which something is taken back


@cache
def kept_back() -> re.Pattern[str]:
    """What only validation and test may say: of every held piece its longest part between the holes."""

    def held(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from node.get("held", ())
            for child in node.values():
                yield from held(child)

    parts = {max(re.split(r"\{\w+\}", piece), key=len) for piece in held(phrases())} - {"，"}
    return re.compile("|".join(map(re.escape, sorted(parts))))


def guest(random_: random.Random) -> Guest:
    """A guest; every other one mumbles."""
    return (_Mumbling if random_.random() < 0.5 else Guest)(random_, "seen")


class _Mumbling(Guest):
    """A guest who also says what means nothing: stray characters around the pieces. Whoever reads this learns to look
    for the words that carry the meaning, wherever they stand, and not for the sentences around them."""

    def pick(self, *path: str) -> str:
        piece = super().pick(*path)
        if path[0] in ("facilities", "type_clause") and self.random.random() < 0.25:  # what carries the meaning, alone
            pieces = [piece, *(Guest.pick(self, *path) for _ in range(5))]
            return self._stray() + min(pieces, key=len) + self._stray()
        if self.random.random() < 0.4:
            piece = self._stray() + piece
        if self.random.random() < 0.3:
            piece += self._stray()
        if "{" in piece and self.random.random() < (0.6 if path[0] in ("ask", "by_name") else 0.3):
            place = piece.index("{")
            piece = piece[:place] + self._stray() + piece[place:]
        if path[0] in ("ask", "by_name") and self.random.random() < 0.4:
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


def said(random_: random.Random, said: str) -> str:
    """A request with, now and then, something before it or behind it that has nothing to do with it."""
    if random_.random() < 0.4:
        said = aside(random_) + "，" + said
    return said + aside(random_) + random_.choice("。，！？") if random_.random() < 0.25 else said


def aside(random_: random.Random) -> str:
    """What has nothing to do with hotels: somebody who does something, common words without a sense, or small talk."""
    (who, _), (does, _) = random_.choice(WHO), random_.choice(DOES)
    city, thing, looks = random_.choice(CITIES), random_.choice(THINGS), random_.choice(LOOKS)
    drill = random_.choice((f"{who}{does}", f"我们从{city}来", f"{thing}{looks}", f"{who}说{thing}{looks}", "嗯"))
    chatter = _chatter(random_, (2, 3, 4, 5))
    return random_.choice((drill, chatter, chatter, Guest(random_, "seen").pick("aside")))


def _chatter(random_: random.Random, lengths: Sequence[int]) -> str:
    """Common words that make no sense together."""
    words = phrases()["words"].split()
    return "".join(random_.choices(words, k=random_.choice(lengths)))


@cache
def _unmeant() -> tuple[str, str]:
    """Characters that mean nothing by themselves: all common ones, and those that stand in what guests say of
    facilities and around their requests. Those that say how a number is meant, or that take something back, and those
    of hotels' names are left out."""

    def characters(keys: Sequence[str]) -> str:
        return json.dumps([phrases()[key] for key in keys], ensure_ascii=False)

    telling = [key for key in phrases() if key.startswith(("price", "rating", "type", "slots"))]
    said = characters(["facilities", "open", "close", "by_name", "ask", "aside"])
    telling += ["types", "shared", "refs", "two_facilities", "join", "change"]
    left_out = characters(telling) + FIRST + SECOND + _FIGURES + _TAKEN
    common = "".join(character for character in chinese() if character not in left_out)
    return common, "".join(character for character in common if character in said)
