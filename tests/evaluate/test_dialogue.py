"""Every measure by hand; intervals; teacher-forced replay."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import sacrebleu

from weitiao.data.rows import Call, Chat, Message
from weitiao.data.tools import Parsed
from weitiao.evaluate.bootstrap import Resampling
from weitiao.evaluate.compare import detailed
from weitiao.evaluate.dialogue import (
    Scores,
    Success,
    Turn,
    as_shot,
    bleu4,
    calls_equal,
    error_kinds,
    errors,
    measure,
    replay,
    score_calls,
    slot_table,
    slots,
    success,
)


def search(**arguments) -> Call:
    return Call("search", arguments)


# --- slots and calls


def test_slots_count_list_elements_singly():
    counted = slots(
        {"type": " 经济型 ", "facilities": ["wifi", "wifi", " 泳池"], "price": 400, "name": None, "x": "", "y": []}
    )
    assert counted == {("type", "经济型"): 1, ("facilities", "wifi"): 2, ("facilities", "泳池"): 1, ("price", 400): 1}


def test_numbers_are_numbers_lists_have_no_order_texts_are_stripped():
    assert calls_equal(search(p=400, f=["a", "b"], n="x"), search(p=400.0, f=["b", "a"], n=" x "))
    assert not calls_equal(search(p=400), search(p="400"))
    assert not calls_equal(search(p=1), search(p=True))
    assert not calls_equal(search(f=["a", "a"]), search(f=["a"]))
    assert not calls_equal(search(p=1), Call("other", {"p": 1}))
    assert not calls_equal(search(), None) and calls_equal(None, ())
    assert calls_equal(search(p=None), search())
    assert calls_equal([search(a=1), search(b=2)], [search(b=2), search(a=1)])
    assert slots({"range": {"low": 1, "high": 2}}) == {("range.low", 1): 1, ("range.high", 2): 1}


def test_scores_by_hand():
    pairs = [
        (search(type="a", facilities=["x", "y"]), search(type="a", facilities=["x", "z"])),  # 2 of 3 and 2 of 3
        (search(price=400), search(price=400.0)),  # 1 of 1, exact
        (None, search(type="b")),  # a call where none should be: a false positive, and wrong
        (search(type="c", rating=4), None),  # 2 missed, and wrong
        (None, None),  # no call on either side: does not count
    ]
    assert score_calls(pairs) == Scores(
        precision=3 / 5, recall=3 / 6, f1=6 / 11, exact_match=1 / 4, turns=4, gold_slots=6, predicted_slots=5
    )


def test_calls_without_slots_and_nothing_at_all():
    assert score_calls([(search(), search())]) == Scores(0, 0, 0, 1.0, 1, 0, 0)
    assert score_calls([(search(), None)]).exact_match == 0
    assert score_calls([(None, None)]) == score_calls([]) == Scores(0, 0, 0, 0, 0, 0, 0)
    assert score_calls([(search(a=1), Call("other", {"a": 1}))]).f1 == 0


def test_several_calls_of_one_turn():
    gold, predicted = (search(a=1), search(b=2)), (search(b=2), search(b=2))
    scores = score_calls([(gold, predicted)])
    assert (scores.precision, scores.recall, scores.exact_match) == (1 / 2, 1 / 2, 0)


# --- BLEU


def test_bleu_is_sacrebleus_character_bleu():
    pairs = [
        ("为您找到两家酒店。", "为您找到三家酒店。"),
        ("电话是 010-1234", "电话: 010-1235 吗"),
        ("好的", ""),
        ("再见", "再见"),
    ]
    expected = sacrebleu.corpus_bleu([said for _, said in pairs], [[gold for gold, _ in pairs]], tokenize="char")
    assert bleu4(pairs) == pytest.approx(expected.score)
    assert bleu4([("四个汉字", "四个汉字")]) == pytest.approx(100)


def test_bleu_by_hand():
    # abcde / abxde: 4/5 unigrams, 2/4 bigrams, 0/3 and 0/2, smoothed as 1/(2·3) and 1/(4·2)
    expected = 100 * (4 / 5 * 2 / 4 * 1 / 6 * 1 / 8) ** 0.25
    assert bleu4([("abcde", "abxde")]) == pytest.approx(expected)
    assert bleu4([]) == bleu4([("好", "")]) == 0


# --- task success


def test_success_by_hand():
    hotels = {"a": [1, 2], "b": [], "c": [1, 2], "d": [], "e": [3]}

    def execute(call: Call):
        return hotels[call.arguments["k"]]

    pairs = [
        (search(k="a"), search(k="a")),  # right
        (search(k="a"), search(k="c")),  # other words, the same hotels: right
        (search(k="a"), search(k="e")),  # wrong
        (search(k="a"), None),  # wrong
        (search(k="a"), search(k="unknown")),  # cannot be executed: wrong
        (search(k="b"), search(k="d")),  # nothing found, and nothing found: right, apart
        (search(k="b"), search(k="a")),  # wrong, apart
        (None, search(k="a")),  # no gold call: does not count
    ]
    assert success(pairs, execute) == Success(rate=2 / 5, count=5, empty_rate=1 / 2, empty_count=2)


# --- all of it, with intervals


def turn(id: str, place: int, gold=None, predicted=None, gold_text="", text="") -> Turn:
    as_tuple = lambda call: () if call is None else (call,)  # noqa: E731
    return Turn(id, place, as_tuple(gold), as_tuple(predicted), gold_text, text)


def many(dialogues: int, seed: int = 0) -> list[Turn]:
    draw = np.random.default_rng(seed)
    turns = []
    for number in range(dialogues):
        for place in range(4):
            gold = search(a=int(draw.integers(3)), b=["x"] * int(draw.integers(3)))
            predicted = gold if draw.random() < 0.7 else search(a=7)
            turns.append(turn(f"d{number}", 2 * place, gold, predicted))
            turns.append(turn(f"d{number}", 2 * place + 1, gold_text="为您找到一家酒店", text="为您找到两家"))
    return turns


def test_measure_agrees_with_the_single_measures():
    turns = many(30)
    figures = measure(turns, execute=lambda call: call.arguments.get("b"))
    pairs = [(turn.gold_calls, turn.predicted_calls) for turn in turns]
    scores, done = score_calls(pairs), success(pairs, lambda call: call.arguments.get("b"))
    assert figures["slot_f1"].value == scores.f1
    assert figures["slot_precision"].value == scores.precision
    assert figures["call_exact_match"].value == scores.exact_match and figures["call_exact_match"].count == 120
    assert figures["task_success"].value == done.rate and figures["task_success"].count == done.count
    assert figures["task_success_empty"].value == done.empty_rate
    texts = [(turn.gold_text, turn.text) for turn in turns if not turn.gold_calls]
    assert figures["bleu4"].value == pytest.approx(bleu4(texts)) and figures["bleu4"].count == 120
    for figure in figures.values():
        assert figure.low <= figure.value <= figure.high
    assert figures == measure(turns, execute=lambda call: call.arguments.get("b"))
    assert figures["slot_f1"] != measure(turns, seed=1)["slot_f1"]
    json.dumps({name: figure.as_dict() for name, figure in figures.items()})


def test_measure_of_nothing():
    assert {figure.count for figure in measure([]).values()} == {0}


def test_a_call_instead_of_an_answer_costs_bleu():
    said = measure([turn("d", 0, gold_text="您好您好", text="您好您好")])["bleu4"].value
    called = measure([turn("d", 0, predicted=search(), gold_text="您好您好")])["bleu4"].value
    assert (said, called) == (pytest.approx(100), 0)


def test_intervals_draw_dialogues_and_not_turns():
    """Ten turns that agree within each dialogue are one observation: the interval is that of 20 dialogues."""
    right = np.repeat(np.arange(20) % 2, 10)
    groups = [f"d{number}" for number in np.repeat(np.arange(20), 10)]
    whole = Resampling(groups, 4000).ratio(right, np.ones(200, int))
    each = Resampling([str(number) for number in range(200)], 4000).ratio(right, np.ones(200, int))
    assert whole.high - whole.low == pytest.approx(2 * 1.96 * (0.25 / 20) ** 0.5, rel=0.1)
    assert each.high - each.low == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)


def test_a_thousand_draws_of_200_dialogues_take_under_a_second():
    turns = many(200)
    measure(turns[:8])
    started = time.perf_counter()
    measure(turns)
    assert time.perf_counter() - started < 2  # 0.2 s on a quiet core


# --- replay


class Plain:
    """A renderer of a token a character."""

    def prompt(self, messages, tools=()):
        return [ord(letter) for message in messages for letter in f"{message.role[0]}:{message.content}\n"]

    def parsed(self, text):
        return Parsed("", (search(q=text[1:]),)) if text.startswith("!") else Parsed(text)


def chat(id: str, *turns: str, system: str = "") -> Chat:
    roles = {"u": "user", "a": "assistant", "t": "tool"}
    head = (Message("system", system),) if system else ()
    return Chat(head + tuple(Message(roles[said[0]], said[1:]) for said in turns), id=id)


def written(prompts):
    return ["".join(map(chr, prompt)) for prompt in prompts]


def test_replay_is_teacher_forced_one_answer_per_assistant_message():
    asked = []

    def answer(prompts):
        asked.extend(written(prompts))
        return ["!甲", "乙", "丙"]

    turns = replay([chat("d1", "u一", "a二", "t三", "a四", system="s"), chat("d2", "u五", "a六")], answer, Plain())
    assert asked == ["s:s\nu:一\n", "s:s\nu:一\na:二\nt:三\n", "u:五\n"]
    assert [(turn.id, turn.turn, turn.gold_text, turn.text) for turn in turns] == [
        ("d1", 2, "二", ""),
        ("d1", 4, "四", "乙"),
        ("d2", 1, "六", "丙"),
    ]
    assert turns[0].predicted_calls == (search(q="甲"),)


def test_shots_come_after_the_system_message_and_are_dropped_where_they_do_not_fit(capsys):
    shots = [chat("s1", "ux", "ay", "ubye", system="other"), chat("s2", "um", "an")]
    chats = [chat("d1", "u一", "a二", "u三", "a四", system="s")]
    asked = []

    def answer(prompts):
        asked.extend(written(prompts))
        return ["" for _ in prompts]

    replay(chats, answer, Plain(), shots)
    assert asked[0] == "s:s\nu:x\na:y\nu:m\na:n\nu:一\n"
    assert not capsys.readouterr().err
    replay(chats, answer, Plain(), shots, limit=24)
    assert asked[2:] == [asked[0], "s:s\nu:x\na:y\nu:一\na:二\nu:三\n"]
    assert "1" in capsys.readouterr().err
    turns = replay(chats, answer, Plain(), shots, limit=8)
    assert asked[4:] == ["s:s\nu:一\n"]  # the other prompt is too long by itself
    assert [turn.text for turn in turns] == ["", ""]
    assert "8" in capsys.readouterr().err


def test_a_shot_ends_with_the_assistant():
    assert [message.content for message in as_shot(chat("s", "ux", "ay", "ubye", system="s"))] == ["x", "y"]


# --- where it goes wrong


def test_every_kind_of_error_has_its_name_and_the_slots_their_scores():
    gold, none = (search(type="a", price=1),), ()
    other = (Call("book", {"type": "a"}),)
    cases = {
        "missing call": (gold, none),
        "needless call": (none, gold),
        "wrong function": (gold, other),
        "wrong value": (gold, (search(type="b", price=1),)),
        "missing slot": (gold, (search(type="a"),)),
        "needless slot": (gold, (search(type="a", price=1, rating=4),)),
        "wrong number of calls": (gold, (*gold, search())),
    }
    for kind, pair in cases.items():
        assert error_kinds(*pair) == [kind]
    assert error_kinds(gold, none, unreadable=True) == ["unreadable"] and not error_kinds(gold, gold)
    assert error_kinds(gold, (search(type="b"),)) == ["wrong value", "missing slot"]
    turns = [Turn(kind, 1, *pair, "", "") for kind, pair in cases.items()]
    found = errors(turns, [False] * len(turns))
    assert {kind: one["count"] for kind, one in found.items()} == dict.fromkeys(cases, 1)
    table = slot_table(turns)
    assert list(table)[:2] == ["search.price", "search.type"] and table["search.price"]["count"] == 6
    assert table["search.rating"] | {"precision": 0, "count": 0} == table["search.rating"]
    text = detailed({"slots": table, "errors": found})
    assert "search.price" in text and "needless slot" in text
