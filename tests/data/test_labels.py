"""Labelled rows: which labels there are, what becomes of each kind, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from weitiao.data.labels import head_of, labelled
from weitiao.data.rows import Labelled, Text
from weitiao.data.sources import DataOptions, load, read
from weitiao.errors import InputError
from weitiao.models import tiny
from weitiao.models.heads import Head


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer("bert")


def rows(*labels):
    return [Labelled(f"text number {number}", label, f"row:{number}") for number, label in enumerate(labels)]


def write(path: Path, *records) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("labels", "head"),
    [
        (("b", "a", "b"), Head(("a", "b"))),
        (("10", "2", "1"), Head(("1", "2", "10"))),
        ((("x", "y"), (), ("z",)), Head(("x", "y", "z"), "multi")),
        ((0.5, 2.0), Head(("value",), "regression")),
    ],
)
def test_the_head_is_what_the_rows_have(labels, head):
    assert head_of(rows(*labels), (), "auto") == head


def test_the_order_that_is_given_counts_and_a_base_keeps_its_own():
    assert head_of(rows("a", "b"), ("b", "a"), "auto") == Head(("b", "a"))
    own = Head(("c", "b", "a"))
    assert head_of(rows("a", "b"), (), "auto", own) == own


def test_targets_are_classes_marks_and_numbers(tokenizer):
    options = DataOptions()
    single = labelled(rows("b", "a"), tokenizer, Head(("a", "b")), options, 64)
    assert [int(example.labels) for example in single] == [1, 0]
    assert all(example.trained_tokens == 1 for example in single) and single.trained_tokens == 2
    multi = labelled(rows(("b",), ()), tokenizer, Head(("a", "b"), "multi"), options, 64)
    assert np.array_equal(np.stack([example.labels for example in multi]), [[0, 1], [0, 0]])
    numbers = labelled(rows(0.5, "2"), tokenizer, Head(("value",), "regression"), options, 64)
    assert [float(example.labels) for example in numbers] == [0.5, 2.0]


def test_numbers_stand_for_the_names_that_are_given(tokenizer):
    made = labelled(rows("2", "0"), tokenizer, Head(("negative", "neutral", "positive")), DataOptions(), 64)
    assert [int(example.labels) for example in made] == [2, 0]


def test_every_wrong_label_is_named_at_once(tokenizer):
    with pytest.raises(InputError) as caught:
        labelled(rows("a", "c", "d"), tokenizer, Head(("a", "b")), DataOptions(), 64)
    assert len(caught.value.problems) == 2 and "row:1" in str(caught.value) and '"d"' in str(caught.value)
    kept = labelled(rows("a", "c"), tokenizer, Head(("a", "b")), DataOptions(skip_bad=True), 64)
    assert len(kept) == 1 and kept.masked_out == 1 and kept.said


def test_what_cannot_be_told_apart_is_refused(tokenizer):
    with pytest.raises(InputError, match="same label"):
        head_of(rows("a", "a"), (), "auto")
    with pytest.raises(InputError, match="different kinds"):
        head_of(rows("a", 0.5), (), "auto")
    with pytest.raises(InputError, match="no label"):
        head_of([Text("x", "row:0")], (), "auto")
    with pytest.raises(InputError, match="exactly one"):
        labelled(rows(("a", "b")), tokenizer, Head(("a", "b")), DataOptions(), 64)
    with pytest.raises(InputError, match="no number"):
        labelled(rows("many"), tokenizer, Head(("value",), "regression"), DataOptions(), 64)


def test_long_texts_are_counted_and_keep_their_special_tokens(tokenizer):
    long = [Labelled("word " * 100, "a", "row:0"), Labelled("word", "b", "row:1")]
    with pytest.raises(InputError, match="the end is cut in 1 of 2 texts"):
        labelled(long, tokenizer, Head(("a", "b")), DataOptions(max_length=16), 64)
    kept = labelled(long, tokenizer, Head(("a", "b")), DataOptions(max_length=16, allow_truncated=0.5), 64)
    assert kept.truncated == 1 and len(kept[0]) == 16
    assert kept[0].ids[-1] == tokenizer.sep_token_id and kept[0].ids[0] == tokenizer.cls_token_id


def test_files_of_every_kind_have_labels(tmp_path: Path):
    records = [{"text": "一", "label": 1, "group": "g"}, {"text": "二", "label": 0}]
    found = read(write(tmp_path / "a.jsonl", *records), DataOptions(), "classify").rows
    assert [(row.text, row.label, row.group) for row in found] == [("一", "1", "g"), ("二", "0", None)]
    (tmp_path / "b.csv").write_text("review,sentiment\n好,正\n差,负\n", encoding="utf-8")
    options = DataOptions(columns={"text": "review", "label": "sentiment"})
    assert [row.label for row in read(tmp_path / "b.csv", options, "classify").rows] == ["正", "负"]
    several = write(tmp_path / "c.jsonl", {"text": "x", "labels": ["a", "b"]}, {"text": "y", "labels": []})
    assert [row.label for row in read(several, DataOptions(), "classify").rows] == [("a", "b"), ()]
    (tmp_path / "d.csv").write_text('text,label\nx,"[""a"", ""b""]"\n', encoding="utf-8")
    assert read(tmp_path / "d.csv", DataOptions(), "classify").rows[0].label == ("a", "b")


def test_a_missing_label_names_file_and_line(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", {"text": "一", "label": "a"}, {"text": "二"}, {"text": "三", "label": ""})
    with pytest.raises(InputError) as caught:
        load(DataOptions(train=path, validation=0.0), "classify")
    assert f"{path}:2" in str(caught.value) and f"{path}:3" in str(caught.value)


def test_a_split_keeps_groups_together(tmp_path: Path):
    records = [{"text": f"t{n}", "label": str(n % 2), "group": f"g{n // 4}"} for n in range(80)]
    splits = load(DataOptions(train=write(tmp_path / "a.jsonl", *records), validation=0.25), "classify")
    assert splits.validation and not {r.group for r in splits.train} & {r.group for r in splits.validation}
