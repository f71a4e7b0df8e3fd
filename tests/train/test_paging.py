"""Paged state: the same bits as unpaged for every optimiser, across checkpoints too, and no file left behind."""

from __future__ import annotations

import errno
import os
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

from tests.train.support import losses, model_with, rows, train, weights_hash
from tests.train.test_resume import stop_at
from weitiao import machine
from weitiao.errors import InputError, Interrupted, RunError
from weitiao.recipe import Recipe, check
from weitiao.train import checkpoint, paging
from weitiao.train.optim import OPTIMIZERS, build
from weitiao.train.options import TrainOptions
from weitiao.train.paging import Home, Paged, home_bytes

PAGED = [name for name in OPTIMIZERS if name != "adafactor"]
OPTIONS = {"epochs": 2, "save_every": 2, "keep": 9}
SHAPES = [(64, 128), (100, 77), (128,), (3, 5, 7)]


def pair(name: str, device: str = "cpu"):
    """Two optimisers over copies of the same parameters."""
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]
    found = []
    for _ in range(2):
        parameters = [torch.nn.Parameter(tensor.to(device, copy=True)) for tensor in start]
        groups = [
            {"params": parameters[:1], "lr": 0.01, "linear": True},
            {"params": parameters[1:], "lr": 0.02, "weight_decay": 0.0},
        ]
        settings = {"learning_rate": 0.01, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}
        found.append((parameters, build(name, groups, **settings)))
    return found


def walk_together(name: str, paged_of, device: str = "cpu") -> Paged:
    """Six steps of both, the second parameter without a gradient in one; weights and state must agree in every bit."""
    (ours, plain), (theirs, optimizer) = pair(name, device)
    paged, draw = paged_of(optimizer), torch.Generator().manual_seed(1)
    for step in range(6):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            grad = None if (step, number) == (2, 1) else torch.randn(one.shape, generator=draw).to(device)
            one.grad, other.grad = grad, None if grad is None else grad.clone()
        plain.step()
        paged.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) and plain.state[one].keys() == optimizer.state[other].keys()
        for kind, tensor in plain.state[one].items():
            assert torch.equal(tensor.cpu(), optimizer.state[other][kind].cpu())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
    return paged


@pytest.mark.parametrize("name", PAGED)
def test_state_in_a_file_changes_no_bit(name: str, tmp_path: Path):
    paged = walk_together(name, lambda optimizer: Paged.of(optimizer, name, tmp_path))
    assert paged.home.used == paged.size  # what is taken from the disk is exactly what is needed


@pytest.mark.parametrize("name", PAGED)
def test_state_that_is_copied_in_and_out_changes_no_bit(name: str):
    """The way of a GPU, with both ends in memory."""

    def of(optimizer: torch.optim.Optimizer) -> Paged:
        return Paged(optimizer, Home(torch.empty(home_bytes(name, optimizer.param_groups), dtype=torch.uint8)), True)

    paged = walk_together(name, of)
    inside = range(paged.home.memory.data_ptr(), paged.home.memory.data_ptr() + paged.size)
    for state in paged.optimizer.state.values():
        assert all(tensor.data_ptr() in inside for tensor in state.values() if tensor.ndim)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PAGED)
def test_state_in_the_host_s_memory_changes_no_bit(name: str, tmp_path: Path):
    paged = walk_together(name, lambda optimizer: Paged.of(optimizer, name, tmp_path), "cuda")
    assert paged.copies and paged.home.memory.is_pinned()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_a_page_that_rests_leaves_memory_and_keeps_its_bytes(tmp_path: Path):
    home = Home.file(tmp_path, 16 << 20)
    tensor = home.place(torch.empty(4 << 20))
    home.rest(tensor.fill_(3.0))
    held = psutil.Process().memory_info().rss
    assert tensor.sum() == 3.0 * (4 << 20)
    assert psutil.Process().memory_info().rss - held > 12 << 20
    home.rest(tensor)
    assert psutil.Process().memory_info().rss - held < 4 << 20
    home.rest(torch.ones(3))  # a tensor that lies elsewhere is left alone


def mapped(folder: Path) -> list[str]:
    """Mappings of files in ``folder``, nameless ones too."""
    maps = Path("/proc/self/maps")
    return [line for line in maps.read_text().splitlines() if str(folder) in line] if maps.is_file() else []


@pytest.mark.parametrize("values", [{"name": "full"}, {"name": "lora", "dropout": 0.3}], ids=["full", "lora"])
def test_a_paged_run_is_the_unpaged_one_and_leaves_no_file(values, tmp_path: Path):
    seen = []

    def look(record, total):
        seen.append(({path.name for path in (tmp_path / "paged").iterdir()}, mapped(tmp_path)))

    _, plain, straight = train(tmp_path / "plain", rows(8), values)
    done, model, run = train(tmp_path / "paged", rows(8), values, options={"paged_optimizer": True}, progress=look)
    assert losses(run) == losses(straight) and weights_hash(model) == weights_hash(plain)
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 8 * numbers <= done.paged_bytes < 8 * numbers + 128 * len(list(model.parameters()))
    names = ("parameters", "optimizer", "random", "method")
    for name in names:
        last = [path / f"{name}.safetensors" for path in (straight.checkpoints, run.checkpoints)]
        last = [sorted(path.parent.glob(f"step-*/{path.name}"))[-1].read_bytes() for path in last]
        assert last[0] == last[1]
    if sys.platform == "linux":
        assert all(files <= {"recipe.yaml", "metrics.jsonl", "checkpoints", ".lock"} and maps for files, maps in seen)
        assert not mapped(tmp_path)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("first", [True, False], ids=["paged first", "unpaged first"])
def test_a_run_may_be_resumed_the_other_way(name: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)  # several files of state

    def go(folder: str, paged: bool, **more):
        options = {**OPTIONS, "optimizer": name, "paged_optimizer": paged}
        return train(tmp_path / folder, rows(12), options=options, **more)

    _, whole, straight = go("straight", False)
    with pytest.raises(Interrupted):
        go("broken", first, progress=stop_at(3))
    assert len(list((tmp_path / "broken" / "checkpoints" / "step-00000003").glob("optimizer*"))) > 2
    assert not mapped(tmp_path)
    _, pieced, broken = go("broken", not first, resume=True)
    assert losses(broken) == losses(straight) and weights_hash(pieced) == weights_hash(whole)
    states = [checkpoint.load(sorted(run.checkpoints.iterdir())[-1]).optimizer for run in (straight, broken)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def no_room(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["asked", "taken"])
def test_a_full_disk_is_noticed_before_the_first_step(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if where == "asked":
        usage = namedtuple("usage", "total used free")(1 << 30, 1 << 30, 1000)
        monkeypatch.setattr(paging.shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr(os, "posix_fallocate", no_room, raising=False)
    model, method = model_with({"name": "full"})
    needed = 8 * sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(RunError, match=r"the disk is full: (\d+) bytes needed") as raised:
        train(tmp_path / "run", rows(8), model=(model, method), options={"paged_optimizer": True})
    said = int(raised.value.problems[0].split("full: ")[1].split()[0])
    assert needed <= said < needed * 1.05
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not mapped(tmp_path)


def test_without_fallocate_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    home = Home.file(tmp_path, (3 << 20) + 5)
    assert home.memory.numel() == (3 << 20) + 5 and not home.memory.any()


def test_an_error_takes_the_state_with_it(tmp_path: Path):
    model, method = model_with({"name": "full"})
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match="in a row") as raised:
        train(tmp_path / "run", rows(12), model=(model, method), options={"paged_optimizer": True})
    assert raised.tb and not mapped(tmp_path)  # though the traceback still holds everything else


def test_what_cannot_be_paged_is_said_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="adafactor keeps next to no state"):
        TrainOptions(optimizer="adafactor", paged_optimizer=True)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    recipe = Recipe.model_validate(
        {"data": {"train": str(tmp_path / "rows.jsonl")}, "train": {"paged_optimizer": True}, "output": "runs/x"}
    )
    monkeypatch.setattr(machine, "device", lambda: "cpu")
    monkeypatch.setattr(machine, "in_memory", lambda path: False)
    check(recipe)
    monkeypatch.setattr(machine, "in_memory", lambda path: True)
    with pytest.raises(InputError, match=r"train\.paged_optimizer: runs/x lies in memory"):
        check(recipe)
