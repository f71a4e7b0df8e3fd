"""The frozen trunk: the same bits with it as without, and when its file is made anew, taken up or left away."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from tests.train.support import losses, model_with, rows, train, weights_hash
from weitiao.errors import Interrupted
from weitiao.models import products, whole
from weitiao.models.block import without_padding
from weitiao.train import trunk
from weitiao.train.trunk import FACTS, FOLDER, STATES

FREEZE = {"name": "freeze", "blocks": 1}
OPTIONS = {"epochs": 3}
DTYPES = ["float32", *(["bfloat16"] if products.available(torch.bfloat16) else [])]

pytestmark = pytest.mark.skipif(not without_padding(torch.float32), reason="no compiled kernels")


@pytest.fixture
def counted(monkeypatch):
    """Tokens that each pass through a block had."""
    seen, run = [], whole.run
    monkeypatch.setattr(whole, "run", lambda hidden, **rest: seen.append(len(hidden)) or run(hidden, **rest))
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [FREEZE, FREEZE | {"norms": False}, {"name": "expand", "blocks": 1}], ids=str)
def test_kept_states_change_nothing(tmp_path, counted, values, dtype):
    runs = {}
    for how in ("off", "auto"):
        counted.clear()
        _, model, run = train(tmp_path / how, rows(13), values, dtype=dtype, options=OPTIONS | {"trunk": how})
        runs[how] = losses(run), weights_hash(model), sum(counted)
    (slow, before, all_tokens), (quick, after, tokens) = runs["off"], runs["auto"]
    if dtype == "bfloat16":  # a row's products do not depend on the rows beside it; torch's in float32 do
        assert quick == slow and after == before
    assert quick == pytest.approx(slow, rel=1e-5)
    assert tokens < all_tokens
    assert not (tmp_path / "auto" / FOLDER).exists()


def test_it_is_left_away_where_something_below_trains_or_nothing_comes_again(tmp_path, counted):
    cases = [({"name": "full"}, OPTIONS), ({"name": "lora"}, OPTIONS), (FREEZE, {"epochs": 1})]
    cases.append((FREEZE | {"embeddings": True}, OPTIONS))
    for number, (values, options) in enumerate(cases):
        counted.clear()
        train(tmp_path / str(number), rows(6), values, options=options)
        with_it = sum(counted)
        counted.clear()
        train(tmp_path / f"{number} off", rows(6), values, options=options | {"trunk": "off"})
        assert with_it == sum(counted)


def test_a_disk_without_room_is_said(tmp_path, monkeypatch, capsys, counted):
    monkeypatch.setattr(trunk, "SHARE", 0.0)
    train(tmp_path / "run", rows(6), FREEZE, options=OPTIONS)
    assert "MiB" in capsys.readouterr().err and not (tmp_path / "run" / FOLDER).exists()


def interrupted(folder, examples):
    """A run that is stopped in its third epoch; what it would have come to."""
    whole_run = train(folder / "whole", examples, FREEZE, options=OPTIONS)[2]
    stop = lambda record, total: os.kill(os.getpid(), signal.SIGINT) if record["step"] == 7 else None  # noqa: E731
    with pytest.raises(Interrupted):
        train(folder / "run", examples, FREEZE, options=OPTIONS | {"save_every": 1}, progress=stop)
    return losses(whole_run), folder / "run" / FOLDER


@pytest.mark.parametrize("damage", [None, "truncated", "other facts", "gone"])
def test_a_resumed_run_takes_up_what_is_whole(tmp_path, counted, damage):
    examples = rows(12)
    wanted, kept = interrupted(tmp_path, examples)
    assert (kept / STATES).is_file() and (kept / FACTS).is_file()
    if damage == "truncated":
        os.truncate(kept / STATES, 100)
    if damage == "other facts":
        (kept / FACTS).write_text(json.dumps({"digest": "other"}), encoding="utf-8")
    if damage == "gone":
        (kept / STATES).unlink()
    counted.clear()
    _, model, run = train(tmp_path / "run", examples, FREEZE, options=OPTIONS | {"save_every": 1}, resume=True)
    assert losses(run) == pytest.approx(wanted, rel=1e-5) and not kept.exists()
    blocks = len(model.model.layers)
    lengths = sum(map(len, examples))
    left = 2 * lengths // 3  # two of the last epoch's three steps are still to go, more or less
    assert (sum(counted) < 0.9 * blocks * left) == (damage is None)


@pytest.mark.parametrize("change", ["weights", "rows", "code"])
def test_the_digest_is_of_all_that_the_states_depend_on(tmp_path, monkeypatch, change):
    from weitiao.train.course import Course
    from weitiao.train.options import TrainOptions
    from weitiao.train.tasks import TaskOptions

    def found(seed: int = 0, drawn: int = 0) -> str:
        model, _ = model_with(FREEZE, seed=seed)
        course = Course(rows(8, seed=drawn), TaskOptions().build(), TrainOptions(), False)
        return trunk.digest(model, 1, course)

    first = found()
    assert first == found()
    if change == "code":
        monkeypatch.setattr(trunk.kernels, "source", lambda: "another")
    assert first != found(seed=change == "weights", drawn=change == "rows")
