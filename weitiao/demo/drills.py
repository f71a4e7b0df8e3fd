"""Drills that have nothing to do with hotels: copying, arithmetic, simple sentences.

copying(random.Random(0))        # one text
"""

from __future__ import annotations

import json
import random
from functools import cache

from weitiao.demo.dialogues import AROUND


def copying(random_: random.Random) -> str:
    """Copy strings of any characters, and numbers, whole or by the name that stands before them."""
    words = [_word(random_) for _ in range(random_.randint(2, 6))]
    style = random_.randrange(4)
    if style == 0:
        return "\n".join(f"抄写：{word}\n{word}" for word in words)
    if style == 1:
        return "\n".join(["，".join(words)] * random_.randint(2, 3))
    table = dict(zip(random_.sample("甲乙丙丁戊己", len(words)), words, strict=True))
    said = "；".join(f"{name}是{word}" for name, word in table.items())
    shown = json.dumps(table, ensure_ascii=False) if style == 2 else said
    asked = [f"{name}是什么？{table[name]}" for name in random_.sample(list(table), len(table))]
    return "\n".join([shown, *asked])


def _word(random_: random.Random) -> str:
    if random_.random() < 0.6:
        return "".join(random_.choices(characters(), k=random_.randint(2, 8)))
    tens, tenths = 10 * random_.randint(1, 300), random_.randint(10, 99) / 10
    return str(random_.choice((tens, tens, tenths, random_.randint(1, 2999))))


def arithmetic(random_: random.Random) -> str:
    """Sums and differences, near a price as well, numbers in Chinese, and counting, by which the tokenizer meets every
    price there can be and makes one token of it: what is copied in two halves is copied wrong more often."""
    lines = []
    for _ in range(random_.randint(2, 6)):
        a, b = random_.randint(0, 2000), random_.choice((random_.randint(0, 999), 100, 50))
        style = random_.randrange(5)
        if style == 0:
            lines.append(f"{a}+{b}={a + b}")
        elif style == 1:
            lines.append(f"{a + b}-{b}={a}")
        elif style == 2:
            middle = random_.randint(4, 54) * 50
            lines.append(f"{middle}左右：{middle - AROUND}到{middle + AROUND}")
        elif style == 3:
            first, step = random_.randint(1, 280), random_.choice((1, 1, 1, 5, 10))
            lines.append("，".join(str(10 * number) for number in range(first, 301, step)[:20]))
        else:
            hundred = random_.randint(1, 10)
            lines.append(f"{'一千' if hundred == 10 else '一两三四五六七八九'[hundred - 1] + '百'}={hundred * 100}")
    return "\n".join(lines)


CITIES = ("北京", "上海", "广州", "成都", "杭州", "西安", "武汉", "南京", "厦门", "昆明")
WHO = (
    ("小明", "Tom"),
    ("老师", "The teacher"),
    ("妈妈", "Mother"),
    ("我朋友", "My friend"),
    ("医生", "The doctor"),
    ("司机", "The driver"),
)
DOES = (
    ("喜欢喝茶", "likes tea"),
    ("在看书", "is reading a book"),
    ("每天跑步", "runs every day"),
    ("去过那座城市", "has been to that city"),
    ("想买一张票", "wants to buy a ticket"),
    ("住在河边", "lives by the river"),
    ("会做饭", "can cook"),
    ("昨天很忙", "was busy yesterday"),
)
THINGS = "红色的苹果 旧椅子 新鲜的鱼 窗边的花 桌上的信 远处的山 门口的猫 安静的房间 长长的路 热闹的市场".split()
LOOKS = "很好看 不太贵 让人高兴 已经没有了 还在那里 是昨天的 比以前大 值得一看 谁都知道 有点旧".split()


def sentences(random_: random.Random) -> str:
    """Simple sentences in Chinese and English, some of them translated."""
    lines = []
    for _ in range(random_.randint(2, 5)):
        (who, who_en), (does, does_en) = random_.choice(WHO), random_.choice(DOES)
        thing, looks, city = random_.choice(THINGS), random_.choice(LOOKS), random_.choice(CITIES)
        lines.append(
            random_.choice(
                (
                    f"{who}{does}。",
                    f"{who_en} {does_en}.",
                    f"{who}{does}。{who_en} {does_en}.",
                    f"{thing}{looks}。",
                    f"{who}说{thing}{looks}。",
                    f"我们从{city}出发，{who}{does}。",
                )
            )
        )
    return "\n".join(lines)


@cache
def chinese() -> str:
    """The 3,755 most common Chinese characters (GB/T 2312, level 1)."""
    level_one = bytes(byte for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF) for byte in (high, low))
    return level_one.decode("gb2312", errors="ignore")


@cache
def characters() -> str:
    """Chinese characters, figures and letters."""
    return chinese() + "0123456789" * 20 + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" * 3
