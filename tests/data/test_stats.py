"""Statistics: numbers checked by hand, max_lengths that cut what they say, and the verb's two outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weitiao.cli import main
from weitiao.data.rows import Chat, Message, Row, Text
from weitiao.data.sources import Source
from weitiao.data.stats import lengths, overlap, stats, suggest, without_outliers


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
    assert main(["data", "stats", *files, "--model", str(model), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [entry["rows"] for entry in found["files"]] == [12, 3]
    assert found["overlap"] == [{"files": files, "rows": 3}]
    assert all(entry["max_length"][1]["cut_rows"] == 0 for entry in found["files"])
    assert "prompt (from the key 'question')" in err
    assert main(["data", "stats", *files]) == 0
    assert "a.jsonl" in capsys.readouterr().out
    assert main(["data", "stats", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
