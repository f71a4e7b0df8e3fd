"""A small sample of every soak; ``make soak-kill``, ``-rot``, ``-disk`` and ``-nan`` run them at length."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.soak import disk, harness, kill, nan, rot

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


@pytest.mark.parametrize(("module", "seeds"), [(kill, (2, 4, 5, 10)), (rot, (0, 3, 4, 6)), (disk, (2, 4))])
def test_a_run_that_is_hit_is_the_run_that_was_not(module, seeds, tmp_path: Path):
    more = {"line": False} if module is kill else {}
    prepared = module.prepare(tmp_path / "prepared", harness.SPECS[1:2], **more)
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        found = module.trial(seed, folder, prepared)
        assert found["ok"], found


@pytest.mark.parametrize("seed", [0, 2, 4, 6, 8, 7])
def test_faulty_steps_are_caught_and_clean_ones_are_not(seed: int, tmp_path: Path):
    found = nan.trial(seed, tmp_path, {})
    assert found["ok"], found


def test_results_are_kept_and_done_once(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["soak", "--count", "4"])
    tried = []

    def trial(seed: int, folder: Path, prepared: object) -> dict:
        tried.append(seed)
        if seed == 1:
            raise ValueError("lost")
        return {"ok": seed != 2, "kind": "odd"}

    assert harness.soak("x", trial, lambda folder: None, 9) == 2
    assert harness.soak("x", trial, lambda folder: None, 9) == 2 and tried == [0, 1, 2, 3]
    said = capsys.readouterr().out
    assert "x odd: 2 of 3" in said and "ValueError: lost" in said
