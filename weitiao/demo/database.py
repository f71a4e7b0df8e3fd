"""The invented hotels, and the function the assistant calls on them.

    database = Database.build(seed=0)                    # 1,000 hotels
    search_hotels(database.part("test"), type="豪华型", price_range_upper=800)

Every hotel belongs to one part (train, validation or test), and a name's part depends on the name alone: whatever the
seed, a hotel met in training never stands in a test, nor does one that the embedded base has read about.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

TYPES = ("经济型", "舒适型", "高档型", "豪华型")
PARTS = {"train": 0.8, "validation": 0.1, "test": 0.1}
PRICES = {"经济型": (80, 320), "舒适型": (220, 620), "高档型": (420, 1100), "豪华型": (700, 2600)}

FIRST = (
    "云锦海金银星月山江湖春夏秋东南西北华盛丰瑞祥福康宁泰安和顺兴隆凯君悦雅静清明朗晨曦彩虹翠竹梅兰松柏枫"
    "桐荷莲桂丹青碧玉珠宝龙凤鹤鹿鸿燕雁天宇航远博文思源恒信诚嘉禾景怡馨逸乐欣荣辉耀光曙霞岚溪泉"
)
SECOND = "廷庭轩阁苑台楼城门桥洲岛湾港滩岸塘渚畔里坊居舍园林岭峰谷川原野田都京州府宫殿堂馆亭榭廊院巷街"
_PLACES = (*"国际 假日 商务 花园 皇家 中心 城市 时代 世纪 快捷 精品 温馨 阳光 四季".split(), "")
_KINDS = ("酒店", "酒店", "大酒店", "宾馆", "饭店", "公寓", "客栈", "度假村", "旅馆", "会馆")
_DISTRICTS = ("东城区", "西城区", "南湖区", "北辰区", "高新区", "滨江区", "望山区", "临海区", "新港区", "古塔区")
_ROADS = "长青 人民 解放 建设 中山 文昌 学院 体育 和平 胜利 迎宾 朝阳 科技 花园 环城".split()
_STATIONS = "市民广场 火车南 大学城 体育馆 会展中心 江北路 老城门 动物园 博物院 新世界 植物园 码头".split()
FIELDS = {
    "name": "名称",
    "type": "类型",
    "facilities": "设施",
    "price": "价格",
    "rating": "评分",
    "address": "地址",
    "phone": "电话",
    "metro": "地铁",
}


@dataclass(frozen=True)
class Hotel:
    """One record. ``price`` is yuan a night, ``rating`` 3.0 to 5.0, ``metro`` the nearest station."""

    name: str
    type: str
    facilities: tuple[str, ...]
    price: int
    rating: float
    address: str
    phone: str
    metro: str

    @property
    def short(self) -> str:
        """The abbreviation guests use: the name without what follows the brand."""
        return brand(self.name)


def brand(name: str) -> str:
    """The part of an invented name before the words every hotel shares (国际, 大酒店, …)."""
    for tail in sorted({place + kind for place in _PLACES for kind in _KINDS}, key=len, reverse=True):
        if name.endswith(tail):
            return name.removesuffix(tail)
    return name


def part_of(brand_name: str) -> str:
    """The part a brand belongs to: fixed by its hash, so that no seed moves a hotel from test to train."""
    share = int.from_bytes(sha256(brand_name.encode()).digest()[:4], "big") / 2**32
    return (
        "train" if share < PARTS["train"] else "validation" if share < PARTS["train"] + PARTS["validation"] else "test"
    )


def invent(random_: random.Random, facilities: Sequence[str], part: str) -> Hotel:
    """One hotel of ``part``; its type sets the range of its price, and the number of its facilities grows with it."""
    # Brands are of one length, so that none of a test hotel is the end of one met in training.
    name = ""
    while not name or part_of(name) != part:
        name = random_.choice(FIRST) + random_.choice(FIRST + SECOND) + random_.choice(SECOND)
    type_ = random_.choice(TYPES)
    low, high = PRICES[type_]
    count = random_.randint(2, 3 + TYPES.index(type_))
    return Hotel(
        name=name + random_.choice(_PLACES) + random_.choice(_KINDS),
        type=type_,
        facilities=tuple(random_.sample(facilities, count)),
        price=random_.randint(low, high),
        rating=round(random_.uniform(3.5, 5.0), 1),
        address=f"{random_.choice(_DISTRICTS)}{random_.choice(_ROADS)}路{random_.randint(1, 399)}号",
        phone=f"0{random_.randint(10, 99)}-{random_.randint(20000000, 89999999)}",
        metro=random_.choice(_STATIONS) + "站",
    )


@dataclass(frozen=True)
class Database:
    """Hotels by part. Names are unique, and so are abbreviations."""

    parts: dict[str, tuple[Hotel, ...]]

    @classmethod
    def build(cls, seed: int = 0, hotels: int = 1000) -> Database:
        """Invent ``hotels`` hotels from ``seed``, 8:1:1 over train, validation and test."""
        from weitiao.demo.dialogues import phrases

        random_, facilities = random.Random(f"hotels {seed}"), tuple(phrases()["facilities"])
        parts: dict[str, tuple[Hotel, ...]] = {}
        for part, share in PARTS.items():
            by_brand: dict[str, Hotel] = {}
            while len(by_brand) < round(hotels * share):
                hotel = invent(random_, facilities, part)
                by_brand.setdefault(hotel.short, hotel)
            parts[part] = tuple(by_brand.values())
        return cls(parts)

    def part(self, name: str) -> tuple[Hotel, ...]:
        """The hotels of one part."""
        return self.parts[name]

    @property
    def all(self) -> tuple[Hotel, ...]:
        """Every hotel."""
        return tuple(hotel for part in self.parts.values() for hotel in part)


def search_hotels(
    hotels: Sequence[Hotel],
    name: str | None = None,
    type: str | None = None,
    facilities: Sequence[str] = (),
    price_range_lower: float | None = None,
    price_range_upper: float | None = None,
    rating_range_lower: float | None = None,
    rating_range_upper: float | None = None,
) -> list[Hotel]:
    """The hotels that meet every condition, best rating first, then cheapest.

    ``name`` matches a name that contains its characters in their order, so that an abbreviation finds its hotel.
    Bounds include their ends. Arguments the schema does not know are the caller's business (``data.tools.check``).
    """

    def fits(hotel: Hotel) -> bool:
        return (
            (name is None or _contains(hotel.name, name))
            and (type is None or hotel.type == type)
            and set(facilities) <= set(hotel.facilities)
            and (price_range_lower is None or hotel.price >= price_range_lower)
            and (price_range_upper is None or hotel.price <= price_range_upper)
            and (rating_range_lower is None or hotel.rating >= rating_range_lower)
            and (rating_range_upper is None or hotel.rating <= rating_range_upper)
        )

    return sorted(filter(fits, hotels), key=lambda hotel: (-hotel.rating, hotel.price, hotel.name))


def _contains(name: str, wanted: str) -> bool:
    rest = iter(name)
    return all(character in rest for character in wanted)


def answer(hotels: Sequence[Hotel], shown: int = 2) -> dict[str, Any]:
    """What the tool returns to the model: how many hotels were found, and the first ``shown`` of them, whole."""
    return {"count": len(hotels), "hotels": [record(hotel) for hotel in hotels[:shown]]}


def record(hotel: Hotel, fields: Collection[str] = tuple(FIELDS)) -> dict[str, Any]:
    """A hotel as the database shows it, under Chinese names as such databases have them (CrossWOZ's does)."""
    return {shown: getattr(hotel, field) for field, shown in FIELDS.items() if field in fields}
