"""The task ``hotel``: what is asked, what counts, and that no gold answer reaches a prompt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weitiao.data import augment_rules, crosswoz, crosswoz_augment
from weitiao.data.crosswoz_raw import FACILITIES, TYPES
from weitiao.data.rows import Call, Message
from weitiao.errors import InputError
from weitiao.evaluate import hotel
from weitiao.evaluate.colloquial import colloquial
from weitiao.evaluate.colloquial import words as colloquial_words
from weitiao.evaluate.hotel_parser import Parser
from weitiao.evaluate.tasks import EvaluateOptions
from weitiao.methods.io import Tuned

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "crosswoz"
real = pytest.mark.skipif(not (FOLDER / "README.md").is_file(), reason="the CrossWOZ extract is not at hand")
SHAPES = ("range", "lower", "upper", "points", "exactly")
ABOUT_HOTEL = [["Request", "酒店", "名称", ""]]

DIALOGUE: dict[str, Any] = {
    "id": "d",
    "messages": [
        {"turn": 0, "role": "user", "text": "附近好玩吗", "acts": [["Request", "景点", "名称", ""]]},
        {"turn": 1, "role": "assistant", "text": "好玩。", "acts": []},
        {
            "turn": 2, "role": "user", "text": "找家豪华型酒店", "acts": ABOUT_HOTEL, "segment": 0,
            "act_args": {"type": "豪华型"}, "search_args": {"type": "豪华型"}, "search_kind": "constraint",
        },
        {"turn": 3, "role": "assistant", "text": "青松宾馆。", "acts": [], "segment": 0},
        {
            "turn": 4, "role": "user", "text": "电话多少", "acts": ABOUT_HOTEL, "segment": 0,
            "search_args": {"name": "青松 宾馆"}, "search_kind": "bookkeeping",
        },
        {"turn": 5, "role": "assistant", "text": "电话是1。", "acts": [], "segment": 0},
        {
            "turn": 6, "role": "user", "text": "哪家有SPA", "acts": ABOUT_HOTEL, "segment": 0,
            "act_args": {"facilities": ["SPA"]}, "search_args": {"type": "豪华型", "facilities": ["SPA"]},
            "search_kind": "constraint",
        },
        {"turn": 7, "role": "assistant", "text": "青松宾馆有。", "acts": [], "segment": 0},
    ],
}  # fmt: skip


class Echo:
    """A renderer whose prompts and answers are plain text."""

    stop_ids = (0,)
    can_call = True

    def prompt(self, messages: tuple[Message, ...], tools: Any) -> tuple[Message, ...]:
        assert tools == (crosswoz.SEARCH_HOTELS,)
        return messages

    def parse(self, text: str) -> Message:
        return Message("assistant", calls=tuple(Call(name, arguments) for name, arguments in json.loads(text)))


def tuned(monkeypatch: pytest.MonkeyPatch, answer: Any) -> Tuned:
    """A model that answers with ``answer(messages)``: (function, arguments) pairs."""
    from weitiao.generate import engine

    def generate(model: Any, prompts: list[Any], *_: Any, **__: Any) -> list[engine.Completion]:
        return [engine.Completion([], "stop", json.dumps(answer(prompt), ensure_ascii=False)) for prompt in prompts]

    monkeypatch.setattr(engine, "generate", generate)
    model: Any = None
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    renderer: Any = Echo()
    return Tuned(model, tokenizer, renderer, None, "")


def data(tmp_path: Path, *dialogues: dict[str, Any]) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in dialogues), encoding="utf-8")
    return str(path)


def evaluate(model: Any, path: str, **fields: Any) -> Any:
    return hotel.evaluate(model, EvaluateOptions(task="hotel", data=path, samples=20, **fields))


def test_the_cases_and_their_prompts():
    found = {(case.turn, case.measure): case for case in hotel.cases([DIALOGUE])}
    assert list(found) == [(2, "call"), (6, "call"), (2, "acts"), (4, "acts"), (6, "acts")]
    assert found[4, "acts"].gold == {} and found[6, "call"].gold["type"] == "豪华型"
    assert [message.content for message in found[6, "call"].messages] == [
        crosswoz.CALL_SYSTEM, "找家豪华型酒店", "青松宾馆。", "电话多少", "电话是1。", "哪家有SPA",
    ]  # fmt: skip
    assert [message.content for message in found[6, "acts"].messages] == [crosswoz.ACTS_SYSTEM, "哪家有SPA"]


def test_prompts_do_not_depend_on_any_gold_answer():
    blank = json.loads(json.dumps(DIALOGUE))
    for message in blank["messages"]:
        for field in ("act_args", "search_args"):
            if field in message:
                message[field] = {"name": "泄露"}
    assert [case.messages for case in hotel.cases([blank])] == [case.messages for case in hotel.cases([DIALOGUE])]


def test_right_answers_are_right_in_any_spelling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    right = {
        "找家豪华型酒店": [("search_hotels", {"type": "豪华型"})],
        "电话多少": [],
        "哪家有SPA": [("search_hotels", {"facilities": ["SPA"]})],
    }

    def answer(messages: tuple[Message, ...]) -> Any:
        text = messages[-1].content
        if messages[0].content == crosswoz.CALL_SYSTEM and text == "哪家有SPA":
            return [("other", {}), ("search_hotels", {"facilities": ["SPA"], "type": " 豪华型 ", "name": None})]
        return right[text]

    evaluation = evaluate(tuned(monkeypatch, answer), data(tmp_path, DIALOGUE))
    values = {name: figure["value"] for name, figure in evaluation.figures.items()}
    own = [value for name, value in values.items() if "parser" not in name]
    assert set(own) == {1.0} and len(own) == 8
    assert evaluation.predictions[3] == {"id": "d", "turn": 4, "measure": "acts", "gold": {}, "predicted": {}}
    assert {tuple(line) for line in evaluation.predictions} == {("id", "turn", "measure", "gold", "predicted")}


def test_wrong_answers_count_slot_by_slot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    always = [("search_hotels", {"type": "豪华型", "price_range_lower": 100})]
    evaluation = evaluate(tuned(monkeypatch, lambda _: always), data(tmp_path, DIALOGUE))
    values = {name: figure["value"] for name, figure in evaluation.figures.items()}
    assert values["call_slot_precision"] == pytest.approx(2 / 4) and values["call_slot_recall"] == pytest.approx(2 / 3)
    assert values["acts_slot_f1"] == pytest.approx(2 * 1 / (6 + 2))
    assert values["call_exact_match"] == values["acts_exact_match"] == 0
    silent = evaluate(tuned(monkeypatch, lambda _: []), data(tmp_path, DIALOGUE))
    assert [line["predicted"] for line in silent.predictions] == [None, None, {}, {}, {}]
    assert silent.figures["acts_exact_match"]["value"] == pytest.approx(1 / 3)


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model = tuned(monkeypatch, lambda _: [])
    with pytest.raises(InputError, match="no hotel turn"):
        evaluate(model, data(tmp_path, {"id": "x", "messages": [{"role": "user", "text": "你好"}]}))
    with pytest.raises(InputError, match="no such file"):
        evaluate(model, str(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="shots"):
        evaluate(model, data(tmp_path, DIALOGUE), shots=1)
    with pytest.raises(InputError, match=r"hotel_dialogues\.validation\.jsonl"):
        evaluate(model, str(tmp_path))


def test_a_tiny_model_answers(tiny_llama: Path, tmp_path: Path):
    from weitiao.methods.io import open_model

    evaluation = evaluate(open_model(str(tiny_llama)), data(tmp_path, DIALOGUE), max_new_tokens=4)
    assert len(evaluation.predictions) == 5


@real
def test_the_real_validation_dialogues():
    found = hotel.cases(crosswoz.read(FOLDER / "hotel_dialogues.validation.jsonl"))
    assert sum(case.measure == "call" for case in found) == 414
    lines = [{"id": c.id, "turn": c.turn, "measure": c.measure, "gold": c.gold, "predicted": c.gold} for c in found]
    figures = hotel.score(lines, samples=2)
    assert {figure["value"] for figure in figures.values()} == {1.0}
    assert figures["acts_exact_match"]["count"] == len(found) - 414


def test_the_untrained_parser_and_what_a_model_has_over_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    parser = Parser(["青松 宾馆", "住"])
    assert parser.stated("要300-400元、4.5分以上、有SPA的高档型") == {
        "type": "高档型", "facilities": ["SPA"], "price_range_lower": 300, "price_range_upper": 400,
        "rating_range_lower": 4.5,
    }  # fmt: skip
    talk = ["找家豪华型酒店", "青松宾馆。", "青松宾馆有SPA吗", "有。", "那去青松宾馆，5分的吧"]
    said = [Message(role, text) for role, text in zip(["user", "assistant"] * 3, talk, strict=False)]
    wanted = {"type": "豪华型", "facilities": ["SPA"], "rating_range_lower": 5, "rating_range_upper": 5}
    assert parser.search(said) == wanted  # what was offered is not searched again
    assert parser.search(said[2:3]) == {"name": "青松宾馆"}
    silent = evaluate(tuned(monkeypatch, lambda _: []), data(tmp_path, DIALOGUE)).figures
    assert silent["parser_call_exact_match"]["value"] == 1
    assert silent["call_exact_match_over_parser"]["value"] == -1
    assert silent["acts_exact_match_over_parser"]["value"] == pytest.approx(1 / 3 - 1)


def test_guests_in_other_words():
    text = "找一家300-400元、4.5分以上、有SPA和温泉的高档型酒店，1000元以下也行"
    changed = {colloquial(f"{text}{number}") for number in range(50)}
    assert len(changed) > 20 and colloquial(text) == colloquial(text)
    assert any("三百" in one and "四点五" in one for one in changed)
    spoken = hotel.cases([DIALOGUE], spoken=True)
    assert [case.gold for case in spoken] == [case.gold for case in hotel.cases([DIALOGUE])]
    assert spoken[1].messages[2] == Message("assistant", "青松宾馆。")


def test_the_other_words_are_not_those_of_training():
    frozen, taught = colloquial_words(), crosswoz_augment.phrases()
    assert set(frozen["facilities"]) == set(FACILITIES) and set(frozen["types"]) == set(TYPES)
    tested = {phrase for group in ("facilities", "types") for many in frozen[group].values() for phrase in many}
    tables = (taught["other_words"], taught["other_types"], augment_rules.words()["phrases"])
    assert not tested & ({phrase for table in tables for many in table.values() for phrase in many} | set(FACILITIES))
    shapes = {re.sub(r"\{\w+\}", "{}", phrase) for name in SHAPES for phrase in frozen[name]}
    lists = [value for name, value in (taught | augment_rules.words()).items() if isinstance(value, list)]
    assert not shapes & {re.sub(r"\{\w+\}", "{}", str(phrase)) for phrases in lists for phrase in phrases}
