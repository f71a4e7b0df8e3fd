"""A run in plain words: every question has an answer, and what follows is right for what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weitiao.evaluate.summary import read, summary, text, write_run_page

FACTS: dict[str, Any] = {
    "result": "runs/a/adapter", "base": "tiny", "method": "lora", "saves": "adapter", "trainable_parameters": 50,
    "parameters": 1000, "data": ["rows.jsonl"], "examples": 80, "epochs": 4.0, "steps": 40, "best_step": 20,
    "best_by": "loss", "curves": {"kind": "over-fitting", "step": 20, "epoch": 2.0, "text": "…"},
    "validation_losses": [2.0, 1.5], "task": "generate", "test": None, "chats": True, "figures": {},
    "cost": {key: {"planned": "1", "measured": "2"} for key in ("memory", "time", "disk")},
}  # fmt: skip


def compared(low: float, value: float, high: float, after: float = 1.0, cases: int = 50) -> dict[str, Any]:
    gain = {"system": "runs/a", "measure": "exact_match", "ours": 0.5 + value, "theirs": 0.5, "real": low * high > 0}
    gain |= {"value": value, "low": low, "high": high, "count": cases}
    worse = gain | {"against": "base_zero_shot", "value": value + 0.1, "low": low + 0.1, "high": high + 0.1}
    kept = {"before": 1.0, "after": after, "change": {}, "forgotten": after > 1.05}
    cost = {"prompt_tokens": 9000, "new_tokens": 5, "seconds": 3}
    return {
        "measure": "exact_match", "cases": cases, "differences": [worse, gain | {"against": "base_few_shot"}],
        "systems": {"base_few_shot": {}, "runs/a": {"cost_per_1000_answers": cost}},
        "forgetting": {"runs/a": {"text, en": kept}},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a"
    (folder / "compare").mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(FACTS | {"run": "elsewhere"}), encoding="utf-8")
    (folder / "report.md").write_text("# a\n\nthe report\n", encoding="utf-8")
    return folder


def answers(run: Path, found: dict[str, Any] | None) -> list[str]:
    if found is not None:
        (run / "compare" / "compare.json").write_text(json.dumps(found), encoding="utf-8")
    facts, there = read(run)
    assert facts and there == found
    return [one.answer for one in summary(facts, there)]


def test_a_real_gain_over_the_base_at_its_best(run: Path):
    what, better, real, forgot, which, cost, after = answers(run, compared(0.02, 0.1, 0.2))
    assert "`tiny`" in what and "50 numbers beside it (5.0%)" in what
    assert better.startswith("Yes.") and "0.600" in better and "with examples" in better
    assert "between 0.020 and 0.200" in real and "no accident" in real and "fewer" not in real
    assert forgot.startswith("Nothing that matters") and "Step 20" in which and "by heart" in which
    assert "9,000 tokens read" in cost
    assert "train.epochs=2 " in after and f"weitiao chat {run}" in after and "compare" not in after


def test_what_cannot_be_told_and_what_was_forgotten(run: Path):
    _, better, real, forgot, *_, after = answers(run, compared(-0.1, 0.01, 0.2, after=1.2, cases=9))
    assert "cannot tell" in better and "may be an accident" in real and "fewer than 30" in real
    assert "**text, en: 1.000 bits per byte before, 1.200 after (+20%)**" in forgot
    assert "data.replay" in after and after.index("eval compare") < after.index("data.replay")


def test_a_loss_is_called_one(run: Path):
    _, better, _, *_, after = answers(run, compared(-0.3, -0.2, -0.1))
    assert better.startswith("No: it became worse") and "data show rows.jsonl --check" in after


def test_without_a_comparison_the_command_for_it(run: Path):
    _, better, real, forgot, *_ = answers(run, None)
    assert f"weitiao eval compare {run} --task generate --data TEST.jsonl" in better and "2.000 to 1.500" in better
    assert "Not known" in real and "Not measured" in forgot


def test_one_page_in_the_readers_language(run: Path, monkeypatch: pytest.MonkeyPatch):
    answers(run, compared(0.02, 0.1, 0.2))
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    facts, there = read(run)
    assert facts
    told = text(summary(facts, there), facts)
    assert "比不微调更好吗？" in told and "是的。" in told
    page = write_run_page(run).read_text(encoding="utf-8")
    assert "比不微调更好吗？" in page and "the report" in page and "<script" not in page and 'lang="zh' in page
