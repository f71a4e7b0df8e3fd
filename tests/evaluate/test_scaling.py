"""The law: exact where the runs follow it, banded where they do not, and refused where they cannot tell it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from weitiao import cli, sweep
from weitiao.errors import InputError
from weitiao.evaluate.scaling import Law, Point, advice, far, fit, point
from weitiao.runs import Run

LAW = Law(1.7, 400.0, 0.34, 410.0, 0.28)
SIZES, AMOUNTS = (1e5, 3e5, 1e6), (2e5, 4e5, 8e5)


def ladder(law=LAW, noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    return [
        Point(f"{n:.0f}x{d:.0f}", int(n), int(d), law(n, d) * math.exp(random.normal(0, noise)))
        for n in SIZES
        for d in AMOUNTS
    ]


@pytest.mark.parametrize("law", [LAW, Law(0.5, 30.0, 0.2, 2000.0, 0.5), Law(2.5, 8e3, 0.7, 60.0, 0.25)])
def test_runs_that_follow_a_law_give_it_back(law):
    found = fit(ladder(law), draws=10)
    assert found.law(3e6, 3e6) == pytest.approx(law(3e6, 3e6), rel=1e-4)
    assert max(map(abs, found.residuals)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_noise_widens_the_band_which_holds_the_truth(seed):
    quiet, loud = (fit(ladder(noise=noise, seed=seed)) for noise in (0.001, 0.01))
    bands = [found.predict(2e6, 1.6e6) for found in (quiet, loud)]
    assert bands[0]["high"] - bands[0]["low"] < bands[1]["high"] - bands[1]["low"]
    assert bands[1]["low"] < LAW(2e6, 1.6e6) < bands[1]["high"]
    assert fit(ladder(noise=0.01, seed=seed)).predict(2e6, 1.6e6) == bands[1]


def test_one_wild_run_does_not_move_the_law():
    points = ladder()
    points[4] = Point("wild", points[4].parameters, points[4].tokens, points[4].loss * 1.3)
    assert fit(points, draws=5).law(2e6, 1.6e6) == pytest.approx(LAW(2e6, 1.6e6), rel=0.01)


def test_the_best_split_of_compute_is_the_best():
    flops = 6 * 1e6 * 1e7
    parameters, tokens = LAW.best(flops)
    assert 6 * parameters * tokens == pytest.approx(flops)
    for factor in (0.8, 1.25):
        assert LAW(parameters * factor, tokens / factor) > LAW(parameters, tokens)


def test_where_more_pays():
    data_poor = fit(ladder(Law(1.0, 1.0, 0.3, 4e3, 0.5)), draws=5)
    model_poor = fit(ladder(Law(1.0, 4e3, 0.5, 1.0, 0.3)), draws=5)
    assert "more data pays more" in advice(data_poor)[0] and "a larger model pays more" in advice(model_poor)[0]
    assert far(data_poor, 1e8, 1e6) and not far(data_poor, 2e6, 1e6)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(InputError) as error:
        fit(ladder()[:3])
    assert len(error.value.problems) == 2  # too few runs, one size


def stand_in(folder, one: Point):
    made = Run.create(folder / one.name, {"data": {}})
    made.write("plan.json", {"parameters": one.parameters})
    half = one.tokens // 2
    made.log({"step": 1, "loss": 9.0, "tokens": half})
    made.log({"step": 1, "validation": {"loss": one.loss * 1.1}})
    made.log({"step": 2, "loss": 8.0, "tokens": one.tokens - half})
    made.log({"step": 2, "validation": {"loss": one.loss}})
    made.log({"step": 3, "loss": 8.0, "tokens": 1000})
    made.log({"step": 3, "validation": {"loss": one.loss * 1.2}})
    return str(made.path)


def test_finished_runs_from_the_command_line(tmp_path, capsys):
    folders = [stand_in(tmp_path, one) for one in ladder()]
    larger = stand_in(tmp_path, Point("larger", int(2e6), int(1.6e6), LAW(2e6, 1.6e6)))
    first = point(Run.open(folders[0]))
    assert first.tokens == int(2e5) and first.falling is not None and first.falling < 0  # up to its best validation
    words = ["--held-out", larger, "--predict", "4e6x3.2e6", "--predict", "1e9x1e9", "--output", str(tmp_path / "out")]
    assert cli.main(["scaling", *folders, *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert abs(told["held_out"][0]["error"]) < 1e-4 and len(told["runs"]) == 9
    assert told["predictions"][0]["value"] == pytest.approx(LAW(4e6, 3.2e6), rel=1e-3)
    assert json.loads((tmp_path / "out" / "scaling.json").read_text()) == told
    page = (tmp_path / "out" / "scaling.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "four times beyond" in page
    assert cli.main(["scaling", *folders[:2]]) == 2
    assert "unknowns" in capsys.readouterr().err
    assert cli.main(["scaling", *folders, "--predict", "many"]) == 2
    assert "1e6x2e7" in capsys.readouterr().err


def test_a_wider_model_has_more_heads_of_the_same_size():
    config = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    wide = sweep.widened(config, 96)
    assert [wide[name] for name in config] == [96, 264, 3, 3, 32]
    assert sweep.widened({"n_embd": 64, "n_head": 4}, 32) == {"n_embd": 32, "n_head": 2}
    with pytest.raises(InputError, match="--widths"):
        sweep.widened(config, 80)


@pytest.mark.timeout(300)
def test_a_ladder_runs_what_is_missing_and_nothing_twice(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the hotel number {n} is open " * 4}) + "\n" for n in range(60)))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    values = {
        "model": {"dtype": "float32", "config": config, "tokenizer": {"kind": "bpe", "vocab_size": 300}},
        "method": {"name": "full"},
        "data": {"train": str(rows), "max_length": 32},
        "task": {"name": "pretrain", "pack_tokens": 32},
        "train": {"batch_size": 4, "warmup_steps": 0, "save_every": "none"},
        "output": str(tmp_path / "ladder"),
    }
    rungs = [(16, 256), (32, 512)]
    folders = sweep.ladder(values, rungs, {})
    found = [point(Run.open(folder)) for folder in folders]
    assert [one.tokens for one in found] == [256, 512] and found[0].parameters < found[1].parameters
    before = [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders]
    assert sweep.ladder(values, rungs, {}) == folders
    assert [(folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders] == before
