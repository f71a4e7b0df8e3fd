"""The generator: gold calls are true, states add up, and the same seed draws the same."""

import json
import random

import pytest

from weitiao.data.tools import check
from weitiao.demo import parser
from weitiao.demo.database import Database, Hotel, brand, search_hotels
from weitiao.demo.dialogues import AROUND, GOODBYE, Guest, dialogues, update
from weitiao.demo.tools import toolset

DATABASE = Database.build(5)


@pytest.fixture(scope="module", params=["train", "validation", "test"])
def chats(request):
    return request.param, list(dialogues(DATABASE, request.param, 200, 5))


def test_a_gold_call_fits_its_schema_and_its_result_is_what_the_database_returns(chats):
    part, rows = chats
    for chat in rows:
        for place, message in enumerate(chat.messages):
            for call in message.calls:
                assert check(call, chat.tools) == []
                found = search_hotels(DATABASE.part(part), **call.arguments)
                result = json.loads(chat.messages[place + 1].content)
                assert result["count"] == len(found)
                assert [hotel["名称"] for hotel in result["hotels"]] == [hotel.name for hotel in found[:2]]


def test_an_answer_says_only_what_the_conversation_holds(chats):
    _, rows = chats
    for chat in rows:
        for place, message in enumerate(chat.messages):
            if message.role == "assistant" and message.content.endswith("分。") and "评分是" in message.content:
                name, value = message.content.removesuffix("分。").split("的评分是")
                results = [json.loads(m.content) for m in chat.messages[:place] if m.role == "tool"]
                known = {hotel["名称"]: hotel["评分"] for result in results for hotel in result["hotels"]}
                assert known[name] == float(value)


def test_most_calls_find_something_and_some_find_nothing(chats):
    _, rows = chats
    counts = [json.loads(m.content)["count"] for chat in rows for m in chat.messages if m.role == "tool"]
    assert 0.01 < counts.count(0) / len(counts) < 0.35


def test_guests_say_goodbye_with_their_probability():
    rows = [chat for seed in range(3) for chat in dialogues(DATABASE, "train", 400, seed)]
    share = sum(chat.messages[-1].content.endswith("再见！") for chat in rows) / len(rows)
    assert share == pytest.approx(GOODBYE, abs=0.04)


def test_every_kind_of_wish_occurs():
    rows = list(dialogues(DATABASE, "test", 200, 5))
    calls = [call.arguments for chat in rows for message in chat.messages for call in message.calls]
    assert {name for call in calls for name in call} == set(rows[0].tools[0]["function"]["parameters"]["properties"])
    around = [c for c in calls if c.get("price_range_upper", 0) - c.get("price_range_lower", 0) == 2 * AROUND]
    assert around
    short = [c["name"] for c in calls if "name" in c and c["name"] == brand(c["name"])]
    assert short and len(short) < len([c for c in calls if "name" in c])


def test_the_same_seed_draws_the_same_and_another_draws_others():
    assert list(dialogues(DATABASE, "test", 20, 1)) == list(dialogues(DATABASE, "test", 20, 1))
    assert list(dialogues(DATABASE, "test", 20, 1)) != list(dialogues(DATABASE, "test", 20, 2))
    assert Database.build(1) == Database.build(1) != Database.build(2)


def test_a_new_bound_replaces_both_old_ones_and_facilities_add_up():
    state = {"facilities": ["温泉"], "price_range_lower": 300, "price_range_upper": 500, "rating_range_lower": 4.0}
    after = update(state, {"price_range_upper": 800, "facilities": ["电梯"]})
    assert after == {"facilities": ["温泉", "电梯"], "price_range_upper": 800, "rating_range_lower": 4.0}


def test_search_keeps_all_conditions_and_finds_abbreviations():
    one = Hotel("云岚国际大酒店", "豪华型", ("温泉", "电梯"), 900, 4.5, "a", "b", "c")
    two = Hotel("银桥旅馆", "经济型", ("电梯",), 100, 4.9, "a", "b", "c")
    assert search_hotels([one, two]) == [two, one]
    assert search_hotels([one, two], name="云岚酒店") == [one]
    assert search_hotels([one, two], facilities=["温泉", "电梯"]) == [one]
    assert search_hotels([one, two], price_range_lower=100, price_range_upper=100) == [two]
    assert search_hotels([one, two], rating_range_lower=4.5, rating_range_upper=4.5) == [one]
    assert search_hotels([one, two], type="高档型") == []


def test_the_toolset_answers_like_the_database():
    search = toolset(seed=5)["search_hotels"]
    found = search_hotels(DATABASE.all, type="豪华型", price_range_upper=900)
    answer = search(type="豪华型", price_range_upper=900)
    assert answer["count"] == len(found) and answer["hotels"][0]["名称"] == found[0].name


@pytest.mark.parametrize(
    ("said", "stated"),
    [
        ("要豪华型的，400元以下", {"type": "豪华型", "price_range_upper": 400}),
        ("价格在300到500之间", {"price_range_lower": 300, "price_range_upper": 500}),
        ("500元左右", {"price_range_lower": 400, "price_range_upper": 600}),
        ("评分4.5以上，有温泉和电梯", {"facilities": ["温泉", "电梯"], "rating_range_lower": 4.5}),
        ("三百以内", {"price_range_upper": 300}),
    ],
)
def test_the_rule_parser_reads_plain_wishes(said, stated):
    assert parser.parse(said, []) == stated


def test_a_clause_says_what_it_sets():
    guest = Guest(random.Random(0), "seen")
    hotel = Hotel("云岚酒店", "高档型", ("温泉",), 520, 4.4, "a", "b", "c")
    for _ in range(300):
        _, values = guest.price(hotel)
        assert values.get("price_range_lower", 0) <= 520 + AROUND
        assert values.get("price_range_upper", 10**6) >= 520 - AROUND
        _, values = guest.rating(hotel)
        assert values.get("rating_range_lower", 0) <= 4.4 <= values.get("rating_range_upper", 5)
