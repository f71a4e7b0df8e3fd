"""The guard: what is no number or leaps changes nothing, rows at fault are found, and no poisoned state is kept."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch

from tests.train.support import losses, rows, train, weights_hash
from weitiao.data.batch import Example
from weitiao.errors import Interrupted, RunError
from weitiao.train import checkpoint, logps
from weitiao.train.guard import Guard

BAD = 299  # rows that hold this token have no loss


@pytest.fixture
def poisonous(monkeypatch):
    """Every batch with a bad row in it loses its loss."""
    real = logps.token_logps

    def poisoned(model, ids, *rest):
        found = real(model, ids, *rest)
        return found * math.nan if (ids == BAD).any() else found

    monkeypatch.setattr(logps, "token_logps", poisoned)


def with_bad(count: int, bad: set[int]) -> list[Example]:
    found = rows(count, vocabulary=250)
    for number in bad:
        row = found[number]
        found[number] = Example(np.append(row.ids[:-1], BAD).astype(np.int32), row.mask, row.id)
    return found


def words(row: Example) -> str:
    return " ".join(map(str, row.ids))


def test_exactly_the_rows_at_fault_are_left_out_with_their_text(tmp_path, poisonous):
    examples = with_bad(24, {3, 9, 17})
    done, model, run = train(tmp_path / "run", examples, words=words)
    left_out = [json.loads(line) for line in (run.path / "bad_rows.jsonl").read_text().splitlines()]
    assert {row["id"]: row["text"] for row in left_out} == {f"row:{n}": words(examples[n]) for n in (3, 9, 17)}
    assert {row["loss"] for row in left_out} == {"NaN"}
    skipped = [line for line in run.metrics() if "skipped" in line]
    assert 1 <= len(skipped) <= 3, "once left out, a row is never computed again"
    assert all(line["loss"] == "NaN" for line in skipped) and done.steps == 12
    assert len([line for line in run.metrics() if math.isfinite(float(line["loss"]))]) == 12, "no step is lost"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_what_is_left_out_stays_out_after_a_stop(tmp_path, poisonous):
    def stop(record, total):
        if record["step"] == 5:
            torch.manual_seed(0)
            raise Interrupted("as if killed")

    options = {"save_every": 1, "epochs": 3}
    _, whole, straight = train(tmp_path / "a", with_bad(24, {3, 9, 17}), options=options)
    with pytest.raises(Interrupted):
        train(tmp_path / "b", with_bad(24, {3, 9, 17}), options=options, progress=stop)
    _, pieced, broken = train(tmp_path / "b", with_bad(24, {3, 9, 17}), options=options, resume=True)
    assert losses(broken) == losses(straight) and weights_hash(pieced) == weights_hash(whole)
    states = [checkpoint.facts(checkpoint.listed(run.checkpoints)[-1])["guard"] for run in (straight, broken)]
    assert states[0] == states[1] and len(states[0]["rows"]) == 3


def test_stop_ends_the_run_and_names_the_file(tmp_path, poisonous):
    examples = with_bad(24, set(range(24)))
    with pytest.raises(RunError, match=r"3 steps in a row.*bad_rows\.jsonl"):
        train(tmp_path / "run", examples, options={"bad_rows": "stop"})
    assert len((tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()) == 12
    with pytest.raises(RunError):
        train(tmp_path / "other", examples)  # with no good row left there is nothing to go on with


@pytest.mark.parametrize(("place", "at"), [("weight", {5}), ("moment", {5}), ("weight", {5, 6}), ("moment", {5, 7})])
def test_poisoned_weights_lead_back_to_the_last_good_checkpoint(tmp_path, place, at):
    from weitiao.train.loop import Trainer

    chosen = {"save_every": 4, "keep": 9}
    _, whole, straight = train(tmp_path / "a", rows(24), options=chosen)
    held: list[Trainer] = []
    real = Trainer.backward

    def backward(self, *rest):
        held[:] = [self]
        return real(self, *rest)

    struck = []

    def strike(record, total):
        if record["step"] in at and record["step"] not in struck:
            struck.append(record["step"])
            parameter = next(iter(held[0].parts.parameters.values()))
            target = parameter.data if place == "weight" else held[0].optimizer.state[parameter]["exp_avg"]
            target.view(-1)[0] = math.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "backward", backward)
        _, model, run = train(tmp_path / "b", rows(24), options=chosen, progress=strike)
    assert weights_hash(model) == weights_hash(whole), "gone back, it is the run that never was struck"
    assert losses(run) == losses(straight) and set(struck) == at
    assert not (run.path / "bad_rows.jsonl").exists(), "the rows were innocent"
    assert {line["step"] for line in run.metrics() if "returned_from" in line} == {4}
    for path in checkpoint.listed(run.checkpoints):
        state = checkpoint.load(path)
        assert all(torch.isfinite(t).all() for t in (*state.parameters.values(), *state.optimizer.values()))


def test_rows_of_a_step_that_poisons_the_weights_each_time_are_left_out(tmp_path):
    from weitiao.train.loop import Trainer

    def advance(self):
        found = real(self)
        if self.step == 7 and not self.course.left_out:
            next(iter(self.parts.parameters.values())).data.view(-1)[0] = math.nan
            self.weights_norm = self.parts.norm()
        return found

    real = Trainer.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", advance)
        done, model, run = train(tmp_path / "run", rows(24), options={"save_every": 4})
    assert done.steps == 12 and all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert len((run.path / "bad_rows.jsonl").read_text().splitlines()) == 4, "those of the step"


def test_a_state_that_goes_bad_between_saves_each_time_ends_the_run(tmp_path):
    from weitiao.train.loop import Trainer

    def advance(self):
        found = real(self)
        if self.step == 7:
            next(iter(self.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = math.inf
        return found

    real = Trainer.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", advance)
        with pytest.raises(RunError, match="not finite") as caught:
            train(tmp_path / "run", rows(24), options={"save_every": 4})
    assert "rows:" not in str(caught.value) and not (tmp_path / "run" / "bad_rows.jsonl").exists()


def test_a_poisoned_state_never_becomes_a_checkpoint(tmp_path):
    for group in ("parameters", "optimizer", "method"):
        parts = {"parameters": {}, "optimizer": {}, "method": {}, group: {"w": torch.tensor([1.0, math.nan])}}
        with pytest.raises(checkpoint.Poisoned, match="w holds numbers that are not finite"):
            checkpoint.save(tmp_path, checkpoint.State(1, random={}, facts={}, **parts))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("what", "times"), [("loss", 10.0), ("gradient", 1e4)])
def test_a_leap_is_caught_once_there_is_something_to_judge_by(what, times):
    draw, guard = random.Random(0), Guard()
    for step in range(1, 60):
        assert not guard.fault(step, 2.0 + draw.gauss(0, 0.2), math.exp(draw.gauss(0, 0.5)))
    values = (2.0 * times, 1.0) if what == "loss" else (2.0, times)
    assert guard.fault(60, *values) == f"{what} spike" and guard.skipped[-1]["step"] == 60
    assert not guard.fault(61, 2.1, 1.0) and guard.streak == 0


@pytest.mark.parametrize("noise", ["normal", "two kinds of rows", "heavy", "falling", "learnt by heart", "constant"])
def test_clean_curves_raise_no_alarm(noise):
    for seed in range(30):
        draw, guard = random.Random(seed), Guard(warmup_steps=20 * (seed % 2))
        for step in range(1, 301):
            loss = {
                "normal": 2 + draw.gauss(0, 0.3),
                "two kinds of rows": draw.choice([0.1, 4.0]),
                "heavy": math.exp(draw.gauss(0, 0.5)),
                "falling": 6 * math.exp(-step / 40) + 0.2 + draw.gauss(0, 0.05),
                "learnt by heart": 5 * math.exp(-step / 10) + abs(draw.gauss(0, 0.01)),
                "constant": 1.0,
            }[noise]
            assert not guard.fault(step, loss, loss * math.exp(draw.gauss(0, 0.5))), (seed, step)


def test_the_guard_comes_back_from_json_as_it_was():
    guard = Guard(3)
    for step, loss in enumerate([3.0, 1 / 3, math.nan, 0.1], 1):
        guard.fault(step, loss, 0.7)
    assert Guard.of(json.loads(json.dumps(guard.state(), allow_nan=False))) == guard
    assert Guard.of(json.loads(json.dumps(Guard().state(), allow_nan=False))) == Guard()
