"""The plan turned round: what it finds fits, the next does not, and both are what the plan itself says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from weitiao import cli
from weitiao.plan.solve import notches

ROWS = [{"prompt": "你好" * (n % 7 + 1), "answer": "再见" * (3 * n % 40 + 1)} for n in range(40)]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A recipe on the embedded model, whose plan is made in a process that has been used before."""
    monkeypatch.setattr("weitiao.plan.need.resident_bytes", lambda: 300 << 20)
    monkeypatch.setattr("weitiao.plan.need.peak_bytes", lambda: 300 << 20)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return [f"data.train={rows}", f"output={tmp_path / 'run'}", "data.validation=0", "train.batch_size=16"]


def asked(capsys: pytest.CaptureFixture[str], *given: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["plan", *given, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def smallest(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """The smallest machine, by the refusal of one that is too small for anything."""
    assert cli.main(["plan", *given, "--fit", "310MiB"]) == 2
    said = capsys.readouterr().err
    assert "nothing fits 310 MiB" in said
    return said.rpartition("--fit ")[2].strip()


@pytest.mark.parametrize(
    ("name", "more"),
    [("micro_batch_tokens", ""), ("rank", ""), ("max_length", "task.name=pretrain"),
     ("unfrozen_blocks", "method.name=freeze")],
)  # fmt: skip
def test_what_is_found_fits_and_the_next_does_not(name: str, more: str, words: list[str], capsys: Any):
    words += [more] if more else []
    most = asked(capsys, *words, "--fit", "24GiB", "--solve", name)
    assert most["next"] is None, "all there is fits into so much"
    budget = f"{int(smallest(capsys, *words, '--solve', name)[:-3]) + 1}MiB"
    found = asked(capsys, *words, "--fit", budget, "--solve", name)
    assert found["host_peak_bytes"] <= found["fit_bytes"] < found["next"]["host_peak_bytes"]
    assert found["value"] < found["next"]["value"] <= most["value"]
    again = asked(capsys, *words, *found["overrides"])
    assert again["host_peak_bytes"] == found["host_peak_bytes"], "the overrides ask for what was found"


def test_what_the_recipe_says_of_memory_stays(words: list[str], capsys: Any):
    found = asked(capsys, *words, "train.memory=fast", "--fit", "24GiB", "--solve", "rank")
    assert [*found["overrides"]] == [f"method.rank={found['value']}"] and found["plan"]["recomputed_blocks"] == 0


def test_the_smallest_machine_is_told_and_would_do(words: list[str], capsys: Any):
    enough = smallest(capsys, *words, "--solve", "rank")
    found = asked(capsys, *words, "--fit", enough, "--solve", "rank")
    assert found["host_peak_bytes"] <= found["fit_bytes"]
    less = f"{int(enough[:-3]) - 1}MiB"
    assert cli.main(["plan", *words, "--fit", less, "--solve", "rank"]) == 2


def test_the_largest_model_on_a_gpu_that_is_not_here(words: list[str], capsys: Any):
    found = asked(capsys, *words, "--fit", "64GiB", "--gpu", "24GiB", "--solve", "model")
    assert found["plan"]["device"] == "cuda" and found["gpu_peak_bytes"] <= 24 << 30 < found["next"]["gpu_peak_bytes"]
    assert found["plan"]["dtype"] == "bfloat16" and found["overrides"][0] == f"model.path={found['value']}"


def test_what_would_fit_instead_fits(words: list[str], capsys: Any):
    full = [*words, "method.name=full", "train.memory=fast"]
    least = asked(capsys, *full)["host_peak_bytes"]
    budget = f"{(least >> 20) - 20}MiB"
    found = asked(capsys, *full, "--fit", budget)
    assert not found["fits"] and found["instead"]
    again = asked(capsys, *words, "method.name=full", *found["instead"], "--fit", budget)
    assert again["fits"] and again["instead"] == []


@pytest.mark.parametrize(("given", "said"), [
    (["--fit", "8GB"], "--fit"), (["--solve", "rnak"], "unfrozen_blocks"), (["--models", "x"], "--solve model"),
    (["--solve", "unfrozen_blocks"], "method.name=freeze"), 
    (["--solve", "rank", "method.name=full"], "method.name=lora"),
    (["--solve", "model", "--models", "nowhere"], "nowhere"),
])  # fmt: skip
def test_mistakes_are_told(given: list[str], said: str, words: list[str], capsys: Any):
    assert cli.main(["plan", *words, *given]) == 2
    assert said in capsys.readouterr().err


def test_notches_are_round_and_close():
    found = notches(1, 5000)
    assert found[:17] == [*range(1, 17), 18] and 5000 <= found[-1] < 5000 * 9 / 8
    assert all(more / less <= 9 / 8 for less, more in itertools.pairwise(found[8:]))
    assert notches(300, 300) == [320]
