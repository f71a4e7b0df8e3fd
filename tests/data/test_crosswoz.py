"""CrossWOZ: invented dialogues in both published forms everywhere, the real files where they are at hand."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from weitiao.data import crosswoz, crosswoz_augment, crosswoz_raw
from weitiao.data.augment_rules import numeral
from weitiao.data.crosswoz_turns import Turn, acts_turns, call_turns, history, informs, merge, turns_of, wants_another
from weitiao.data.rows import Chat, Message, Text
from weitiao.data.sources import DataOptions
from weitiao.data.sources import load as load_source
from weitiao.data.tools import check
from weitiao.errors import InputError

HOTEL = crosswoz_raw.HOTEL
FOLDER = Path(__file__).parents[3] / "shared" / "data" / "crosswoz"
real = pytest.mark.skipif(not (FOLDER / "README.md").is_file(), reason="the CrossWOZ extract is not at hand")


def user(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "text": text, **fields}


def reply(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "text": text, **fields}


def segment(name: str, *messages: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "segment_only": True, "messages": list(messages)}


LUXURY = {"type": "豪华型"}
PRICE = {"price_range_lower": 300, "price_range_upper": 400.0}
SEGMENTS = [
    segment(
        f"seg-{number}",
        user("请推荐一家带健身房的豪华型酒店", search_args={"facilities": ["健身房"], **LUXURY}, results=["青松宾馆"]),
        reply("青松宾馆很合适。"),
        user("这家酒店有桑拿吗？", search_args={"facilities": ["桑拿"], **LUXURY}),
        reply("有的。"),
        user("再帮我找一家价格300-400元的酒店", search_args={"facilities": ["桑拿"], **LUXURY, **PRICE}),
        reply("您看白云饭店行吗？"),
    )
    for number in range(20)
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "hotel_dialogues.train.jsonl", SEGMENTS)
    return tmp_path


def write(path: Path, dialogues: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in dialogues), encoding="utf-8")
    return path


def options(folder: Path | None, **fields: Any) -> DataOptions:
    return DataOptions(format="crosswoz", folder=folder and str(folder), **fields)


# ---- what a segment teaches


def test_a_segments_turns_tell_questions_choices_and_new_searches_apart():
    first, asked, another = turns_of(SEGMENTS[0])
    assert first.own == first.search == {"facilities": ["健身房"], "type": "豪华型"} and first.history == ()
    assert asked.own == {} and asked.search == {"facilities": ["桑拿"], "type": "豪华型"}
    assert another.own == another.search == {"price_range_lower": 300, "price_range_upper": 400.0}
    assert [message.role for message in another.history] == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("text", "another"),
    [
        ("再帮我找一家经济型的酒店", True),
        ("哪家酒店有停车位？", False),
        ("这几家里推荐一个便宜的", False),
        ("我想去别处住", True),
    ],
)
def test_wants_another(text: str, another: bool):
    assert wants_another(text) is another


def test_a_question_about_one_hotel_informs_of_nothing_but_its_name():
    stated = {"name": "青松宾馆", "facilities": ["桑拿"]}
    assert informs("青松宾馆有桑拿吗？", stated) == {"name": "青松宾馆"}
    assert informs("哪家有桑拿？", {"facilities": ["桑拿"]}) == {"facilities": ["桑拿"]}
    assert informs("这家酒店评分4分以上吗？", {"rating_range_lower": 4}) == {"rating_range_lower": 4}


def test_merge_replaces_both_bounds_at_once():
    state = {"type": "经济型", "rating_range_lower": 5, "rating_range_upper": 5, "facilities": ["暖气"]}
    assert merge(state, {"rating_range_lower": 4}) == {
        "type": "经济型",
        "facilities": ["暖气"],
        "rating_range_lower": 4,
    }


def test_canonical_arguments():
    given = {"rating_range_lower": 4.0, "price_range_lower": 300, "name": "A B 店", "facilities": [], "type": ""}
    assert list(crosswoz.canonical(given).items()) == [
        ("name", "AB店"),
        ("price_range_lower", 300),
        ("rating_range_lower", 4),
    ]
    assert isinstance(crosswoz.canonical(given)["rating_range_lower"], int)


# ---- rows


def test_rows_hold_both_skills_and_every_call_fits_the_schema(folder: Path):
    splits = load_source(options(folder), "sft", seed=3)
    chats = [row for row in (*splits.train, *splits.validation) if isinstance(row, Chat)]
    assert len(chats) == len(splits.train) + len(splits.validation)
    assert {chat.messages[0].content for chat in chats} == {crosswoz.CALL_SYSTEM, crosswoz.ACTS_SYSTEM}
    for chat in chats:
        assert chat.tools == (crosswoz.SEARCH_HOTELS,) and chat.messages[-2].role == "user"
        (call,) = chat.messages[-1].calls
        assert not check(call, chat.tools)
        assert list(call.arguments) == [name for name in crosswoz.ARGUMENTS if name in call.arguments]
    assert not {chat.group for chat in splits.train} & {chat.group for chat in splits.validation}
    assert len({chat.id for chat in chats}) == len(chats)


def test_the_same_seed_gives_the_same_rows(folder: Path):
    assert crosswoz.load(options(folder), "sft", 1) == crosswoz.load(options(folder), "sft", 1)
    assert crosswoz.load(options(folder), "sft", 1) != crosswoz.load(options(folder), "sft", 2)


def test_validation_is_a_share_of_the_training_dialogues_and_holds_them_as_they_are(folder: Path):
    splits = crosswoz.load(options(folder, validation=0.2), "sft", 0)
    assert len({row.group for row in splits.validation}) == 4
    assert all(str(row.group).startswith("seg-") for row in splits.validation)
    assert crosswoz.load(options(folder, validation=None), "sft", 0).validation == []


def test_pretraining_rows_are_what_was_said_and_searched(folder: Path):
    row = crosswoz.load(options(folder), "pretrain", 0).train[0]
    assert isinstance(row, Text)
    assert row.text.splitlines()[:3] == [
        "请推荐一家带健身房的豪华型酒店",
        'search_hotels {"type": "豪华型", "facilities": ["健身房"]}',
        "青松宾馆很合适。",
    ]


def test_varied_turns_state_what_they_say(folder: Path):
    turns = [turn for dialogue in crosswoz.read(folder / "hotel_dialogues.train.jsonl") for turn in turns_of(dialogue)]
    made = list(crosswoz_augment.vary(turns, ["青松宾馆", "白云饭店"], ["中心公园"], 0))
    assert {turn.stated["facilities"][0] for turn in made if turn.stated and "facilities" in turn.stated} > {
        "SPA",
        "温泉",
        "租车",
    }
    for turn in made:
        said = " ".join([turn.text, *(message.content for message in turn.history)])
        for name, value in (turn.search or turn.own).items():
            if name == "facilities":  # they may be said in other words
                continue
            if isinstance(value, str):
                spellings = [value, *crosswoz_augment.phrases()["other_types"].get(value, [])]
            else:
                spellings = [f"{value:g}", "点".join(numeral(int(part)) for part in f"{value:g}".split("."))]
            assert any(spelling in said for spelling in spellings)


def test_a_sentence_is_varied_only_where_its_values_stand_in_it_literally():
    assert crosswoz_augment.sentence(Turn("找有SPA的酒店", {}, stated={"facilities": ["SPA"]}))
    assert not crosswoz_augment.sentence(Turn("找有水疗的酒店", {}, stated={"facilities": ["SPA"]}))
    assert not crosswoz_augment.sentence(Turn("住3晚，找有SPA的酒店", {}, stated={"facilities": ["SPA"]}))
    assert not crosswoz_augment.sentence(Turn("有SPA，没有SPA的豪华型也行", {}, stated={"facilities": ["SPA"]}))


# ---- the published form


def raw_query(**slots: str) -> dict[str, Any]:
    empty = dict.fromkeys(("名称", "酒店类型", "酒店设施", "价格", "评分", "周边景点", "周边餐馆", "周边酒店"), "")
    return {"sys_state_init": {"酒店": {**empty, **slots, "selectedResults": ["青松宾馆"]}}}


def raw_dialogue() -> dict[str, Any]:
    """Four exchanges: a search, a question about its result, one about food, and a hotel near the restaurant."""
    wanted = [["Inform", HOTEL, "评分", "4.5分以上"], ["Inform", HOTEL, "价格", "200-300元"]]
    wanted += [["Inform", HOTEL, "酒店设施-桑拿", "是"], ["Request", HOTEL, "名称", ""]]
    near = [["Inform", HOTEL, "酒店类型", "高档型"], ["Select", HOTEL, "源领域", "餐馆"]]
    pine = raw_query(名称="青松宾馆")
    asked = raw_query(评分="4.5分以上", 价格="200-300元", 酒店设施="桑拿")
    nearby = raw_query(酒店类型="高档", 周边餐馆="老王面馆", 价格="4.5元以上")
    said = [
        ("usr", "找一家4.5分以上、200-300元、有桑拿的酒店", wanted, {}),
        ("sys", "青松宾馆。", [["Inform", HOTEL, "名称", "青松宾馆"]], asked),
        ("usr", "它的电话呢？", [["Request", HOTEL, "电话", ""]], {}),
        ("sys", "电话是1。", [["Inform", HOTEL, "电话", "1"]], pine),
        ("usr", "附近有面馆吗？", [["Request", "餐馆", "名称", ""]], {}),
        ("sys", "有老王面馆。", [["Inform", "餐馆", "名称", "老王面馆"]], pine),
        ("usr", "老王面馆旁边的高档酒店有哪些？", near, {}),
        ("sys", "没有。", [["NoOffer", HOTEL, "none", "none"]], nearby),
    ]
    messages = [{"role": role, "content": text, "dialog_act": acts, **query} for role, text, acts, query in said]
    return {"messages": messages, "goal": [[1, "酒店", "评分", "4.5分以上", False]], "type": "不独立多领域"}


def write_zip(path: Path, content: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.name.removesuffix(".zip"), json.dumps(content, ensure_ascii=False))
    return path


def test_the_published_form_is_read(tmp_path: Path):
    no_hotel = {"messages": [], "goal": [[1, "景点", "名称", "", False]]}
    (dialogue,) = crosswoz.read(write_zip(tmp_path / "val.json.zip", {"7": raw_dialogue(), "8": no_hotel}))
    found = [message for message in dialogue["messages"] if message["role"] == "user"]
    assert dialogue["id"] == "crosswoz-val-7"
    assert found[0]["act_args"] == found[0]["search_args"]
    assert found[0]["search_args"] == {
        "facilities": ["桑拿"], "price_range_lower": 200, "price_range_upper": 300, "rating_range_lower": 4.5,
    }  # fmt: skip
    assert found[1]["search_kind"] == "bookkeeping" and "act_args" not in found[1]
    assert "search_args" not in found[2]
    assert found[3]["search_args"] == {"type": "高档型"} and found[3]["cross_domain_ref"]
    assert found[3]["search_unmapped"] == {"周边餐馆": "老王面馆", "价格": "4.5元以上"}
    assert [message.get("segment") for message in found] == [0, 0, None, 1]
    assert list(call_turns(dialogue)) == [0] and list(acts_turns(dialogue)) == [0, 2, 6]
    assert history(dialogue, 2) == (Message("user", found[0]["text"]), Message("assistant", "青松宾馆。"))
    assert history(dialogue, 6) == ()


def test_a_folder_of_zips_trains_too(tmp_path: Path):
    write_zip(tmp_path / "train.json.zip", {str(number): raw_dialogue() for number in range(5)})
    rows = crosswoz.load(options(tmp_path), "sft", 0).train
    first = next(row for row in rows if row.id == "crosswoz-train-0:0:call")
    assert isinstance(first, Chat)
    assert first.messages[-1].calls[0].arguments["facilities"] == ["桑拿"]


@pytest.mark.parametrize(
    ("text", "mentioned", "expected"),
    [
        ("酒吧 桑拿", [], (["酒吧", "桑拿"], [])),
        ("接机", [], (["接机服务"], [])),
        ("wifi", [], ([], ["wifi"])),
        ("wifi", ["所有房间提供wifi"], (["所有房间提供wifi"], [])),
        ("洗浴", [], ([], ["洗浴"])),
    ],
)
def test_a_querys_facilities(text: str, mentioned: list[str], expected: tuple[list[str], list[str]]):
    assert crosswoz_raw.facility_arguments(text, mentioned) == expected


# ---- bad input


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"data\.folder.*train\.jsonl.*train\.json\.zip"):
        crosswoz.load(options(None), "sft", 0)
    with pytest.raises(InputError, match=r"data\.folder.*neither.*train\.jsonl.*train\.json\.zip"):
        crosswoz.load(options(tmp_path), "sft", 0)
    with pytest.raises(InputError, match="no such folder"):
        crosswoz.load(options(tmp_path / "absent"), "sft", 0)


def test_nothing_that_is_asked_for_is_left_out_silently(folder: Path):
    with pytest.raises(InputError, match=r"data\.train"):
        crosswoz.load(options(folder, train="rows.jsonl"), "sft", 0)
    with pytest.raises(InputError, match=r"data\.test"):
        crosswoz.load(options(folder, test=0.1), "sft", 0)
    (folder / "hotel_db.json").write_text('[["青松宾馆", {"价格": 1}]]', encoding="utf-8")
    with pytest.raises(InputError, match=r"hotel_db\.json.*周边景点"):
        crosswoz.load(options(folder), "sft", 0)


def test_the_databases_names_are_used(folder: Path):
    (folder / "hotel_db.json").write_text('[["飞鸟客栈", {"周边景点": ["镜湖"]}]]', encoding="utf-8")
    splits = crosswoz.load(options(folder), "sft", 0)
    said = "".join(message.content for row in splits.train if isinstance(row, Chat) for message in row.messages)
    assert "飞鸟客栈" in said and "镜湖" in said
    assert "20" in splits.said[0]


def test_every_bad_line_is_named(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(SEGMENTS[0], ensure_ascii=False).encode()
    lines = [
        b"{]",
        good,
        b"[1]",
        b'{"id": "x"}',
        '{"id": "名"'.encode("gbk"),
        b'{"id": "x", "messages": [{"role": "bot"}]}',
        b'{"id": "x", "messages": [{"role": "user", "text": "x", "acts": [1]}]}',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError) as caught:
        crosswoz.read(path)
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["1", "3", "4", "5", "6", "7"]
    path.write_bytes(b"{]\n" * 50)
    with pytest.raises(InputError) as caught:
        crosswoz.read(path)
    assert len(caught.value.problems) == 21 and "30" in caught.value.problems[-1]
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        crosswoz.read(path)


def test_bad_zips_are_named(tmp_path: Path):
    (tmp_path / "torn.zip").write_bytes(b"PK no zip")
    odd, list_ = write_zip(tmp_path / "x.json.zip", {"1": {"goal": 3}}), write_zip(tmp_path / "y.json.zip", [1])
    for path in (tmp_path / "torn.zip", odd, list_):
        with pytest.raises(InputError, match=path.name):
            crosswoz.read(path)


# ---- the real files


@real
def test_the_real_extract_has_the_counts_of_its_description():
    dialogues = crosswoz.read(FOLDER / "hotel_dialogues.validation.jsonl")
    assert len(dialogues) == 410
    assert sum(len(list(call_turns(dialogue))) for dialogue in dialogues) == 414
    stating = [m for d in dialogues for i in acts_turns(d) if (m := d["messages"][i]).get("act_args")]
    assert len(stating) == 714


@real
def test_no_validation_dialogue_is_trained_on():
    splits = crosswoz.load(options(FOLDER), "sft", 0)
    assert len(splits.train) > 15_000 and 600 < len(splits.validation) < 1000
    assert not any("validation" in row.id for row in (*splits.train, *splits.validation))
    rare = sum(
        "室外游泳池" in str(row.messages[-1].calls[0].arguments) for row in splits.train if isinstance(row, Chat)
    )
    assert rare > 100


@real
def test_intents_of_the_annotated_utterances_are_split_by_dialogue():
    splits = load_source(DataOptions(format="crosswoz", folder=str(FOLDER), validation=0.2), "classify")
    assert len(splits.train) + len(splits.validation) == 3728
    labels = {label for row in splits.train for label in row.label}
    assert {"Inform-酒店", "Request-酒店", "General-thank"} <= labels and len(labels) == 16
    assert not {row.group for row in splits.train} & {row.group for row in splits.validation}
    assert 0.1 < len(splits.validation) / 3728 < 0.3
