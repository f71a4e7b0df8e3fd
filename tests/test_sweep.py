"""One recipe by several methods: a row for each, the same budget, nothing run twice, a failure that stays its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weitiao import sweep as module
from weitiao.cli import main
from weitiao.methods import METHODS
from weitiao.runs import Run
from weitiao.sweep import sweep


@pytest.fixture
def values(tmp_path: Path, tiny_llama: Path) -> dict:
    """A recipe that runs in seconds."""
    turns = ([("user", f"问题{n}"), ("assistant", f"回答{n}，好的")] for n in range(40))
    lines = ({"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "method": {"name": "lora", "rank": 2},
        "data": {"train": str(rows)},
        "train": {"epochs": 1, "batch_size": 4, "warmup_steps": 0},
        "output": str(tmp_path / "sweep"),
    }


def test_rows_table_and_picture_and_nothing_is_run_twice(values: dict, tmp_path: Path, capsys):
    output = Path(values["output"])
    rows = sweep(values, ["lora", "prompt_tuning"], steps=3)
    assert [(row["method"], row["seed"], row["steps"]) for row in rows] == [("lora", 0, 3), ("prompt_tuning", 0, 3)]
    recipe = Run.open(output / "lora-0").recipe()
    assert recipe["method"]["rank"] == 2  # the recipe's own options hold for its own method
    assert all(row["disk_bytes"] and row["trainable_parameters"] and row["host_peak_bytes"] for row in rows)
    table = (output / "sweep.md").read_text(encoding="utf-8")
    assert len([line for line in table.splitlines() if line.startswith(("| lora", "| prompt_tuning"))]) == 2
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("metrics.jsonl")}
    assert sweep(values, ["lora", "prompt_tuning"], steps=3) == rows
    assert {path: path.stat().st_mtime_ns for path in output.rglob("metrics.jsonl")} == before


def test_a_method_can_have_options_and_its_own_learning_rate(values: dict):
    values["train"]["learning_rate"] = 3e-3
    output = Path(values["output"])
    rows = sweep(values, ["lora", "lora rank=1 dora=true", "peft kind=IA3"], steps=1)
    assert not [row["error"] for row in rows if "error" in row]
    plain, other, peft = (
        Run.open(output / f"{name}-0").recipe() for name in ("lora", "lora-rank-1-dora-true", "peft-kind-IA3")
    )
    assert plain["method"]["rank"] == 2 and other["method"]["rank"] == 1 and other["method"]["dora"]
    assert plain["train"]["learning_rate"] == other["train"]["learning_rate"] == 3e-3
    assert peft["train"]["learning_rate"] == METHODS["peft"].learning_rate
    sweep(values, ["full train.learning_rate=1e-5"], steps=1)
    assert Run.open(output / "full-train-learning_rate-1e-5-0").recipe()["train"]["learning_rate"] == 1e-5
    assert rows[1]["trainable_parameters"] < rows[0]["trainable_parameters"]


def test_a_failure_stays_its_own(values: dict):
    values["method"] = {"name": "lora", "target_modules": ["nothing"]}
    bad, good = sweep(values, ["lora", "freeze"], steps=2)
    assert "nothing" in bad["error"] and "error" not in good
    assert "nothing" in (Path(values["output"]) / "sweep.md").read_text(encoding="utf-8")


def test_a_budget_in_tokens_is_steps_of_the_plan(values: dict):
    (row,) = sweep(values, ["lora"], tokens=500)
    lines = [line for line in Run.open(Path(values["output"]) / "lora-0").metrics() if "loss" in line]
    assert len(lines) == row["steps"] > 1
    assert sum(line["tokens"] for line in lines) == pytest.approx(500, rel=0.3)


def test_a_budget_in_minutes_asks_a_short_run(values: dict):
    seconds = module._steps_in(
        {**values, "train": {**values["train"], "seed": 0}, "output": values["output"] + "/a"}, 1
    )
    assert seconds > module.PROBE_STEPS  # a tiny model takes far less than ten seconds a step


def test_problems_are_said_at_once(values: dict, tmp_path: Path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    assert main(["sweep", str(recipe), "--methods", "lroa", "--steps", "3", "--tokens", "5"]) == 2
    said = capsys.readouterr().err
    assert "lroa" in said and "lora" in said and "--tokens" in said
    assert main(["sweep", str(recipe), "--methods", "lora rnak=3,freeze blocks=-1"]) == 2
    said = capsys.readouterr().err
    assert "method.rnak" in said and "method.blocks" in said
    assert main(["sweep", str(recipe), "--methods", "lora", "--seeds", "a"]) == 2
    assert main(["sweep", str(recipe)]) == 2


def test_what_nothing_was_measured_on_is_no_zero():
    costs = {"planned_host_peak_bytes": 1, "host_peak_bytes": 1, "seconds": 1.0, "disk_bytes": 1}
    figures = {"exact": {"value": 0.5, "count": 8}, "bleu4": {"value": 0.0, "count": 0}}
    row = {"method": "lora", "best_metric": 1.0, "trainable_parameters": 1, "figures": figures} | costs
    cells = module.table([row]).splitlines()[2].split("|")
    assert [cell.strip() for cell in cells[2:4]] == ["0.500", "–"]
