"""A small sample of every soak; ``make soak-kill``, ``-rot``, ``-disk`` and ``-nan`` run them at length."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.soak import disk, harness, kill, nan, rot
from tests.soak.specs import SPECS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


@pytest.mark.parametrize(("module", "trials"), [(kill, (0, 1, 2, 5)), (rot, (0, 3, 4, 6)), (disk, (2, 3))])
def test_a_run_that_is_hit_is_the_run_that_was_not(module, trials, tmp_path: Path):
    more = {"line": False} if module is kill else {}
    prepared = module.prepare(tmp_path / "prepared", SPECS[1:2], **more)
    for n in trials:
        folder = tmp_path / str(n)
        folder.mkdir()
        found = module.trial(n, random.Random(n), folder, prepared)
        assert found["ok"], found


@pytest.mark.parametrize("n", [0, 2, 4, 6, 8, 7])
def test_faulty_steps_are_caught_and_clean_ones_are_not(n: int, tmp_path: Path):
    found = nan.trial(n, random.Random(n), tmp_path, {})
    assert found["ok"], found


def test_results_are_kept_and_done_once(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["soak", "--count", "4", "--jobs", "2"])

    def trial(n: int, draw: random.Random, folder: Path, prepared: object) -> dict:
        if n == 1:
            raise ValueError("lost")
        return {"ok": n != 2, "kind": "odd", "drawn": draw.random()}

    assert harness.soak("x", trial, lambda folder: None, 9) == 2
    file = tmp_path / harness.RESULTS / "x-1.jsonl"
    before = file.read_text()
    assert sorted(line["n"] for line in harness.lines_of(file)) == [0, 1, 2, 3]
    assert harness.soak("x", trial, lambda folder: None, 9) == 2 and file.read_text() == before
    said = capsys.readouterr().out
    assert "x odd: 2 of 3" in said and "ValueError: lost" in said
    file.unlink()
    harness.soak("x", trial, lambda folder: None, 9)
    assert sorted(file.read_text().splitlines()) == sorted(before.splitlines()), "a trial follows from seed and number"
