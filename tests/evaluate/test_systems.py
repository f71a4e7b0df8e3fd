"""Was tuning worth it: the line-up, paired differences, regressions, what was forgotten, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.stub import said, serving
from weitiao.cli import main
from weitiao.errors import InputError
from weitiao.evaluate import contrast
from weitiao.evaluate.bootstrap import Measure, Resampling, mean, ratio
from weitiao.evaluate.forgetting import Kept, general
from weitiao.evaluate.systems import Comparison, choose_shots
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation
from weitiao.methods.io import open_model
from weitiao.recipe import Recipe, run


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def system(values, higher: bool = True, groups=None) -> Evaluation:
    values = np.asarray(values, dtype=float)
    lines = [{"id": str(n), "gold": "g", "predicted": f"p{value}"} for n, value in enumerate(values)]
    made = {"score": mean(values, higher=higher)}
    groups = groups or [str(n) for n in range(len(values))]
    return Evaluation({"score": 0.5}, lines, made, groups, [f"q{n}" for n in range(len(values))])


def comparison(**systems) -> Comparison:
    options = EvaluateOptions(task="generate", data="x", samples=400)
    return Comparison(options, "base", "score", {name.replace("__", "/"): one for name, one in systems.items()})


# ---- paired intervals


def test_pairing_sees_what_two_intervals_cannot():
    draw = np.random.default_rng(0)
    hard = draw.random(200)  # most of the spread is the rows'
    ours, theirs = mean(hard + 0.02 + draw.normal(0, 0.01, 200)), mean(hard)
    resampling = Resampling([str(n) for n in range(200)])
    gain = resampling.difference(ours, theirs)
    assert gain.low > 0 and resampling.of(ours).low < resampling.of(theirs).high
    assert resampling.difference(theirs, ours).value == pytest.approx(-gain.value)


@pytest.mark.parametrize("seed", range(3))
def test_equal_systems_are_called_equal_about_as_often_as_promised(seed):
    draw = np.random.default_rng(seed)
    found = 0
    for _ in range(60):
        right = draw.random((2, 80)) < 0.6
        gain = Resampling([str(n) for n in range(80)], 300).difference(*(mean(side) for side in right))
        found += gain.low > 0 or gain.high < 0
    assert found <= 9  # 3 of 60 are expected


def test_a_measure_of_nothing_is_no_difference():
    nothing = ratio(np.zeros(3, int), np.zeros(3, int))
    assert Resampling(list("abc")).difference(nothing, nothing).count == 0
    assert np.isnan(nothing.value) and Resampling(list("abc")).of(nothing).count == 0


# ---- what is said


def test_sentences_say_which_way_and_whether_it_is_real():
    better, same = np.r_[np.ones(50), np.zeros(10)], np.r_[np.zeros(30), np.ones(30)]
    found = comparison(base_zero_shot=system(same), tuned=system(better), worse=system(same * 0))
    sentences = {(one.system, one.against): one.sentence() for one in contrast.differences(found)}
    assert "better than base, zero-shot" in sentences["tuned", "base_zero_shot"]
    assert "worse than base" in sentences["worse", "base_zero_shot"]
    assert ("worse", "tuned") in sentences and ("tuned", "worse") not in sentences
    noise = comparison(base_zero_shot=system(same), tuned=system(np.roll(same, 15)))
    assert "cannot tell them apart" in contrast.verdicts(noise)[0]


def test_lower_is_better_where_it_is():
    found = comparison(base_zero_shot=system([3.0] * 40, higher=False), tuned=system([2.0] * 40, higher=False))
    (one,) = contrast.differences(found)
    assert one.gain.value == 1 and one.real and "better" in one.sentence()
    assert [row["id"] for row in contrast.regressions(found, "base_zero_shot", "tuned")][:2] == ["0", "1"]


def test_the_verdict_is_against_the_base_at_its_best():
    found = comparison(
        base_zero_shot=system([0.0] * 40), base_few_shot=system([1.0] * 40), tuned=system([0.5] * 39 + [1.0])
    )
    assert contrast.best_base(found) == "base_few_shot" and "worse" in contrast.verdicts(found)[0]


def test_the_worst_rows_come_first_and_only_worse_ones():
    before, after = [1.0, 1.0, 0.5, 0.0], [0.0, 0.6, 0.5, 1.0]
    found = comparison(base_zero_shot=system(before), tuned=system(after))
    rows = contrast.regressions(found, "tuned", "base_zero_shot")
    assert [row["id"] for row in rows] == ["0", "1"]
    shown = {"id": "0", "asked": "q0", "gold": "g", "before": "p1.0", "after": "p0.0"}
    assert rows[0] == shown | {"score_before": 1.0, "score_after": 0.0}


def test_systems_measured_on_other_cases_are_not_paired():
    found = comparison(base_zero_shot=system([1.0] * 3), tuned=system([0.0] * 4))
    assert contrast.differences(found) == [] and contrast.regressions(found, "tuned", "base_zero_shot") == []
    assert "Nothing to compare" in contrast.report(found)


# ---- forgetting


def test_forgetting_needs_a_rise_that_is_large_and_real():
    draw = np.random.default_rng(0)
    bits, size = draw.uniform(80, 120, 60), np.full(60, 20.0)

    def kept(factor):
        return Kept(Measure(np.stack([bits, size], 1)), Measure(np.stack([bits * factor, size], 1)))

    assert kept(1.2).forgotten() and not kept(1.02).forgotten() and not kept(0.8).forgotten()
    few = Kept(Measure(np.array([[100.0, 20], [10.0, 20]])), Measure(np.array([[130.0, 20], [5.0, 20]])))
    assert few.change().value > 0.05 * few.before.value and not few.forgotten()  # by chance


def test_general_rows_are_enough_for_an_interval_and_bad_files_are_named():
    parts = general(["generate:it"], {"it": lambda seed: iter(general([], {}, 0)["text, en"])}, 0)
    assert all(len(rows) >= 30 for rows in parts.values()) and len(parts) == 5
    with pytest.raises(InputError) as error:
        general(["no.jsonl", "generate:no"], {}, 0)
    assert len(error.value.problems) == 2


# ---- the number of examples


def test_examples_are_chosen_on_train_rows_that_are_none(tiny_llama, tmp_path, monkeypatch):
    seen = []

    def fake(base, options):
        rows = [Path(path).read_text(encoding="utf-8").splitlines() for path in (options.data, options.shot_data)]
        seen.append((options.shots, *rows))
        return system([{1: 0.5, 2: 0.9, 4: 0.9}[options.shots]] * 3)

    monkeypatch.setattr("weitiao.evaluate.systems.evaluate", fake)
    rows = [{"prompt": f"q{n}", "answer": f"a{n}"} for n in range(30)]
    options = EvaluateOptions(task="generate", data="t.jsonl", shot_data=jsonl(tmp_path / "train.jsonl", rows))
    count, note, pool = choose_shots(None, options, [4, 1, 2], tmp_path)
    assert count == 2 and "15 other rows" in note  # the fewest of equals
    assert Path(pool).read_text(encoding="utf-8").splitlines() == seen[0][2]
    for _, tried, examples in seen:
        assert len(tried) == 15 and not set(tried) & set(examples) and len({*tried, *examples}) == 30


# ---- from the command line


@pytest.fixture(scope="module")
def tuned(tiny_llama, tmp_path_factory) -> Path:
    """A short run on the tiny model."""
    folder = tmp_path_factory.mktemp("tuned")
    train = jsonl(folder / "train.jsonl", [{"prompt": f"hello {n % 4}", "answer": "hotel"} for n in range(24)])
    jsonl(folder / "test.jsonl", [{"prompt": f"hello {n}", "answer": "hotel"} for n in range(6)])
    run(Recipe.model_validate({
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "method": {"name": "lora", "rank": 4},
        "data": {"train": train},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0},
        "output": str(folder / "run"),
    }))  # fmt: skip
    return folder


def test_one_command_compares_everything_and_writes_it_down(tuned, tiny_llama, capsys):
    words = ["--task", "generate", "--data", str(tuned / "test.jsonl"), "--shot-data", str(tuned / "train.jsonl")]
    words += ["--max-new-tokens", "4", "--shots", "1,2", "--json"]
    with serving(lambda *_: said("hotel")) as (url, seen):
        command = ["eval", "compare", str(tuned / "run"), f"{url}#big", *words]
        assert main(command) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(seen) == 6
        assert main(command) == 0  # again: nothing is asked twice
        again = json.loads(capsys.readouterr().out)
        assert again["differences"] == found["differences"] and len(seen) == 6
    names = ["base_zero_shot", "base_few_shot", "base_thoughts", str(tuned / "run"), f"{url}#big"]
    assert list(found["systems"]) == names and found["base"] == str(tiny_llama) and found["cases"] == 6
    big = found["systems"][f"{url}#big"]
    assert big["figures"]["exact_match"]["value"] == 1
    assert big["cost_per_1000_answers"] | {"seconds": 0} == {"prompt_tokens": 7000, "new_tokens": 3000, "seconds": 0}
    real = {
        (one["system"], one["against"]): one["real"] for one in found["differences"] if one["measure"] == "exact_match"
    }
    assert real[f"{url}#big", "base_zero_shot"]
    forgotten = found["forgetting"]
    assert list(forgotten) == [str(tuned / "run")] and set(forgotten[str(tuned / "run")]) == set(general([], {}, 0))
    folder = tuned / "run" / "compare"
    text = (folder / "compare.md").read_text(encoding="utf-8")
    assert "fewer than 30" in text and "chosen on" in text
    assert json.loads((folder / "compare.json").read_text(encoding="utf-8")) == again
    page = (tuned / "run" / "report.html").read_text(encoding="utf-8")
    assert "Was tuning worth it?" in page and page.count("data:image/png;base64,") == 3 and "<script" not in page
    assert (folder / "predictions-base_few_shot.jsonl").read_text().count("\n") == 6


def test_perplexity_is_compared_too_and_mistakes_are_said_at_once(tuned, tiny_llama, capsys, tmp_path):
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": f"hello hotel {n}"} for n in range(5)])
    output = tmp_path / "out"
    words = ["--task", "perplexity", "--data", texts, "--no-forgetting", "--output", str(output)]
    assert main(["eval", "compare", str(tuned / "run"), "--base", str(tiny_llama), *words]) == 0
    assert "bits_per_byte" in capsys.readouterr().out and (output / "compare.html").is_file()
    bad = ["eval", "compare", "a", "a", "--task", "perplexity", "--data", "no.jsonl", "--shots", "0"]
    assert main(bad) == 2
    told = capsys.readouterr().err
    assert "twice" in told and "no.jsonl" in told and "--shots" in told
    assert main(["eval", "compare", str(tiny_llama), *words]) == 2
    assert "--base" in capsys.readouterr().err


def test_an_address_gives_no_likelihoods(capsys, tmp_path):
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": "hello"}])
    assert main(["eval", "http://127.0.0.1:9/v1#m", "--task", "perplexity", "--data", texts]) == 2
    assert "answers only" in capsys.readouterr().err


def test_a_recipe_names_no_code(tuned, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("raise SystemExit('was run')\n")
    words = [
        f"data.train={tuned / 'train.jsonl'}",
        f"output={tmp_path / 'run'}",
        f"evaluate.data={tuned / 'test.jsonl'}",
    ]
    assert main(["train", *words, f"evaluate.task={file}:f"]) == 2
    told = capsys.readouterr().err
    assert "names no code" in told and "was run" not in told


def test_tuned_model_is_opened_as_it_was_saved(tuned):
    assert open_model(tuned / "run").base != ""
