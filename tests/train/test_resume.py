"""Interrupted and resumed is uninterrupted, bit for bit; a damaged checkpoint is never trusted."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple

import pytest
import torch

from tests.train.support import losses, model_with, rows, train, weights_hash
from weitiao.errors import InputError, Interrupted, RunError
from weitiao.train import checkpoint
from weitiao.weights import folders

LORA = {"name": "lora", "rank": 4, "dropout": 0.3}
OPTIONS = {"epochs": 3, "save_every": 2, "keep": 9, "micro_batch_tokens": 40}


def stop_at(step: int):
    """A progress callable that sends Ctrl-C after ``step``."""

    def tell(record, total):
        if record["step"] == step and "loss" in record:
            os.kill(os.getpid(), 2)

    return tell


def dropping(values, dtype="float32"):
    """A model whose attention drops, too, so that every step draws random numbers."""
    model, method = model_with(values, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return model, method


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("values", [{"name": "full"}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("step", [2, 3, 7], ids=["mid epoch", "between epochs", "third epoch"])
def test_resumed_is_uninterrupted(tmp_path, values, dtype, step):
    def go(name, **more):
        return train(tmp_path / name, rows(12), values, model=dropping(values, dtype), options=OPTIONS, **more)

    more = {"validation": rows(3, seed=5)}
    _, whole, straight = go("straight", **more)
    with pytest.raises(Interrupted):
        go("broken", progress=stop_at(step), **more)
    done, pieced, broken = go("broken", resume=True, **more)
    assert losses(broken) == losses(straight) and done.steps == 9
    assert weights_hash(pieced) == weights_hash(whole)
    kept = ("step", "validation")
    lines = [[{key: line.get(key) for key in kept} for line in run.metrics()] for run in (straight, broken)]
    assert lines[0] == lines[1]


def test_packing_resumes_too(tmp_path):
    task = {"name": "pretrain", "pack_tokens": 12}
    _, whole, straight = train(tmp_path / "a", rows(20), task=task, options=OPTIONS)
    with pytest.raises(Interrupted):
        train(tmp_path / "b", rows(20), task=task, options=OPTIONS, progress=stop_at(11))
    _, pieced, broken = train(tmp_path / "b", rows(20), task=task, options=OPTIONS, resume=True)
    assert losses(broken) == losses(straight) and weights_hash(pieced) == weights_hash(whole)


def test_a_resumed_finished_run_does_nothing(tmp_path):
    _, model, run = train(tmp_path / "run", rows(8), validation=rows(2), options={"learning_rate": 0.3, "epochs": 4})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    done, again, _ = train(
        tmp_path / "run", rows(8), validation=rows(2), options={"learning_rate": 0.3, "epochs": 4}, resume=True
    )
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert done.history == [] and weights_hash(again) == weights_hash(model)


def test_resuming_without_a_checkpoint_begins_anew(tmp_path):
    _, whole, run = train(tmp_path / "run", rows(8))
    shutil.rmtree(run.checkpoints)
    _, again, _ = train(tmp_path / "run", rows(8), resume=True)
    assert weights_hash(again) == weights_hash(whole) and len(losses(run)) == 4


def test_other_rows_or_options_are_named(tmp_path):
    train(tmp_path / "run", rows(8))
    with pytest.raises(InputError) as raised:
        train(tmp_path / "run", rows(9), options={"learning_rate": 0.5}, resume=True)
    assert {"rows=8", "learning_rate=0.001"} <= {word for line in raised.value.problems for word in line.split()} | {
        word.rstrip(",") for line in raised.value.problems for word in line.split()
    }


FAULTS = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "last bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 128])),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "name", ["parameters.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json"]
)
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path, name, fault):
    state = checkpoint.State(1, {"w": torch.ones(3)}, {}, checkpoint.random_state(), {}, {"best": None})
    first = checkpoint.save(tmp_path, state)
    state.step = 2
    second = checkpoint.save(tmp_path, state)
    FAULTS[fault](second / name)
    path, skipped = checkpoint.newest(tmp_path)
    assert path == first and len(skipped) == 1 and name in skipped[0] and str(second) in skipped[0]
    with pytest.raises(RunError, match=name):
        checkpoint.load(second)


def test_every_bit_of_a_manifest_counts(tmp_path):
    path = checkpoint.save(tmp_path, checkpoint.State(1, {}, {}, {}, {}, {}))
    manifest = path / folders.MANIFEST
    written = manifest.read_bytes()
    for place in range(0, len(written) * 8, 13):
        byte = written[place // 8] ^ (1 << place % 8)
        manifest.write_bytes(written[: place // 8] + bytes([byte]) + written[place // 8 + 1 :])
        assert folders.problems(path)


def test_all_damaged_is_an_error_that_says_why(tmp_path):
    _, _, run = train(tmp_path / "run", rows(8))
    for path in checkpoint.listed(run.checkpoints):
        (path / "state.json").unlink()
    with pytest.raises(RunError, match=r"state\.json: missing"):
        train(tmp_path / "run", rows(8), resume=True)


def test_a_full_disk_is_refused_beforehand_with_the_bytes_needed(tmp_path, monkeypatch):
    state = checkpoint.State(1, {"w": torch.ones(1000)}, {}, {}, {}, {})
    usage = namedtuple("usage", "total used free")(0, 0, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=rf"{4000 + folders.ROOM_BYTES} bytes needed, 100 bytes free"):
        checkpoint.save(tmp_path, state)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch):
    state = checkpoint.State(1, {"w": torch.ones(1000)}, {}, {}, {}, {})
    first = checkpoint.save(tmp_path, state)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    state.step = 2
    with pytest.raises(RunError, match="bytes needed"):
        checkpoint.save(tmp_path, state)
    assert list(tmp_path.iterdir()) == [first] and not folders.problems(first)


def test_a_disk_too_full_to_remove_an_old_checkpoint_ends_no_run(tmp_path, monkeypatch, capsys):
    real, refused = os.replace, []

    def replace(source, target):
        if str(target).endswith(".old.tmp") and len(refused) < 2:  # found by trial 40 of the second start of soak-disk
            refused.append(target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    done, _, run = train(tmp_path / "run", rows(12), options={"save_every": 1, "keep": 1, "epochs": 2})
    assert done.steps == 6 and len(refused) == 2
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000006"]
    assert "step-00000001: an old checkpoint stays" in capsys.readouterr().err


def test_a_disk_too_full_for_the_runs_folder_is_said_with_the_bytes(tmp_path, monkeypatch):
    def mkdir(*args, **options):  # found by trial 130 of the third start of soak-disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(RunError, match=r"the disk is full: 4096 bytes needed, \d+ bytes free"):
        train(tmp_path / "run", rows(4))


def test_what_a_killed_save_left_is_swept(tmp_path):
    (tmp_path / "run" / "checkpoints" / ".step-00000009.1.tmp").mkdir(parents=True)
    _, _, run = train(tmp_path / "run", rows(4))
    (run.checkpoints / ".step-00000009.1.tmp").mkdir()
    train(tmp_path / "run", rows(4), options={"epochs": 2}, resume=True)
    checkpoint.prune(run.checkpoints, 1, None)
    assert not list(run.checkpoints.glob(".*"))


def test_a_stop_within_an_evaluation_puts_it_off(tmp_path):
    options = {**OPTIONS, "best": "f1", "save_every": "none"}
    asked = []

    def measure(model):
        if tell_off and len(asked) == 1:
            os.kill(os.getpid(), 2)
        asked.append(1)
        return {"f1": weights_number(model)}

    def weights_number(model):
        return float(next(model.parameters()).detach().sum())

    tell_off = False
    straight, whole, one = train(tmp_path / "a", rows(12), options=options, evaluators={"f1": measure})
    asked.clear()
    tell_off = True
    with pytest.raises(Interrupted, match="step 6"):
        train(tmp_path / "b", rows(12), options=options, evaluators={"f1": measure})
    asked.append(1)
    asked[1:] = []  # stopped again, within the evaluation that was put off
    with pytest.raises(Interrupted, match="step 6"):
        train(tmp_path / "b", rows(12), options=options, evaluators={"f1": measure}, resume=True)
    tell_off = False
    pieced, again, other = train(tmp_path / "b", rows(12), options=options, evaluators={"f1": measure}, resume=True)
    assert (pieced.best_step, pieced.best_metric) == (straight.best_step, straight.best_metric)
    assert weights_hash(again) == weights_hash(whole) and losses(one) == losses(other)
    measured = [[line["validation"] for line in run.metrics() if "validation" in line] for run in (one, other)]
    assert measured[0] == measured[1]


def test_a_damaged_best_is_said_and_the_last_taken(tmp_path, capsys):
    options = {"epochs": 3, "best": "f1", "keep": 1}
    values = iter([0.1, 0.9, 0.3])
    _, _, run = train(tmp_path / "run", rows(8), options=options, evaluators={"f1": lambda model: {"f1": next(values)}})
    (run.checkpoints / "step-00000004" / "parameters.safetensors").unlink()
    done, model, _ = train(tmp_path / "run", rows(8), options=options, resume=True)
    last = checkpoint.load(run.checkpoints / "step-00000006").parameters
    assert done.best_step is None and all(torch.equal(last[name], value) for name, value in model.named_parameters())
    assert "parameters.safetensors: missing" in capsys.readouterr().err


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_step_one(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 3 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=rf"no room for this run: (\d+) bytes needed, {3 << 20} bytes free") as raised:
        train(tmp_path / "run", rows(12), options={"save_every": 1, "keep": 5})
    monkeypatch.undo()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    _, _, run = train(tmp_path / "run", rows(12), options={"save_every": 1, "keep": 5})
    written = sum(file.stat().st_size for path in checkpoint.listed(run.checkpoints) for file in path.iterdir())
    needed = int(str(raised.value).split(" bytes needed")[0].split()[-1])
    assert written <= needed <= 6 / 5 * written + 6 * folders.ROOM_BYTES, "five kept and one being written"


def test_changes_go_on_only_when_allowed_and_are_said(tmp_path, capsys):
    train(tmp_path / "run", rows(8))
    done, _, run = train(tmp_path / "run", rows(8), options={"epochs": 4}, resume=True, allow_changes=True)
    assert done.steps == 8 and len(losses(run)) == 8
    assert "total_steps=4, and now it is 8" in capsys.readouterr().err
    options = {"epochs": 6, "optimizer": "lion"}
    done, _, _ = train(tmp_path / "run", rows(8), options=options, resume=True, allow_changes=True)
    assert done.steps == 12, "another optimiser begins anew"


def test_another_machine_is_named(tmp_path, monkeypatch, capsys):
    from weitiao.train import recovery

    train(tmp_path / "run", rows(8))
    monkeypatch.setattr(recovery, "machine_facts", lambda processes: {"torch": "0.1", "threads": 1, "cpu": "abacus"})
    train(tmp_path / "run", rows(8), resume=True)
    said = capsys.readouterr().err
    assert f"torch {torch.__version__} → 0.1" in said and "→ abacus" in said
