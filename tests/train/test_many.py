"""Several processes: the steps of one, whatever happens to one of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from tests.train import several
from tests.train.support import losses
from weitiao.data.batch import deal, plan_epoch
from weitiao.errors import InputError, RunError
from weitiao.machine.ranks import Ranks, joined, launched, unheard
from weitiao.methods.io import open_model
from weitiao.recipe import Recipe, check
from weitiao.recipe import run as run_recipe
from weitiao.runs import Run
from weitiao.train import checkpoint, many, together
from weitiao.train.options import TrainOptions

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 900  # of a command, on a machine that is busy with others
ENDS = 1e-6  # relative difference of losses in float32


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def torchrun(processes: int, *words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *words]


def launch(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(processes, "-m", *words), env=environment(), text=True, capture_output=True, timeout=LONGEST_SECONDS
    )


pytestmark = pytest.mark.timeout(LONGEST_SECONDS)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs by two processes."""
    folder = tmp_path_factory.mktemp("two")
    cases = [case for case in several.CASES if not case.startswith("again")]
    done = launch(2, "tests.train.several", str(folder), *cases, "again-dropout-ddp=stopped-dropout-ddp")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same runs by one process, each when it is first asked for."""
    folder = tmp_path_factory.mktemp("one")

    def found(method: dict[str, Any], engine: str) -> Path:
        path = folder / f"{method['name']}-{engine}"
        if not path.exists():
            several.run(path, Ranks(), method, engine=engine)
        return path

    return found


def alike(path: Path, other: Path) -> None:
    """The same losses, validations and weights, up to the last bits of sums."""
    mine, theirs = Run.open(path).metrics(), Run.open(other).metrics()
    assert losses(Run.open(path)) == pytest.approx([line["loss"] for line in theirs if "loss" in line], rel=ENDS)
    for name in ("tokens", "trained_tokens", "learning_rate"):
        assert [line[name] for line in mine if name in line] == [line[name] for line in theirs if name in line]
    for name in ("loss", "drawn", "logit"):
        ours, others = (
            [line["validation"][name] for line in lines if "validation" in line] for lines in (mine, theirs)
        )
        assert ours == pytest.approx(others, rel=10 * ENDS) and len(ours) == 2
    one, two = (torch.load(folder / "weights.pt", weights_only=True) for folder in (path, other))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["full-ddp", "lora-ddp", "full-fsdp2", "lora-fsdp2"])
def test_two_processes_take_the_steps_of_one(two, one, case):
    engine = "plain" if case.endswith("fsdp2") else "auto"
    alike(two / case, one(several.CASES[case]["method"], engine))


@pytest.mark.parametrize("method", [several.FULL, several.LORA], ids=["full", "lora"])
def test_shards_in_bfloat16_differ_by_its_rounding(two, tmp_path, method):
    several.run(tmp_path / "one", Ranks(), method, dtype="bfloat16", engine="plain")
    run, alone = Run.open(two / f"{method['name']}-fsdp2-bf16"), Run.open(tmp_path / "one")
    assert losses(run) == pytest.approx(losses(alone), rel=2e-3)


def test_what_breaks_in_one_process_is_skipped_by_all_and_computed_again(two, one):
    lines = [line for line in Run.open(two / "broken-ddp").metrics() if "loss" in line]
    assert [(line["loss"], line["skipped"]) for line in lines if "skipped" in line] == [("NaN", "not a finite number")]
    assert [line["loss"] for line in lines if "skipped" not in line] == pytest.approx(
        losses(Run.open(one(several.LORA, "auto"))), rel=ENDS
    )


def test_two_processes_that_were_stopped_go_on_bit_for_bit(two):
    """One of them was told to stop; both did, after the same step. Each has its own dropout, and goes on with it."""
    stopped, straight = Run.open(two / "stopped-dropout-ddp"), Run.open(two / "dropout-ddp")
    assert losses(stopped) == losses(straight)
    assert (stopped.path / "weights.pt").read_bytes() == (straight.path / "weights.pt").read_bytes()


def test_shards_are_a_checkpoint_like_any_other(two, tmp_path):
    """Sealed, without a pickle, read whole by one process; and no checkpoint once a byte has changed."""
    run = Run.open(two / "stopped-fsdp2")
    path, _ = checkpoint.newest(run.checkpoints)
    assert path and {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    state = checkpoint.load(path)
    weights = torch.load(run.path / "weights.pt", weights_only=True)  # as they were when it stopped
    assert all(torch.equal(state.parameters[name], weights[name]) for name in weights)
    shutil.copytree(run.checkpoints, tmp_path / "checkpoints")
    shard = next((tmp_path / "checkpoints" / path.name).glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert checkpoint.newest(tmp_path / "checkpoints")[0] is None


def test_shards_of_two_go_on_in_one_process_and_in_three(two, one, tmp_path):
    for name in ("2-1-3", "2-3", "2-3-ddp"):
        shutil.copytree(two / "stopped-fsdp2", tmp_path / name)
    several.run(tmp_path / "2-1-3", Ranks(), several.FULL, engine="plain", resume=True, stop_at=5)
    assert len(losses(Run.open(tmp_path / "2-1-3"))) == 5  # of eight
    words = ("again-fsdp2=2-1-3", "again-fsdp2=2-3", "again-ddp=2-3-ddp")
    done = launch(3, "tests.train.several", str(tmp_path), *words)
    assert done.returncode == 0, done.stderr
    assert "not as before: processes 2 → 3; the last bits may differ" in done.stderr
    for name in ("2-1-3", "2-3", "2-3-ddp"):
        alike(tmp_path / name, one(several.FULL, "plain"))


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command line of ten steps."""
    rows = tmp_path / "rows.jsonl"
    talks = (
        [("user", f"{number} " * (number % 7 + 1)), ("assistant", "yes " * (number % 5 + 1))] for number in range(40)
    )
    messages = ({"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks)
    rows.write_text("".join(json.dumps(row) + "\n" for row in messages), encoding="utf-8")
    options = "epochs=2 batch_size=8 save_every=2 evaluate_every=none engine=plain epsilon=1e-5".split()
    fixed = [f"data.train={rows}", "data.validation=null", "model.dtype=float32", f"output={tmp_path / 'run'}"]
    return [*fixed, *(f"train.{option}" for option in options)]


def children(process: subprocess.Popen[str], rank: int) -> Iterator[psutil.Process]:
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            yield child


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LONGEST_SECONDS
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_processes_that_are_started_anew_go_on_from_the_newest_checkpoint(words, tmp_path):
    full = [*words, "method.name=full"]
    command = torchrun(2, "--max-restarts", "1", "-m", "weitiao", "train", *full, "train.distributed=fsdp2")
    with subprocess.Popen(command, env=environment(), text=True, stderr=subprocess.PIPE) as process:
        until(lambda: steps(tmp_path / "run") >= 4, process)
        for child in children(process, 1):
            child.kill()
        _, said = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 0, said
    assert said.count("error: ") == said.count("error: another of the 2 processes has ended") == 1
    assert "torchrun has started the processes anew; going on with" in said and "going on from" in said
    run = Run.open(tmp_path / "run")
    assert [line["step"] for line in run.metrics()] == list(range(1, 11))
    values = dict(word.split("=", 1) for word in full)
    values = {**values, "output": str(tmp_path / "alone")}
    recipe = Recipe.model_validate(nested(values))
    alone = run_recipe(recipe).run
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    ours, theirs = (open_model(path, "float32").model.state_dict() for path in (run.path, alone.path))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)


def nested(values: dict[str, str]) -> dict[str, Any]:
    from weitiao.config import read

    return read({}, [f"{key}={value}" for key, value in values.items()]).values


def test_a_process_that_does_not_answer_is_not_waited_for(words, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "weitiao", "train", *words, "train.epochs=2000", "train.process_timeout=60"]
    processes = [
        subprocess.Popen(
            command,
            env=environment(**address, RANK=str(rank), LOCAL_RANK=str(rank)),
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        until(lambda: steps(tmp_path / "run") >= 1, processes[0])
        processes[1].send_signal(signal.SIGSTOP)
        _, said = processes[0].communicate(timeout=LONGEST_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1
    assert "error: another of the 2 processes has ended, or has not answered for 60 s" in said


def test_rows_that_do_not_divide_are_one_error(words, tmp_path):
    done = launch(2, "weitiao", "train", *words, "train.batch_size=7")
    assert done.returncode == 1  # torchrun's
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: train.batch_size: the 7 rows of a step do not divide among 2 processes; take 6, say",
    ]
    assert not (tmp_path / "run").exists()


# ---- what needs no second process ----------------------------------------------------------------------------------


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_processes_are_those_of_torchrun():
    assert launched({}) == Ranks() and launched(TORCHRUN) == Ranks(1, 2, 1, started=True)
    with pytest.raises(InputError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"):
        launched({"WORLD_SIZE": "4"})
    with pytest.raises(InputError, match="WORLD_SIZE=4 and RANK=1, but torchrun has started 2 processes"):
        launched({**TORCHRUN, "WORLD_SIZE": "4", "ROLE_WORLD_SIZE": "2"})
    with pytest.raises(InputError, match="WORLD_SIZE=two: not a number"):
        launched({**TORCHRUN, "WORLD_SIZE": "two"})


def test_more_processes_than_gpus_are_an_error_for_all_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in "01":
        for name, value in {**TORCHRUN, "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=r"than there are GPUs \(1\)") as caught, joined(10):
            pass
        assert unheard(caught.value) == (rank == "1")


def test_a_folder_that_only_the_first_machine_has_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(Ranks, "gathered", lambda self, here: [here, True, False, False])
    with pytest.raises(RunError, match="the processes 2, 3 do not see this folder"):
        together._check_seen(Ranks(0, 4), tmp_path)


def test_an_engine_that_does_not_go_with_the_processes_is_named():
    both = Ranks(0, 2, started=True)
    assert many.engine(TrainOptions(), Ranks()) == "none" and many.engine(TrainOptions(), both) == "ddp"
    assert many.engine(TrainOptions(distributed="fsdp2"), both) == "fsdp2"
    for options, ranks, words in (
        ({"distributed": "ddp"}, Ranks(), "is for processes that torchrun starts: torchrun"),
        ({"distributed": "none"}, both, "torchrun has started 2 processes"),
        ({"batch_size": 9}, Ranks(0, 4, started=True), "take 8, say"),
        ({"batch_size": 3}, Ranks(0, 4, started=True), "take 4, say"),
    ):
        with pytest.raises(InputError, match=words):
            many.engine(TrainOptions.model_validate(options), ranks)


def test_what_does_not_work_on_shards_is_refused_at_once(tmp_path):
    recipe = Recipe.model_validate(
        {
            "method": {"name": "adalora"},
            "model": {"quantize": "nf4"},
            "train": {"distributed": "fsdp2", "optimizer": "adamw8bit", "paged_optimizer": True},
            "data": {"train": "generate:x"},
            "output": str(tmp_path / "run"),
        }
    )
    with pytest.raises(InputError) as caught:
        check(recipe)
    for key in ("method.name", "model.quantize", "train.optimizer", "train.paged_optimizer"):
        assert any(problem.startswith(f"{key}: ") and "shards" in problem for problem in caught.value.problems)


@given(some.lists(some.integers(1, 500), min_size=1, max_size=40), some.integers(1, 9))
def test_rows_are_dealt_evenly(lengths, processes):
    hands = deal(range(len(lengths)), lengths, processes)
    assert sorted(row for hand in hands for row in hand) == list(range(len(lengths)))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    tokens = [sum(lengths[row] for row in hand) for hand in hands]
    assert max(tokens) - min(tokens) <= 2 * max(lengths)


@given(some.lists(some.integers(1, 60), min_size=1, max_size=40), some.integers(1, 5), some.booleans())
def test_processes_do_not_change_what_a_step_consists_of(lengths, processes, padded):
    alone = plan_epoch(lengths, 8, 100, 3, 1, padded=padded)
    shared = plan_epoch(lengths, 8, 100, 3, 1, padded=padded, processes=processes)
    assert [sorted(row for batch in step for row in batch) for step in shared] == [
        sorted(row for batch in step for row in batch) for step in alone
    ]
    assert not [step for step in shared if len(step) % processes]
