"""Mixing and patches: shares as asked, the same by seed, stable when rows are added, decisions met or named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.cli import main
from weitiao.data.mix import counts, mix
from weitiao.data.options import DataOptions, SourceOptions
from weitiao.data.patch import Patch, hash_of
from weitiao.data.rows import Text
from weitiao.data.sources import load, read
from weitiao.errors import InputError


def source(**values: float) -> SourceOptions:
    return SourceOptions(path="x.jsonl", **values)


def texts(name: str, count: int) -> list[Text]:
    return [Text(f"{name} {place}", f"{name}:{place}") for place in range(count)]


@given(st.lists(st.tuples(st.integers(20, 500), st.floats(0.2, 4), st.floats(0.2, 5)), min_size=1, max_size=4))
@settings(max_examples=100)
def test_weights_are_the_shares_and_repeat_is_the_most(parts: list[tuple[int, float, float]]):
    sources = [source(repeat=repeat, weight=weight) for _, repeat, weight in parts]
    taken = counts([size for size, _, _ in parts], sources)
    total = sum(weight for _, _, weight in parts)
    for count, (size, repeat, weight) in zip(taken, parts, strict=True):
        assert count <= size * repeat + 0.51
        assert abs(count - sum(taken) * weight / total) < len(parts) + 1
    assert any(count + 1 >= size * repeat for count, (size, repeat, _) in zip(taken, parts, strict=True))


def test_repeat_alone_takes_that_much_of_each():
    parts = [texts("a", 10), texts("b", 100)]
    mixed = mix(parts, [source(repeat=2.5), source(repeat=0.3)], seed=1)
    assert [len(part) for part in mixed] == [25, 30]
    assert set(Counter(row.id for row in mixed[0]).values()) == {2, 3}
    assert set(Counter(row.id for row in mixed[1]).values()) == {1}
    assert mixed == mix(parts, [source(repeat=2.5), source(repeat=0.3)], seed=1)
    assert mixed[1] != mix(parts, [source(repeat=2.5), source(repeat=0.3)], seed=2)[1]


def test_added_rows_displace_few():
    before = {row.id for row in mix([texts("a", 1000)], [source(repeat=0.5)])[0]}
    after = {row.id for row in mix([texts("a", 1010)], [source(repeat=0.5)])[0]}
    assert len(before - after) <= 10 and len(after) == 505


def test_too_few_rows_are_named():
    with pytest.raises(InputError, match=r"60 rows are needed and 50 are there"):
        counts([50, 1000], [source(weight=3), source(weight=2)], 100)
    with pytest.raises(InputError, match="no row of it would be taken"):
        counts([3], [source(repeat=0.01)])


def write(path: Path, name: str, count: int) -> Path:
    lines = [json.dumps({"question": f"{name}{place}", "answer": "好"}, ensure_ascii=False) for place in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_recipe_mixes_its_training_rows_and_measures_nothing_twice(tmp_path: Path):
    files = [str(write(tmp_path / f"{name}.jsonl", name, count)) for name, count in (("a", 100), ("b", 200))]
    options = DataOptions(train=[{"path": files[0], "repeat": 3}, files[1]], validation=0.2)  # type: ignore[list-item]
    splits = load(options, "sft")
    times = Counter(row.messages[0].content for row in splits.train)  # type: ignore[union-attr]
    assert {count for name, count in times.items() if name.startswith("a")} == {3}
    assert {count for name, count in times.items() if name.startswith("b")} == {1}
    held = [row.messages[0].content for row in splits.validation]  # type: ignore[union-attr]
    assert len(held) == len(set(held)) > 0 and not set(held) & set(times)
    assert any("seen 3 times" in line for line in splits.said)
    with pytest.raises(ValueError, match="give each one"):
        DataOptions(train=[{"path": "a", "weight": 1}, "b"])  # type: ignore[list-item]


def test_the_verb_mixes_records_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b, out = write(tmp_path / "train.jsonl", "a", 30), write(tmp_path / "b.jsonl", "b", 90), tmp_path / "out.jsonl"
    words = ["data", "mix", f"{a},weight=1", f"{b},weight=2", "--output", str(out), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["taken"] for one in report["sources"]] == [30, 60] and report["rows"] == 90
    first = out.read_bytes()
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and out.read_bytes() == first
    assert main([*words, "--overwrite", "--seed", "1"]) == 0 and out.read_bytes() != first
    capsys.readouterr()
    assert main(["data", "mix", f"{a},reapet=2", f"{b},repeat=many", "--output", str(out), "--overwrite"]) == 2
    err = capsys.readouterr().err
    assert 'did you mean "repeat"' in err and "many" in err


def test_a_patch_edits_and_rejects_and_names_what_it_cannot_find(tmp_path: Path):
    file = write(tmp_path / "rows.jsonl", "q", 5)
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    edited = records[1] | {"answer": "改过"}
    lines = [
        {"file": "rows.jsonl", "line": 1, "sha256": hash_of(records[0]), "action": "reject"},
        {"file": "rows.jsonl", "line": 2, "sha256": hash_of(records[1]), "action": "edit", "row": edited},
        {"file": "rows.jsonl", "line": 3, "sha256": hash_of(records[2]), "action": "accept"},
    ]
    patch = tmp_path / "patch.jsonl"
    patch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    source = read(file, DataOptions(patch=str(patch)))
    assert [row.messages[0].content for row in source.rows] == ["q1", "q2", "q3", "q4"]  # type: ignore[union-attr]
    assert source.rows[0].messages[1].content == "改过"  # type: ignore[union-attr]
    assert source.lines == [2, 3, 4, 5]
    assert any("1 row edited, 1 rejected, 1 accepted" in line for line in source.said)
    file.write_text(file.read_text(encoding="utf-8").replace("q1", "other"), encoding="utf-8")
    with pytest.raises(InputError, match=r"rows\.jsonl:2 is not there any more"):
        load(DataOptions(train=str(file), patch=str(patch), validation=0), "sft")
    patch.write_text('{"sha256": "x", "action": "drop"}\n[]\n{"sha256": "x", "action": "edit"}\n', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        Patch.read(patch)
    assert len(caught.value.problems) == 3


def test_sources_of_several_layouts_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b, out = write(tmp_path / "a.jsonl", "a", 5), tmp_path / "b.jsonl", tmp_path / "out.jsonl"
    turns = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "好"}]
    b.write_text(json.dumps({"messages": turns, "group": "g"}) + "\n", encoding="utf-8")
    assert main(["data", "mix", str(a), str(b), "--output", str(out)]) == 0
    assert "several layouts" in capsys.readouterr().err
    assert {row.group for row in read(out, DataOptions()).rows} == {None, "g"} and len(
        out.read_text().splitlines()
    ) == 6
    text = tmp_path / "t.txt"
    text.write_text("一行\n", encoding="utf-8")
    assert main(["data", "mix", str(a), str(text), "--output", str(out), "--overwrite"]) == 2
    assert "cannot be in one file" in capsys.readouterr().err
