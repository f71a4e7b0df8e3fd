"""Every method beside every other, and the misses of the runs that there were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weitiao import cli
from weitiao.methods import METHODS
from weitiao.plan import history


def test_every_method_is_planned_and_none_on_the_front_is_beaten(tmp_path: Path, capsys: Any):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": "你好再见" * (n % 9 + 2)}) for n in range(20)), encoding="utf-8")
    words = [f"data.train={rows}", f"output={tmp_path / 'run'}", "task.name=pretrain", "data.validation=0"]
    assert cli.main(["plan", *words, "--all-methods", "--json"]) == 0
    found = {row["method"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert {*found} == {*METHODS, "qlora"} - {"head", "peft"}
    assert cli.main(["plan", *words, "method.name=full", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert found["full"]["trainable_parameters"] == alone["parameters"] == alone["trainable_parameters"]
    assert found["full"]["host_peak_bytes"] == pytest.approx(alone["host_peak_bytes"], rel=0.1)
    sides = [
        (r["host_peak_bytes"], r["total_seconds"], -r["trainable_parameters"], r["pareto"]) for r in found.values()
    ]
    for one in sides:
        beaten = any(all(a <= b for a, b in zip(o[:3], one[:3], strict=True)) and o[:3] != one[:3] for o in sides)
        assert one[3] is not beaten
    assert cli.main(["plan", *words, "--all-methods"]) == 0
    assert "●" in capsys.readouterr().out


def test_a_run_is_noted_and_its_miss_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(history, "cache_folder", lambda: tmp_path / "cache")
    assert cli.main(["plan", "--history"]) == 0
    assert "no run has been noted" in capsys.readouterr().out
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"prompt": "几点？", "answer": f"{n} 点。"}) for n in range(8)), encoding="utf-8"
    )
    words = [f"data.train={rows}", f"output={tmp_path / 'run'}", "data.validation=0", "train.max_steps=1"]
    monkeypatch.setattr("weitiao.plan.fact.peak_bytes", lambda: 1 << 40)  # the process has been used before
    assert cli.main(["train", *words, f"output={tmp_path / 'thrown away'}"]) == 0 and not history.file().exists()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert cli.main(["train", *words]) == 0
    with history.file().open("a", encoding="utf-8") as file:
        file.write('{"cut')
    capsys.readouterr()
    assert cli.main(["plan", "--history", "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["runs"]
    planned = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert line["memory_error"] == pytest.approx(planned["host_peak_bytes"] / (1 << 40) - 1)
    assert line["method"] == "lora" and line["run"] == str(tmp_path / "run") and line["measured_seconds"] > 0
    assert cli.main(["plan", "--history"]) == 0
    assert "1 run: memory off by" in capsys.readouterr().out
