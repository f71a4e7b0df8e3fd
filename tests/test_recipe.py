"""The recipe: problems of the whole said at once, and a run from rows to a tuned folder, come what may."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from weitiao import cli
from weitiao.config import Tree
from weitiao.data.rows import Text
from weitiao.errors import InputError, RunError
from weitiao.methods import METHODS, NEW_RATE
from weitiao.methods.io import open_model
from weitiao.recipe import Recipe, check, load, run, stages
from weitiao.runs import Run, folder_bytes, is_run
from weitiao.weights.folders import ROOM_BYTES

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
SHIPPED = Path(__file__).parent.parent / "recipes"
TRAINING_KEYS = ["step", "epoch", "loss", "tokens", "trained_tokens", "seconds", "learning_rate", "grad_norm"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty conversations of one turn."""
    path = tmp_path / "rows.jsonl"
    turns = ([("user", f"问题{n}"), ("assistant", f"回答{n}，好的")] for n in range(40))
    lines = ({"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def values(tmp_path: Path, rows: Path, tiny_llama: Path) -> dict:
    """A recipe that runs in a second."""
    return {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(rows)},
        "train": {"epochs": 2, "learning_rate": 1e-2, "warmup_steps": 0},
        "output": str(tmp_path / "run"),
    }


def problems_of(values: dict, **options: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        check(Recipe.model_validate(values), **options)  # type: ignore[arg-type]
    return caught.value.problems


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below ``folder``."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- checking


def test_every_problem_of_the_whole_is_said_at_once(values: dict):
    values["data"] = {"train": ["none.jsonl", "generate:what"], "validation": "gone.jsonl", "tools": "tools.json"}
    values["model"] = {"tokenizer": {"kind": "bpe", "vocab_size": 3, "knid": "x"}, "config": LLAMA}
    values["train"] = {"best": "slot_f1"}
    said = problems_of(values, generators=["tiny-zh"])
    for expected in (
        "data.train: none.jsonl: no such file",
        "data.train: generate:what: no such generator (tiny-zh)",
        "data.validation: gone.jsonl",
        "data.tools: tools.json",
        "method.name: lora saves what it adds and not the new model",
        "model.tokenizer: knid: ",
        "train.best: nothing measures slot_f1",
    ):
        assert [line for line in said if line.startswith(expected)], (expected, said)


def test_problems_of_the_whole_name_their_line(tmp_path: Path):
    recipe = tmp_path / "x.yaml"
    recipe.write_text("data:\n  train: none.jsonl\noutput: runs/x\n")
    with pytest.raises(InputError) as caught:
        check(*load(recipe, ["data.tools=no.json"]))
    assert caught.value.problems == [
        f"{recipe}:2: data.train: none.jsonl: no such file or folder",
        "command line: data.tools: no.json: no such file or folder",
    ]


def test_a_run_never_overwrites_its_own_base(values: dict, tiny_llama: Path):
    for output in (tiny_llama, tiny_llama.parent):
        assert "would overwrite the base model" in problems_of(values | {"output": str(output)})[0]


def test_stages_need_names_and_are_built_before_the_first_runs(values: dict):
    values["stages"] = [{"name": "a"}, {"name": "../b"}, {"name": "a"}, {}]
    assert [line.split(":")[0] for line in problems_of(values)] == ["stages.1.name", "stages.2.name", "stages.3.name"]
    values["stages"] = [{"name": "a", "train": {"epochs": 0}}, {"name": "b", "method": {"rank": 0}}]
    said = problems_of(values)
    assert len(said) == 2 and "epochs" in said[0] and "rank" in said[1]


def test_a_learning_rate_that_nobody_gave_is_the_method_s(values: dict):
    values.pop("train")

    def rate(**sections: Any) -> float:
        return Recipe.model_validate(values | sections).train.learning_rate

    assert rate() == METHODS["lora"].learning_rate == rate(method={"name": "qlora"})
    assert rate(method={"name": "full"}) == METHODS["full"].learning_rate != rate(method={"name": "prefix_tuning"})
    assert rate(method={"name": "full"}, model={"config": LLAMA}) == NEW_RATE
    assert rate(method={"name": "full"}, train={"learning_rate": 1e-3, "epochs": 1}) == 1e-3
    values["stages"] = [{"name": "a", "method": {"name": "full"}}, {"name": "b", "method": {"name": "adapter"}}]
    found = [stage.train.learning_rate for stage, _ in stages(Tree(values))]
    assert found == [METHODS["full"].learning_rate, METHODS["adapter"].learning_rate]
    with pytest.raises(InputError, match=r"method"):
        load(values | {"stages": [], "method": {"name": ["lora"]}})


# ---- running


def test_a_run_leaves_what_it_promises(values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = run(Recipe.model_validate(values))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {
        "recipe.yaml", "env.json", "plan.json", "metrics.jsonl", "checkpoints", "adapter", "loss.png", "report.md",
        "report.json",
    }  # fmt: skip
    lines = Run.open(tmp_path / "run").metrics()
    steps = [line for line in lines if "loss" in line]
    assert all(list(line) == TRAINING_KEYS for line in steps)
    assert [line["step"] for line in steps] == list(range(1, result.fit.steps + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line for line in lines if "validation" in line and "loss" not in line]
    adapter = tmp_path / "run" / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in adapter.iterdir()
    }
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert {"phases", "peak_phase", "host_peak_bytes", "trainable_parameters", "worst_step", "fits"} <= set(plan)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| peak memory |" in report and "loss.png" in report
    said = capsys.readouterr().err
    assert "rehearsed" in said and "trained;" in said
    assert Recipe.model_validate(Run.open(tmp_path / "run").recipe()) == Recipe.model_validate(values)
    json.dumps(result.to_dict())


def test_the_verb_ends_with_what_can_be_done_next(values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert cli.main(["train", str(path)]) == 0
    said = capsys.readouterr().err
    assert "weitiao chat" in said and "weitiao eval" in said


def test_nothing_is_left_and_nothing_lost_when_the_input_is_bad(values: dict, tmp_path: Path, rows: Path):
    run(Recipe.model_validate(values))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        run(Recipe.model_validate(values))
    rows.write_text('{"messages": [{"role": "user", "content": "x"}]}\n' * 3)
    with pytest.raises(InputError):
        run(Recipe.model_validate(values), overwrite=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError):
        run(Recipe.model_validate(values | {"output": str(tmp_path / "other")}))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("task", [{"name": "sft"}, {"name": "pretrain"}, {"name": "pretrain", "pack_tokens": 16}])
def test_rows_on_disk_train_as_rows_in_memory(values: dict, tmp_path: Path, task: dict, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    new = {"model": {"config": LLAMA, "tokenizer": {"kind": "bpe", "vocab_size": 400}}, "method": {"name": "full"}}
    values = values | {"task": task} | (new if task["name"] == "pretrain" else {})
    losses = []
    for way in ("off", "on", "on"):
        data, output = values["data"] | {"memory_map": way}, str(tmp_path / f"run-{len(losses)}")
        done = run(Recipe.model_validate(values | {"data": data, "output": output}))
        losses.append([(line.get("loss"), line.get("validation"), line.get("tokens")) for line in done.run.metrics()])
    assert losses[0] == losses[1] == losses[2] and losses[0]
    assert (tmp_path / "cache" / "weitiao" / "tokens").is_dir()


def test_overwrite_starts_anew(values: dict, tmp_path: Path):
    first = run(Recipe.model_validate(values))
    values["train"] |= {"epochs": 1}
    second = run(Recipe.model_validate(values), overwrite=True)
    assert second.fit.steps * 2 == first.fit.steps
    assert len([line for line in second.run.metrics() if "loss" in line]) == second.fit.steps


def test_a_resumed_run_is_the_run_that_was_never_stopped(values: dict, tmp_path: Path):
    whole = run(Recipe.model_validate(values)).run
    values |= {"output": str(tmp_path / "cut")}
    cut = run(Recipe.model_validate(values)).run
    for later in sorted(cut.checkpoints.iterdir())[1:]:
        for file in later.iterdir():
            file.write_bytes(file.read_bytes()[:10])
    recipe, tree = load(cut.path / "recipe.yaml")
    again = run(recipe, tree=tree, resume=True).run
    weights = [folder / "adapter_model.safetensors" for folder in (whole.adapter, again.adapter)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    losses = [[line["loss"] for line in each.metrics() if "loss" in line] for each in (whole, again)]
    assert losses[0] == losses[1]


def test_a_finished_run_stays_as_it_is_and_changes_are_listed(
    values: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(Recipe.model_validate(values))
    folder, before = tmp_path / "run", contents(tmp_path / "run")
    assert cli.main(["train", "--resume", str(folder), "--json"]) == 0
    out, said = capsys.readouterr()
    assert json.loads(out)["steps"] == 10 and "nothing is left to do" in said and contents(folder) == before
    changed = ["train.learning_rate=0.5", "method.rank=2", "train.keep=5"]
    assert cli.main(["train", "--resume", str(folder), *changed]) == 2
    said = capsys.readouterr().err
    assert "train.learning_rate: was 0.01, is now 0.5" in said and "method.rank: was 8, is now 2" in said
    assert "--allow-changes" in said and contents(folder) == before
    assert cli.main(["train", "--resume", str(folder), "train.keep=1"]) == 0
    assert "changed: train.keep: was 2, is now 1" in capsys.readouterr().err
    assert Run(folder).recipe()["train"]["keep"] == 1
    assert cli.main(["train", "--resume", str(folder), "train.epochs=3", "--allow-changes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 15
    assert cli.main(["train", "--resume", str(folder), "recipe.yaml"]) == 2
    assert "## Loss" in (folder / "report.md").read_text() and "the step to use" in (folder / "report.md").read_text()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(values: dict, tmp_path: Path):
    recipe = tmp_path / "recipe.json"
    values["train"] |= {"epochs": 1000, "save_every": "none", "evaluate_every": "none"}
    recipe.write_text(json.dumps(values))
    command = [sys.executable, "-m", "weitiao", "train", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    again = f"weitiao train --resume {tmp_path / 'run'}"
    assert again in said.splitlines()[-1] and "Traceback" not in said
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_a_new_model_with_its_own_tokenizer_then_stages_on_top(values: dict, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"今天天气很好，我们去公园，编号{n}。\n" for n in range(40)), encoding="utf-8")
    values.pop("model")
    values["stages"] = [
        {
            "name": "base",
            "model": {"config": LLAMA, "tokenizer": {"kind": "bpe", "vocab_size": 300}},
            "method": {"name": "full"},
            "task": {"name": "pretrain"},
            "data": {"train": str(text)},
        },
        {"name": "tune", "method": {"rank": 2}},
        {"name": "more", "data": {"validation": None}},
    ]
    result = run(Recipe.model_validate(values))
    whole = Run.open(tmp_path / "run")
    assert result.run.path == whole.path / "more"
    assert whole.final == whole.path / "more" / "adapter"
    assert (whole.path / "base" / "tokenizer" / "tokenizer.json").is_file()
    assert Run(whole.path / "tune").recipe()["model"]["path"] == str(whole.path / "base" / "model")
    assert (whole.path / "tune" / "merged" / "model.safetensors").is_file()
    assert Run(whole.path / "tune").recipe()["method"]["rank"] == 2
    assert Run.open(whole.path / "tune").whole.path == whole.path
    for folder in (whole.path / "more" / "adapter",):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    recipe, tree = load(whole.path / "recipe.yaml")
    assert run(recipe, tree=tree, resume=True).run.path == whole.path / "more"
    before = contents(whole.path)
    assert run(recipe, tree=tree, resume=True).run.path == whole.path / "more"
    assert contents(whole.path) == before, "every stage is finished"


def test_rows_may_be_generated_and_evaluators_choose_the_best(values: dict):
    values["data"] = {"train": "generate:numbers"}
    values["task"] = {"name": "pretrain"}
    values["train"] |= {"best": "constant"}
    asked = []

    def numbers(seed: int) -> list[Text]:
        asked.append(seed)
        return [Text(f"数字 {number}", id=str(number)) for number in range(20)]

    result = run(
        Recipe.model_validate(values),
        generators={"numbers": numbers},
        evaluators={"mine": lambda model: {"constant": 0.5}},
    )
    assert asked == [0]
    assert result.fit.best_metric == 0.5


@pytest.mark.parametrize("section", ["evaluate", "data"])
def test_the_recipes_evaluation_joins_the_report(values: dict, rows: Path, tmp_path: Path, section: str):
    values["evaluate"] = {"task": "perplexity"}
    values[section] |= {"data": str(rows)} if section == "evaluate" else {"test": str(rows)}
    result = run(Recipe.model_validate(values))
    assert result.figures["perplexity"]
    assert "perplexity" in (tmp_path / "run" / "report.md").read_text()


# ---- the verbs


def test_the_first_run_is_a_file_a_folder_and_one_line(
    rows: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "first"
    words = [f"model.path={tiny_llama}", f"data.train={rows}", f"output={output}", "train.max_steps=3"]
    assert cli.main(["plan", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] > 0
    assert not is_run(output)
    assert cli.main(["train", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 3 and found["result"] == str(output / "adapter")
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert f"weitiao train --resume {output}" in said and f"weitiao train {output}/recipe.yaml --overwrite" in said
    assert cli.main(["report", str(output)]) == 0
    assert "## Plan and fact" in capsys.readouterr().out
    assert cli.main(["report", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["last_step"]["step"] == 3
    assert cli.main(["train", str(output / "recipe.yaml"), "--overwrite", "--json"]) == 0
    assert cli.main(["train", "--resume", str(output), "--json"]) == 0


@pytest.mark.parametrize("recipe", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_dry_runs(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("hotel_dialogues.train.jsonl", "hotel_dialogues.validation.jsonl", "hotel_db.json"):
        (tmp_path / name).touch()
    assert "hardware:" in recipe.read_text(encoding="utf-8").lower(), "what it needs stands at its head"
    (tmp_path / "rows.jsonl").touch()
    required = {"folder: null": f"data.folder={tmp_path}", "{train: null": f"data.train={tmp_path}/rows.jsonl"}
    words = [word for blank, word in required.items() if blank in recipe.read_text(encoding="utf-8")]
    assert cli.main(["train", str(recipe), *words, "--dry-run"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.startswith("model:")


@pytest.mark.parametrize(
    ("method", "quantize"),
    [
        ({"name": "lora", "initialize": "pissa"}, "none"),
        ({"name": "freeze", "blocks": 1}, "nf4"),
        ({"name": "adalora"}, "nf4"),
    ],
    ids=["pissa", "freeze on codes", "adalora on codes"],
)
def test_the_last_checkpoint_opens_as_what_was_saved(values: dict, method: dict, quantize: str):
    values |= {"method": method, "model": values["model"] | {"quantize": quantize}}
    values["train"] |= {"best": None, "learning_rate": 0.03}
    done = run(Recipe.model_validate(values))
    ids = torch.arange(5, 40)[None]
    saved, opened = (open_model(done.run.path, "float32", checkpoint=step).model for step in (None, done.fit.steps))
    torch.testing.assert_close(opened(input_ids=ids).logits, saved(input_ids=ids).logits, rtol=0, atol=1e-4)


# ---- the disk


def small_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """So many bytes are free."""
    usage = namedtuple("usage", "total used free")(1 << 40, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_too_small_a_disk_is_refused_before_a_weight_is_read_and_leaves_nothing(
    values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = Recipe.model_validate(values | {"method": {"name": "full"}})
    with monkeypatch.context() as patch:
        small_disk(patch, 3 << 20)
        patch.setattr("weitiao.models.load.load", lambda *_, **__: pytest.fail("a weight was read"))
        with pytest.raises(
            RunError, match=r"bytes needed, 3145728 bytes free.*optimiser.*\n.*save_every=none"
        ) as raised:
            run(recipe)
        verdict = capsys.readouterr().err.splitlines()[-1]
        assert "train.keep=1" in verdict and "output=" in verdict and "train.memory" not in verdict
        assert not (tmp_path / "run").exists()
    needed = int(re.findall(r"(\d+) bytes needed", str(raised.value))[0])
    assert run(recipe).plan.disk_bytes == needed, "the plan and the refusal reckon alike"


def test_a_run_that_fails_before_its_first_step_leaves_nothing_in_the_way(
    values: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise RunError("the disk is full")

    for stages_ in ([], [{"name": "one"}]):
        recipe = Recipe.model_validate(values | {"stages": stages_})
        with monkeypatch.context() as patch:
            patch.setattr("weitiao.train.recovery.start", full)
            with pytest.raises(RunError, match="the disk is full"):
                run(recipe)
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("stays")
    with monkeypatch.context() as patch:
        patch.setattr("weitiao.train.recovery.start", full)
        with pytest.raises(RunError, match="the disk is full"):
            run(recipe)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_disk_is_planned_to_the_byte(values: dict, tmp_path: Path, method: str):
    """One checkpoint and the result: what lies there is what was planned, but for headers, JSON and a picture."""
    options = values["train"] | {"save_every": "none", "evaluate_every": "none"}
    done = run(Recipe.model_validate(values | {"method": {"name": method}, "train": options}))
    written = folder_bytes(tmp_path / "run")
    tensors = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert done.plan.room and tensors <= done.plan.disk_bytes <= tensors + ROOM_BYTES
    assert written <= done.plan.disk_bytes


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, rows):
    """It holds what a run would replace, and no run."""
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    (tmp_path / "mine" / "adapter" / "note.txt").write_text("precious")
    (tmp_path / "mine" / "env.json").write_text("precious")
    recipe = Recipe.model_validate({"data": {"train": str(rows)}, "output": str(tmp_path / "mine")})
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"adapter, env\.json"):
            run(recipe, overwrite=overwrite)
    assert {path.read_text() for path in (tmp_path / "mine").rglob("*.*")} == {"precious"}
