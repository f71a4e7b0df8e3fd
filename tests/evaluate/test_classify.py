"""Measures of labels against their definitions, worked out by hand, and a whole run of the task."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from weitiao import cli
from weitiao.evaluate.classify import details, measure
from weitiao.export.merge import merge
from weitiao.methods.io import open_model
from weitiao.models import heads, tiny
from weitiao.models.heads import Head

ABC = Head(("a", "b", "c"))


def test_one_class_a_text():
    scores = np.log(np.array([[0.8, 0.1, 0.1], [0.15, 0.75, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]))
    gold = np.array([0, 1, 1, 1])  # right, right, wrong, right
    found = measure(scores, gold, ABC)
    assert found["accuracy"]["value"] == pytest.approx(0.75)
    assert found["f1: a"]["value"] == pytest.approx(2 / 3) and found["f1: b"]["value"] == pytest.approx(0.8)
    assert found["f1: c"]["count"] == 0
    assert found["macro_f1"]["value"] == pytest.approx((2 / 3 + 0.8) / 2)  # c never occurs and is never said
    assert found["majority"] == pytest.approx(0.75)
    assert found["accuracy"]["low"] <= 0.75 <= found["accuracy"]["high"]
    drawn = details(scores, gold, ABC)
    assert drawn["confusion"] == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    # bins: 0.8 and 0.8 both right, 0.75 right, 0.6 wrong
    assert found["calibration_error"] == pytest.approx((2 * 0.2 + 0.25 + 0.6) / 4)


def test_several_classes_a_text():
    scores = np.array([[2.0, -1.0, 3.0], [-2.0, 1.0, -3.0]])
    gold = np.array([[1, 0, 1], [0, 0, 1]], dtype=np.float32)
    found = measure(scores, gold, Head(ABC.labels, "multi"))
    assert found["accuracy"]["value"] == 0.5  # the first text is right in all its labels
    assert found["micro_f1"]["value"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"]["value"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert "majority" not in found and "confusion" not in details(scores, gold, Head(ABC.labels, "multi"))


def test_a_number():
    gold = np.array([1.0, 2.0, 4.0])
    found = measure(np.array([[1.0], [3.0], [4.0]]), gold, Head(("value",), "regression"))
    assert found["mse"] == pytest.approx(1 / 3) and found["mae"] == pytest.approx(1 / 3)
    assert found["r2"] == pytest.approx(1 - 1 / ((gold - gold.mean()) ** 2).sum())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = {"差": "太差了", "中": "一般吧", "好": "非常好"}
    lines = [{"text": f"第{n}次：{word}", "label": label} for n in range(20) for label, word in words.items()]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_a_run_learns_labels_and_is_measured(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    settings = ("train.epochs=4", "train.learning_rate=2e-3", "train.best=accuracy")
    measured = ("evaluate.task=classify", f"evaluate.data={rows}")
    code = run("train", f"data.train={rows}", "task.name=classify", f"output={out}", *settings, *measured)
    assert code == 0, capsys.readouterr().err
    assert {"confusion.png", "calibration.png", "predictions.jsonl", "report.md"} <= {p.name for p in out.iterdir()}
    assert heads.of(open_model(out).model.config) == Head(("中", "好", "差"))
    capsys.readouterr()
    assert run("eval", out, "--task", "classify", "--data", rows, "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"]["value"] > 0.9
    steps = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    tuned = open_model(out, checkpoint=int(steps[-1].rpartition("-")[2]))
    assert heads.of(tuned.model.config) is not None


def test_a_language_model_has_no_labels_and_a_classifier_no_words(rows: Path, tmp_path: Path, capsys):
    assert run("eval", "weitiao-tiny-zh", "--task", "classify", "--data", rows) == 2
    assert "no head" in capsys.readouterr().err
    encoder = tmp_path / "bert"
    tiny.make("bert", encoder)
    words = (f"model.path={encoder}", f"data.train={rows}", "task.name=classify", f"output={tmp_path / 'run'}")
    assert run("train", *words, "method.name=full", "train.max_steps=2") == 0, capsys.readouterr().err
    final = tmp_path / "run" / "model"
    assert run("chat", final) == 2
    assert "classify" in capsys.readouterr().err
    talk = tmp_path / "talk.jsonl"
    talk.write_text('{"prompt": "a", "answer": "b"}\n' * 4, encoding="utf-8")
    assert run("train", f"model.path={final}", f"data.train={talk}", f"output={tmp_path / 'b'}") == 2
    assert "task.name=classify" in capsys.readouterr().err


def test_a_classifier_s_adapter_is_merged_with_its_head(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ("task.name=classify", "train.max_steps=6", "train.learning_rate=5e-3", "model.dtype=float32")
    assert run("train", f"data.train={rows}", *words, f"output={tmp_path / 'run'}") == 0, capsys.readouterr().err
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    one, two = open_model(tmp_path / "run", dtype="float32"), open_model(tmp_path / "merged", dtype="float32")
    assert heads.of(two.model.config) == heads.of(one.model.config)
    ids = torch.arange(5, 30)[None]
    found = [heads.scores(model.eval(), ids, torch.ones_like(ids)) for model in (one.model, two.model)]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_numbers_are_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"text": word * (1 + n % 3), "label": value} for n in range(20) for word, value in (("贵", 3.5), ("好", -1))
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    words = ("task.name=classify", "task.kind=regression", "train.epochs=20", "train.learning_rate=3e-3")
    assert run("train", f"data.train={path}", *words, f"output={tmp_path / 'run'}") == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run("eval", tmp_path / "run", "--task", "classify", "--data", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["r2"] > 0.9


@pytest.mark.parametrize("method", ["head", "lora", "freeze"])
def test_a_head_on_codes(method: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ("task.name=classify", "model.quantize=nf4", f"method.name={method}", "train.max_steps=4")
    assert run("train", f"data.train={rows}", *words, f"output={tmp_path / 'run'}") == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run("eval", tmp_path / "run", "--task", "classify", "--data", rows, "--json") == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"]["value"] <= 1


def test_methods_are_compared_on_labels(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = (f"data.train={rows}", "task.name=classify", "train.best=accuracy", f"output={tmp_path / 'sweep'}")
    measured = ("evaluate.task=classify", f"evaluate.data={rows}")
    assert run("sweep", *words, *measured, "--methods", "head,lora", "--steps", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found] == ["head", "lora"]
    assert all("accuracy" in row["figures"] for row in found)
