"""runs: no run is overwritten by accident, its files are whole or absent, and its metrics survive a kill."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from weitiao.errors import InputError, RunError
from weitiao.runs import Run, is_run, write_atomic


def test_a_folder_that_holds_a_run_is_refused_with_both_commands(tmp_path: Path):
    folder = tmp_path / "my run"
    Run.create(folder, {"output": "x"})
    with pytest.raises(InputError) as caught:
        Run.create(folder, {"output": "y"})
    assert f"weitiao train --resume '{folder}'" in str(caught.value)
    assert f"weitiao train '{folder}/recipe.yaml' --overwrite" in str(caught.value)
    assert Run.open(folder).recipe() == {"output": "x"}


def test_overwrite_removes_the_former_run_and_nothing_else(tmp_path: Path):
    run = Run.create(tmp_path, {"output": "x"})
    run.log({"step": 1})
    for folder in (run.checkpoints, run.adapter):
        folder.mkdir()
        (folder / "file").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    run = Run.create(tmp_path, {"output": "y"}, overwrite=True)
    assert run.recipe() == {"output": "y"}
    assert run.metrics() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "recipe.yaml"]


def test_a_folder_of_other_things_is_no_run(tmp_path: Path):
    assert not is_run(tmp_path)
    with pytest.raises(InputError, match="holds no run"):
        Run.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Run.create(tmp_path / "file", {})
    with pytest.raises(InputError, match="cannot be made"):
        Run.create(tmp_path / "file" / "below", {})


def test_metrics_survive_a_line_cut_by_a_kill(tmp_path: Path):
    run = Run.create(tmp_path, {})
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 0.5, "name": "值"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in run.metrics()] == [1, 2, 3]
    run.rewind(2)
    run.log({"step": 3})
    assert [record["step"] for record in run.metrics()] == [1, 2, 3]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnoise\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not JSON"):
        run.metrics()


def test_final_is_what_the_run_left(tmp_path: Path):
    run = Run.create(tmp_path, {})
    with pytest.raises(RunError, match="--resume"):
        _ = run.final
    run.model.mkdir()
    assert run.final == tmp_path / "model"


def test_write_atomic_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, "一")
    assert path.read_text(encoding="utf-8") == "一"

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"file\.json: the disk is full: 5 bytes needed, \d+ bytes free"):
        write_atomic(path, b"12345")
    assert path.read_text(encoding="utf-8") == "一"
    assert [file.name for file in path.parent.iterdir()] == ["file.json"], "no temporary file is left"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_metrics_is_named(tmp_path: Path):
    run = Run.create(tmp_path, {})
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match="the disk is full"):
        run.log({"step": 1})


def test_files_get_the_ordinary_permissions(tmp_path: Path):
    write_atomic(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
