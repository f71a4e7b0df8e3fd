"""Statistics: numbers checked by hand, max_lengths that cut what they say, and the verb's two outputs."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weitiao.cli import main
from weitiao.data.balance import labels, script_of, slots
from weitiao.data.near import index, near, pieces
from weitiao.data.rows import Call, Chat, Labelled, Message, Row, Text
from weitiao.data.sources import Source
from weitiao.data.stats import leaks, lengths, overlap, stats, suggest, without_outliers


def chat(question: str, answer: str, id: str = "") -> Chat:
    return Chat((Message("user", question), Message("assistant", answer)), id=id)


def test_lengths_by_hand():
    found = lengths(range(1, 101))
    assert found == {"count": 100, "sum": 5050, "min": 1, "mean": 50.5, "median": 50, "p95": 95, "p99": 99, "max": 100}
    assert lengths([7]) == {"count": 1, "sum": 7, "min": 7, "mean": 7.0, "median": 7, "p95": 7, "p99": 7, "max": 7}


def test_outliers_are_beyond_the_fences():
    assert without_outliers([10, 11, 12, 13, 14, 200]) == [10, 11, 12, 13, 14]
    assert without_outliers([5]) == [5]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_max_lengths_cut_what_they_say(values: list[int]):
    typical, percentile = suggest(values)
    for found in (typical, percentile):
        limit = found["max_length"]
        assert found["cut_rows"] == sum(value > limit for value in values)
        assert found["cut_tokens"] == sum(max(0, value - limit) for value in values)
    assert percentile["cut_rows"] <= len(values) / 100
    smaller = max((value for value in values if value < percentile["max_length"]), default=None)
    assert smaller is None or sum(value > smaller for value in values) > len(values) / 100


def test_rows_turns_and_duplicates():
    rows: list[Row] = [chat("问", "答", "1"), chat("问", "答", "2"), chat("问", "好", "3"), Text("你好", "4")]
    found = stats(Source(rows, "messages"))
    assert (found["rows"], found["turns"], found["duplicates"]) == (4, 6, 1)
    assert found["characters"]["sum"] == 3 * 3 + 2
    assert "tokens" not in found


def test_overlap_counts_different_rows():
    first: list[Row] = [chat("a", "b", "1"), chat("a", "b", "2"), chat("c", "d")]
    second: list[Row] = [chat("a", "b", "9"), chat("e", "f")]
    assert overlap([Source(first, ""), Source(second, ""), Source([], "")]) == [(0, 1, 1), (0, 2, 0), (1, 2, 0)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from weitiao.models import tiny

    return Path(str(tiny.make("qwen2", tmp_path_factory.mktemp("model"))))


def test_tokens_are_those_of_training(model: Path):
    from weitiao.data.render import Renderer
    from weitiao.models.load import load_tokenizer

    renderer = Renderer.of(load_tokenizer(model))
    rows = [chat("你好", "您好，请讲"), chat("再见", "再见")]
    found = stats(Source([*rows], "messages"), renderer)
    rendered = [renderer.render(row) for row in rows]
    assert found["tokens"]["sum"] == sum(len(one.ids) for one in rendered)
    assert found["trained_tokens"] == sum(sum(one.mask) for one in rendered)
    assert found["trained_share"] == round(found["trained_tokens"] / found["tokens"]["sum"], 4)
    everything = stats(Source([*rows], "messages"), renderer, "all")
    assert everything["trained_share"] == 1.0


def test_the_verb(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = []
    for name, count in (("a", 12), ("b", 3)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"question": f"{i}", "answer": "好"}) + "\n" for i in range(count)))
        files.append(str(file))
    assert main(["data", "stats", *files, "--model", str(model), "--json", "--near", "0"]) == 2
    out, err = capsys.readouterr()
    assert "3 rows in both" in err and f"{files[1]}:1 = {files[0]}:1" in err
    found = json.loads(out)
    assert [entry["rows"] for entry in found["files"]] == [12, 3]
    (leak,) = found["overlap"]
    assert (leak["files"], leak["rows"], leak["near"], len(leak["pairs"])) == (files, 3, 0, 3)
    assert all(entry["max_length"][1]["cut_rows"] == 0 for entry in found["files"])
    assert "prompt (from the key 'question')" in err
    assert main(["data", "stats", *files, "--allow-leakage"]) == 0
    assert "a.jsonl" in capsys.readouterr().out
    assert main(["data", "stats", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err


CHARACTERS = [chr(0x4E00 + place) for place in range(2000)]


def random_text(random: Random, length: int = 100) -> str:
    return "".join(random.choices(CHARACTERS, k=length))


def changed(text: str, count: int, random: Random) -> str:
    characters = list(text)
    for place in random.sample(range(len(text)), count):
        characters[place] = random.choice(CHARACTERS)
    return "".join(characters)


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_that_comparing_every_pair_finds(seed: int):
    random = Random(seed)
    first = [random_text(random) for _ in range(60)]
    texts = [*first, *(changed(text, random.randrange(1, 12), random) for text in first)]
    random.shuffle(texts)
    sets = [set(pieces(text).tolist()) for text in texts]
    alike = {
        row
        for row in range(len(texts))
        for like in range(row)
        if len(sets[row] & sets[like]) / len(sets[row] | sets[like]) >= 0.8
    }
    found = near(index([Text(text) for text in texts], seed))
    assert {one.row for one in found} == alike and 10 < len(alike) < 60
    for one in found:
        similarity = len(sets[one.row] & sets[one.like]) / len(sets[one.row] | sets[one.like])
        assert one.similarity == pytest.approx(similarity) and one.like < one.row


def test_what_differs_in_its_call_or_label_is_no_near_duplicate():
    def asked(price: int) -> Chat:
        call = Call("search", {"price": price})
        return Chat((Message("user", "我想找一家价格便宜而且位置很好的酒店" * 4), Message("assistant", calls=(call,))))

    assert near(index([asked(1), asked(2)])) == []
    assert len(near(index([asked(1), asked(1)]))) == 1
    assert near(index([Labelled("很好吃" * 9, "好"), Labelled("很好吃" * 9, "差")])) == []


def test_a_near_leak_is_named_and_white_space_hides_nothing():
    random = Random(1)
    train: list[Row] = [chat(random_text(random), "好", f"train:{place}") for place in range(30)]
    test: list[Row] = [chat(random_text(random), "好", f"test:{place}") for place in range(30)]
    question = train[7].messages[0].content  # type: ignore[union-attr]
    test[3] = chat("  ".join(question) + "！", "好", "test:3")
    (leak,) = leaks([Source(train, ""), Source(test, "")])
    assert (leak["rows"], leak["near"]) == (0, 1)
    assert leak["pairs"] == [{"row": "test:3", "like": "train:7", "similarity": 1.0}]
    assert leaks([Source(train, ""), Source(test, "")], threshold=0)[0]["near"] == 0


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("今天天气很好，我们出去走走", "Han"),
        ("The weather is fine today", "Latin"),
        ("東京の天気は今日とても良いです", "Kana"),
        ("오늘 날씨가 좋습니다", "Hangul"),
        ("Сегодня хорошая погода", "Cyrillic"),
        ("请帮我翻译 the weather is fine today", "Han + Latin"),
        ("123 ！？", "none"),
    ],
)
def test_scripts(text: str, script: str):
    assert script_of(text) == script


def test_labels_and_slots_are_counted():
    rows: list[Row] = [Labelled("a", "好"), Labelled("b", ("好", "差")), Labelled("c", 0.5)]
    assert labels(rows) == {"好": 2, "差": 1}
    calls = [Call("find", {"tags": ["x", "y"], "price": 5}), Call("find", {"tags": ["x"]})]
    found = slots([Chat((Message("user", "?"), Message("assistant", calls=(call,)))) for call in calls])
    assert found["find"]["calls"] == 2
    assert found["find"]["arguments"]["tags"] == {"calls": 2, "different": 2, "values": {"x": 2, "y": 1}}
    assert found["find"]["arguments"]["price"]["values"] == {"5": 1}


def test_the_page_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, page = tmp_path / "<a>.jsonl", tmp_path / "page.html"
    row = {"text": "很好<b>", "label": "<script>好"}
    file.write_text("".join(json.dumps(row | {"text": f"{row['text']}{i}"}) + "\n" for i in range(5)), "utf-8")
    assert main(["data", "stats", str(file), "format=labelled", "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "<svg" in html and "&lt;script&gt;好" in html and "<script>" not in html and "<a>" not in html
    assert "http" not in html and "src=" not in html
