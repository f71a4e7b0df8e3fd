"""runs: no run is overwritten by accident, its files are whole or absent, and its metrics survive a kill."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from weitiao.errors import InputError, RunError
from weitiao.machine import lock
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
    with pytest.raises(InputError, match="--resume"):
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


# ---- one trainer at a time

HOLD = """
import sys, time
from weitiao.runs import Run
with Run(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_trainer_is_refused_by_name_and_a_killed_one_holds_nothing(tmp_path: Path):
    run = Run.create(tmp_path / "run", {})
    with subprocess.Popen([sys.executable, "-c", HOLD, run.path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        try:
            with pytest.raises(RunError, match=rf"process {other.pid} on {socket.gethostname()}"), run.locked():
                pass
        finally:
            other.kill()
    with run.locked(), run.locked(), pytest.raises(RunError, match=f"process {os.getpid()} "), Run(run.path).locked():
        pass
    assert not (run.path / ".lock").exists()


@pytest.mark.parametrize("locks", ["none", "granted to everybody"])
def test_where_the_file_system_has_no_locks_the_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
):
    monkeypatch.setattr(lock, "_lock", lambda handle: None if locks == "none" else True)
    run = Run.create(tmp_path, {})
    with run.locked(), pytest.raises(RunError, match=f"process {os.getpid()}"), Run(tmp_path).locked():
        pass
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": 1.0, "since": "then"}  # an earlier process's
    (tmp_path / ".lock").write_text(json.dumps(mine))
    with run.locked():
        pass
    (tmp_path / ".lock").write_text(json.dumps(mine | {"host": "elsewhere"}))
    if locks == "none":
        with pytest.raises(RunError, match=r"on elsewhere.*\n.*remove .*\.lock"), run.locked():
            pass
    else:
        with run.locked():
            pass


def test_an_overwrite_that_is_cut_off_leaves_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run.create(tmp_path, {"output": "x"})
    run.checkpoints.mkdir()

    def cut(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        run.clear()
    assert is_run(tmp_path), "what is half removed is not taken for an empty folder"
