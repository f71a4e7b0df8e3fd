"""CrossWOZ's guests as people talk: facilities, types, prices and points in other words, the searches unchanged.

    colloquial("找一家1000元以上的豪华型酒店")        # 找一家一千块钱往上的够豪华的酒店

The words are in ``colloquial.yaml``, frozen before any training on spoken forms; training uses other ones, so that what
is measured is understanding of words that were not seen. Hotels' names stay as they are.
"""

from __future__ import annotations

import random
import re
from functools import cache
from importlib.resources import files
from typing import Any

from weitiao.data.augment_rules import numeral
from weitiao.data.crosswoz_augment import NUMBERS, SPOKEN

SHARE = 0.7  # of the values are said in other words


@cache
def words() -> dict[str, Any]:
    """The phrases of ``colloquial.yaml``."""
    import yaml

    return yaml.safe_load((files("weitiao.evaluate") / "colloquial.yaml").read_text(encoding="utf-8"))


def colloquial(text: str) -> str:
    """``text`` with most facilities, types, prices and ratings in other words, the same ones for the same text."""
    chance = random.Random(f"colloquial {text}")
    return SPOKEN.sub(lambda match: _said(match, chance) if chance.random() < SHARE else match.group(), text)


def _said(match: re.Match[str], chance: random.Random) -> str:
    kind, text, phrases = match.lastgroup, match.group(), words()
    if kind == "facility":
        return chance.choice(phrases["facilities"][text])
    if kind == "type":
        return chance.choice(phrases["types"][text])
    numbers = [_numeral(number) for number in NUMBERS.findall(text)]
    if kind == "rating":
        name = "points" if text.endswith("以上") else "exactly"
    else:
        name = "range" if kind == "range" else "lower" if text.endswith("以上") else "upper"
    return chance.choice(phrases[name]).format(points=numbers[0], low=numbers[0], high=numbers[-1])


def _numeral(number: str) -> str:
    """4.5 -> 四点五; numbers from ten thousand on stay as they are."""
    return "点".join(numeral(int(part)) or part for part in number.split("."))
