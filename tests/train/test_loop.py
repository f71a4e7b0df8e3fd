"""The loop: invariances, what is logged, what is kept, what is refused."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.train.support import losses, method_of, model_with, rows, train, weights_hash
from weitiao.data.batch import Example, collate
from weitiao.errors import InputError, Interrupted, RunError
from weitiao.models import modules, tiny
from weitiao.train import checkpoint

KEYS = {"step", "epoch", "loss", "tokens", "trained_tokens", "seconds", "learning_rate", "grad_norm"}


def test_logged_lines(tmp_path):
    examples = rows(10)
    done, _, run = train(tmp_path / "run", examples, validation=rows(3, seed=9))
    lines = run.metrics()
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 7)) and done.steps == 6
    assert all(set(line) == KEYS for line in steps)
    assert steps[2]["epoch"] == 1.0 and steps[0]["epoch"] == pytest.approx(1 / 3)
    assert sum(line["tokens"] for line in steps[:3]) == sum(len(example) for example in examples)
    assert sum(line["trained_tokens"] for line in steps[:3]) == sum(example.trained_tokens for example in examples)
    assert [line["step"] for line in lines if "validation" in line] == [3, 6]
    assert done.history == lines


def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_step(tmp_path):
    examples = rows(4)
    _, _, run = train(tmp_path / "run", examples, options={"max_steps": 1, "micro_batch_tokens": 30})
    batch = collate(examples, 0)
    logits = tiny.make("llama").float()(input_ids=batch.ids).logits[:, :-1].flatten(0, 1)
    labels = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100).flatten()
    assert losses(run)[0] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("values", [{"name": "full"}, {"name": "lora"}], ids=["full", "lora"])
def test_how_a_step_is_cut_changes_nothing(tmp_path, values):
    examples = rows(16)
    runs = [
        train(tmp_path / str(tokens), examples, values, options={"batch_size": 8, "micro_batch_tokens": tokens})
        for tokens in (1, 60, 10_000)  # 1 × 8, some, 8 × 1
    ]
    for done, model, run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0][2]), rel=1e-4)
        norms = [line["grad_norm"] for line in done.history if "grad_norm" in line]
        assert norms == pytest.approx(
            [line["grad_norm"] for line in runs[0][0].history if "grad_norm" in line], rel=1e-3
        )
        for one, other in zip(model.parameters(), runs[0][1].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-4)


def test_recomputing_changes_nothing(tmp_path):
    ways = [train(tmp_path / way, rows(8), {"name": "lora"}, options={"memory": way}) for way in ("low", "fast")]
    assert losses(ways[0][2]) == pytest.approx(losses(ways[1][2]), rel=1e-6)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in ways[0][1].modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_as_many_blocks_are_computed_again_as_asked_for(tmp_path, family, number):
    """Of two; a block is told to compute again while it runs."""
    told = []
    model, method = model_with({"name": "full"}, family)
    for layer in modules.blocks(model):
        layer.register_forward_pre_hook(lambda layer, _: told.append(layer.gradient_checkpointing))
    options = {"max_steps": 1, "batch_size": 2, "evaluate_every": "none"}
    train(tmp_path / "run", rows(2), model=(model, method), options=options, recomputed=number)
    assert told[:2] == [True] * number + [False] * (2 - number)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [({"name": "full"}, "float32"), ({"name": "full"}, "bfloat16"), ({"name": "lora", "rank": 32}, "bfloat16")],
    ids=["full", "full bf16", "lora bf16"],
)
def test_learns_eight_rows_by_heart(tmp_path, values, dtype):
    options = {"epochs": 60, "batch_size": 8, "learning_rate": 1e-2, "schedule": "constant", "save_every": "none"}
    base, method = tiny.make("llama", initializer_range=0.2).to(getattr(torch, dtype)), method_of(values)
    base.config.dtype = getattr(torch, dtype)  # larger weights: a frozen head must be able to point at one token
    _, model, run = train(tmp_path / "run", rows(8), model=(method.attach(base), method), options=options)
    assert losses(run)[-1] < 0.2 < losses(run)[0]
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_packed_documents_lose_no_token(tmp_path):
    examples = [Example(row.ids, np.ones(len(row), bool), row.id) for row in rows(20)]
    task = {"name": "pretrain", "pack_tokens": 16}
    total = sum(len(example) for example in examples)
    done, _, run = train(tmp_path / "run", examples, task=task, options={"epochs": 1})
    assert sum(line["tokens"] for line in run.metrics() if "loss" in line) in (total, total - 1)
    assert done.steps == math.ceil(math.ceil(total / 16) / 4) or total % 16 == 1


def test_the_best_weights_are_what_is_left(tmp_path):
    seen = []

    def measure(model):
        assert not model.training and not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(1)
        model.train()  # what an evaluator does to the mode is undone
        seen.append(weights_hash(model))
        return {"f1": [0.1, 0.9, 0.3][len(seen) - 1]}

    options = {"epochs": 3, "best": "f1", "keep": 1}
    done, model, run = train(tmp_path / "run", rows(8), options=options, evaluators={"dialogue": measure})
    assert (done.best_step, done.best_metric) == (4, 0.9)
    assert weights_hash(model) == seen[1]
    assert [path.name for path in checkpoint.listed(run.checkpoints)] == ["step-00000004", "step-00000006"]
    assert checkpoint.best(run.checkpoints) == run.checkpoints / "step-00000004"
    _, _, plain = train(tmp_path / "plain", rows(8), options={"epochs": 3})
    assert losses(run) == losses(plain)  # evaluation drew random numbers, and training saw none of it


def test_an_unknown_best_measure_is_named(tmp_path):
    with pytest.raises(InputError, match=r"train.best.*\"f1\" \(loss\)"):
        train(tmp_path / "run", rows(8), options={"best": "f1"}, validation=rows(2))


def test_cadence_by_steps(tmp_path):
    options = {"epochs": 3, "evaluate_every": 2, "save_every": 5, "best": None, "keep": 9}
    _, _, run = train(tmp_path / "run", rows(12), options=options, validation=rows(2))
    assert [line["step"] for line in run.metrics() if "validation" in line] == [2, 4, 6, 8, 9]
    assert [path.name[-1] for path in checkpoint.listed(run.checkpoints)] == ["5", "9"]


def test_rows_without_a_trained_token_are_refused_before_step_one(tmp_path):
    bad = Example(np.array([5, 6, 7], np.int32), np.array([True, False, False]), "data.jsonl:3")
    with pytest.raises(InputError, match=r"1 row have no token to train on: data.jsonl:3"):
        train(tmp_path / "run", [*rows(3), bad])


def test_an_encoder_is_refused(tmp_path):
    with pytest.raises(InputError, match="causal"):
        train(tmp_path / "run", rows(3), model=model_with({"name": "full"}, family="bert"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_poisoned_step_changes_nothing(tmp_path, where, monkeypatch):
    from weitiao.train import logps

    real, calls, hashes = logps.token_logps, [], []

    def poisoned(model, *rest):
        calls.append(1)
        hashes.append(weights_hash(model))
        found = real(model, *rest)
        if len(calls) == 2:
            if where == "gradient":
                found.register_hook(lambda grad: grad * math.nan)
                return found
            return found * math.inf
        return found

    monkeypatch.setattr(logps, "token_logps", poisoned)
    done, _, run = train(tmp_path / "run", rows(8), options={"micro_batch_tokens": 4096})
    second = run.metrics()[1]
    assert hashes[1] == hashes[2] != hashes[3] and done.steps == 4
    assert second["loss" if where == "loss" else "grad_norm"] in ("NaN", "Infinity")
    json.loads((run.path / "metrics.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_three_poisoned_steps_in_a_row_end_the_run(tmp_path):
    model, method = model_with({"name": "full"})
    with torch.no_grad():
        next(model.parameters())[7] = math.nan
    examples = [Example(np.array([7, 8, 9], np.int32), np.ones(3, bool), f"f.jsonl:{n}") for n in range(12)]
    with pytest.raises(RunError, match=r"3 steps in a row.*f.jsonl:\d"):
        train(tmp_path / "run", examples, model=(model, method))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_with_a_checkpoint(tmp_path, number):
    before = signal.getsignal(number)

    def tell(record, total):
        assert total == 6
        if record["step"] == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=r"step 2; go on with: weitiao train --resume .*run"):
        train(tmp_path / "run", rows(12), progress=tell)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name == "step-00000002"
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    def tell(record, total):
        signal.raise_signal(signal.SIGINT)  # to this thread, so that the two cannot become one
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins by ignoring it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", rows(12), progress=tell)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_runs_in_a_thread_without_handlers(tmp_path):
    result = []
    thread = threading.Thread(target=lambda: result.append(train(tmp_path / "run", rows(4))[0]))
    thread.start()
    thread.join()
    assert result[0].steps == 2
