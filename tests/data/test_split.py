"""Splits: nothing torn apart, nothing lost, nothing moved when rows are added, and no part left empty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from weitiao.data.rows import Text
from weitiao.data.split import group_of, split, together, verb
from weitiao.errors import InputError

SHARES = (0.8, 0.1, 0.1)


def rows_of(count: int, per_group: int = 1) -> list[Text]:
    return [Text(f"text {index}", str(index), f"group {index // per_group}") for index in range(count)]


@given(st.integers(0, 80), st.integers(1, 4), st.integers(0, 5), st.sampled_from([SHARES, (0.9, 0.1), (0.5, 0.0, 0.5)]))
@settings(max_examples=150)
def test_every_row_is_in_one_part_with_its_group(count: int, per_group: int, seed: int, shares: tuple[float, ...]):
    rows = rows_of(count, per_group)
    parts = split(rows, shares, seed=seed)
    assert sorted((row for part in parts for row in part), key=rows.index) == rows
    groups = [{row.group for row in part} for part in parts]
    assert sum(len(group) for group in groups) == len({row.group for row in rows})
    assert all(not part for part, share in zip(parts, shares, strict=True) if not share)
    wanted = [part for part, share in zip(parts, shares, strict=True) if share]
    if len({row.group for row in rows}) >= len(wanted):
        assert all(wanted)
    elif rows:
        assert parts[0]
    assert all(part == sorted(part, key=rows.index) for part in parts)


@pytest.mark.parametrize("seed", range(20))
def test_ten_groups_are_enough_for_a_validation(seed: int):
    assert all(split(rows_of(10), (0.95, 0.05), seed=seed))


def test_added_rows_move_none_that_are_there():
    rows = rows_of(1000)
    before = split(rows[:700], SHARES, seed=3)
    after = split(list(reversed(rows)), SHARES, seed=3)
    for small, large in zip(before, after, strict=True):
        assert set(small) <= set(large)


def test_shares_are_about_kept_and_seeds_differ():
    rows = rows_of(5000)
    parts = split(rows, SHARES, seed=0)
    assert [round(len(part) / len(rows), 1) for part in parts] == [0.8, 0.1, 0.1]
    assert parts != split(rows, SHARES, seed=1)
    assert parts == split(rows, SHARES, seed=0)


def test_equal_rows_without_a_group_stay_together():
    rows = [Text(f"text {index % 50}", str(index)) for index in range(200)]
    parts = split(rows, SHARES, seed=0)
    texts = [{row.text for row in part} for part in parts]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert group_of(rows[0]) == group_of(rows[50]) != group_of(rows[1])


@pytest.mark.parametrize("shares", [(0.8, 0.1), (1.1, -0.1), (2, 1)])
def test_shares_that_are_none_are_refused(shares: tuple[float, ...]):
    with pytest.raises(InputError, match="sum to 1"):
        split(rows_of(5), shares)


def run(*words: str):
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, list(words))


def test_the_verb_writes_the_rows_as_they_are(tmp_path: Path):
    records = [{"question": f"{i}", "answer": "好", "extra": [i]} for i in range(40)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    result = run(str(file), "--json")
    assert result.exit_code == 0, result.exception
    counts = json.loads(result.stdout)
    assert sum(counts.values()) == 40 and len(counts) == 3
    written = [
        json.loads(line)
        for part in ("train", "validation", "test")
        for line in (tmp_path / f"rows.{part}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(written, key=lambda record: record["extra"]) == records


def test_the_verb_overwrites_nothing_and_names_bad_rows(tmp_path: Path):
    file = tmp_path / "rows.csv"
    file.write_text("题,答\n" + "".join(f"问{i},答{i}\n" for i in range(30)) + "空,\n", encoding="utf-8")
    words = (str(file), "columns.prompt=题", "columns.answer=答")
    assert "rows.csv:32" in str(run(*words).exception)
    assert run(*words, "--skip-bad", "--shares", "9:1").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.train.jsonl", "rows.validation.jsonl"]
    assert "overwritten" in str(run(*words, "--skip-bad").exception)
    for shares in ("8", "a:b", "0:1", "1:1:1:1"):
        assert "--shares" in str(run(*words, "--shares", shares).exception)


def test_a_rare_class_is_in_every_part_and_nothing_moves():
    rows = [Text(f"text {index}", str(index), f"group {index}") for index in range(600)]
    rare = {str(index) for index in range(0, 600, 100)}

    def stratum(row: Text) -> str:
        return "rare" if row.id in rare else "common"

    for seed in range(20):
        parts = split(rows, SHARES, stratum=stratum, seed=seed)
        assert all(any(row.id in rare for row in part) for part in parts)
        assert sum(map(len, parts)) == 600
    before, after = split(rows[:400], SHARES, stratum=stratum), split(rows[::-1], SHARES, stratum=stratum)
    common = [{row.id for row in part} - rare for part in before]
    assert all(ids <= {row.id for row in part} for ids, part in zip(common, after, strict=True))


def test_groups_that_share_a_row_are_named_or_dealt_together(tmp_path: Path):
    records = [{"text": f"text {i}", "group": f"g{i // 2}"} for i in range(80)]
    records += [{"text": "shared by many", "group": f"g{i}"} for i in range(0, 40, 4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    problem = str(run(str(file)).exception)
    assert (
        "says the same as" in problem
        and "(group g12), in another part" in problem
        and "--join" in problem
        and "--allow-leakage" in problem
    )
    assert not list(tmp_path.glob("rows.*.jsonl"))
    assert run(str(file), "--join").exit_code == 0
    holders = [path for path in tmp_path.glob("rows.*.jsonl") if "shared" in path.read_text(encoding="utf-8")]
    assert len(holders) == 1
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tmp_path.glob("rows.*.jsonl")) == 90


def test_join_changes_nothing_where_nothing_is_shared():
    rows = rows_of(200, 3)
    assert split(rows, SHARES, group=together(rows)) == split(rows, SHARES)


def test_the_verb_stratifies_by_a_key(tmp_path: Path):
    records = [{"text": f"text {i}", "kind": "rare" if i % 20 == 0 else "common"} for i in range(100)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert "kind" in str(run(str(file), "--stratify", "label").exception)
    assert run(str(file), "--stratify", "kind").exit_code == 0
    assert all("rare" in path.read_text(encoding="utf-8") for path in tmp_path.glob("rows.*.jsonl"))
