"""CrossWOZ as its authors publish it (``train.json.zip`` …), read into hotel dialogues with ``search_hotels`` calls.

    dialogues = crosswoz_raw.read(Path("CrossWOZ/data/crosswoz/val.json.zip"))

The published file holds every domain and no calls. What a wizard asked the database is in ``sys_state_init`` (the first
query of a turn, before it was relaxed); here it becomes the arguments of ``search_hotels``, beside the arguments that
the guest's own Inform acts state. Zhu et al., CrossWOZ, TACL 2020, https://arxiv.org/abs/2002.11893.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weitiao.errors import InputError, t

HOTEL = "酒店"
FACILITY = "酒店设施-"
TYPES = ("经济型", "舒适型", "高档型", "豪华型")
FACILITIES = (
    "24小时热水", "无烟房", "叫醒服务", "行李寄存", "宽带上网", "吹风机", "国际长途电话", "中式餐厅", "早餐服务",
    "会议室", "公共区域和部分房间提供wifi", "接待外宾", "洗衣服务", "商务中心", "酒店各处提供wifi", "残疾人设施",
    "西式餐厅", "接机服务", "暖气", "健身房", "租车", "免费市内电话", "酒吧", "棋牌室", "接站服务", "室内游泳池",
    "桑拿", "SPA", "收费停车位", "部分房间提供wifi", "公共区域提供wifi", "早餐服务免费", "所有房间提供wifi",
    "免费国内长途电话", "看护小孩服务", "温泉", "室外游泳池",
)  # fmt: skip

PRICE_BOTH = re.compile(r"(\d{2,})-(\d{2,})元?")
PRICE_ONE = re.compile(r"(\d{2,})元?(以上|以下)")
RATING_LOWER = re.compile(r"(\d(?:\.\d)?)分以上")
RATING_EXACT = re.compile(r"(\d(?:\.\d)?)分")


def read(path: Path) -> list[dict[str, Any]]:
    """The hotel dialogues of one published zip (one JSON object, task id to dialogue), in the hotel extract's form."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".json"))
            raw = json.loads(archive.read(name))
        split = path.name.split(".")[0]
        return [dialogue(key, value, split) for key, value in raw.items() if _has_hotel(value)]
    except (zipfile.BadZipFile, StopIteration, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(t("{path}: not a zip with one JSON file inside ({error})", path=path, error=error)) from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(
            t("{path}: not CrossWOZ's published format ({error})", path=path, error=f"{type(error).__name__}: {error}")
        ) from None


def dialogue(task_id: str, raw: Mapping[str, Any], split: str = "") -> dict[str, Any]:
    """One published dialogue in the form of the hotel extract (its fields that training and evaluation read)."""
    messages = [
        {
            "turn": turn,
            "role": "user" if message["role"] == "usr" else "assistant",
            "text": message["content"],
            "acts": message["dialog_act"],
        }
        for turn, message in enumerate(raw["messages"])
    ]
    queries = [message.get("sys_state_init", {}).get(HOTEL, {}) for message in raw["messages"]]
    previous: dict[str, list[str]] = {}
    offered: set[str] = set()
    for user, reply, query in _exchanges(messages, queries):
        if arguments := act_arguments(user["acts"]):
            user["act_args"] = arguments
        if any(act[0] == "Select" for act in user["acts"] + reply["acts"]):
            user["cross_domain_ref"] = True
        asked = {slot: value for slot, value in query.items() if slot != "selectedResults" and value}
        words = {slot: sorted(value.split()) for slot, value in asked.items()}
        if asked and words != previous:
            _add_search(user, asked, [act[2] for act in _flat(messages) if act[0] != "General"], offered)
        previous = words
        if query.get("selectedResults"):
            reply["results"] = query["selectedResults"]
        offered |= {act[3] for act in reply["acts"] if act[1] == HOTEL and act[2] == "名称"}
        offered |= set(query.get("selectedResults", []))
    _add_segments(messages)
    return {"id": f"crosswoz-{split}-{task_id}", "dialogue_id": task_id, "split": split, "messages": messages}


def act_arguments(acts: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What an utterance's own hotel Inform acts say, as ``search_hotels`` arguments."""
    arguments: dict[str, Any] = {}
    facilities = []
    for intent, domain, slot, value in acts:
        if intent != "Inform" or domain != HOTEL:
            continue
        if slot.startswith(FACILITY) and value == "是":
            facilities.append(slot.removeprefix(FACILITY))
        else:
            arguments |= slot_arguments(slot, value) or {}
    return arguments | ({"facilities": facilities} if facilities else {})


def slot_arguments(slot: str, value: str) -> dict[str, Any] | None:
    """``search_hotels`` arguments of one slot; None where they cannot say it (a slip such as a price of 4.5)."""
    if slot == "名称":
        return {"name": value}
    if slot == "酒店类型":
        kind = next((kind for kind in TYPES if value.startswith(kind[:2])), None)
        return {"type": kind} if kind else None
    if slot == "价格":
        if match := PRICE_BOTH.fullmatch(value):
            return {"price_range_lower": int(match[1]), "price_range_upper": int(match[2])}
        if match := PRICE_ONE.fullmatch(value):
            return {f"price_range_{'lower' if match[2] == '以上' else 'upper'}": int(match[1])}
    if slot == "评分":
        if match := RATING_LOWER.fullmatch(value):
            return {"rating_range_lower": float(match[1])}
        if match := RATING_EXACT.fullmatch(value):
            return {"rating_range_lower": float(match[1]), "rating_range_upper": float(match[1])}
    return None


def facility_arguments(text: str, mentioned: Sequence[str]) -> tuple[list[str], list[str]]:
    """A query's facility field (names separated by blanks) as known facilities and what is none.

    A word that is no facility's name stands for the one facility that contains it: among those in the dialogue's
    own acts first, then among all."""
    found, unknown = [], []
    for word in text.split():
        choices = [word] if word in FACILITIES else [name for name in dict.fromkeys(mentioned) if word in name]
        if len(choices) != 1:
            choices = [name for name in FACILITIES if word in name]
        if len(choices) == 1:
            found.append(choices[0])
        else:
            unknown.append(word)
    return list(dict.fromkeys(found)), unknown


def _add_search(user: dict[str, Any], asked: Mapping[str, str], slots: Sequence[str], offered: set[str]) -> None:
    """Write the wizard's new query onto the guest's message, with what it could not say and why it was made."""
    arguments: dict[str, Any] = {}
    unmapped: dict[str, Any] = {}
    for slot, value in asked.items():
        if slot == "酒店设施":
            mentioned = [name.removeprefix(FACILITY) for name in slots if name.startswith(FACILITY)]
            found, unknown = facility_arguments(value, mentioned)
            arguments |= {"facilities": found} if found else {}
            unmapped |= {slot: unknown} if unknown else {}
        elif (mapped := slot_arguments(slot, value)) is not None:
            arguments |= mapped
        else:
            unmapped[slot] = value
    user["search_args"] = arguments
    if unmapped:
        user["search_unmapped"] = unmapped
    stated = user.get("act_args", {})
    new_name = stated.get("name") is not None and stated["name"] not in offered
    selects = any(act[:2] == ["Select", HOTEL] for act in user["acts"])
    asks_name = any(act[:3] == ["Request", HOTEL, "名称"] for act in user["acts"])
    if new_name:
        user["search_kind"] = "named"
    elif asks_name or selects or set(stated) - {"name"}:
        user["search_kind"] = "constraint"
    else:
        user["search_kind"] = "bookkeeping"


def _add_segments(messages: list[dict[str, Any]]) -> None:
    """Number the runs of exchanges that are about hotels alone; exchanges of greetings neither join nor break a run."""
    segment, inside = -1, False
    for at in range(0, len(messages) - 1, 2):
        pair = messages[at : at + 2]
        domains = {act[1] for act in _flat(pair) if act[0] != "General"}
        if domains == {HOTEL}:
            segment += not inside
            inside = True
            for message in pair:
                message["segment"] = segment
        elif domains:
            inside = False


def _exchanges(
    messages: Sequence[dict[str, Any]], queries: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any], Mapping[str, Any]]]:
    for at in range(0, len(messages) - 1, 2):
        yield messages[at], messages[at + 1], queries[at + 1]


def _flat(messages: Sequence[Mapping[str, Any]]) -> list[Sequence[str]]:
    return [act for message in messages for act in message["acts"]]


def _has_hotel(raw: Mapping[str, Any]) -> bool:
    return any(goal[1] == HOTEL for goal in raw["goal"])
