"""Every shipped recipe says what it is for, loads, and dry-runs with what its header says it needs; the large ones run
whole at a tiny shape."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from weitiao import cli
from weitiao.models import tiny
from weitiao.recipe import load, run

ROOT = Path(__file__).parent.parent
CROSSWOZ = ROOT.parent / "shared" / "data" / "crosswoz"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
HEADER = ("purpose", "command", "hardware", "memory")
NEEDED = re.compile(r"([\w.]+)=(FILE|FOLDER)\b")


def header(recipe: Path) -> str:
    """The comments that a recipe begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, Path]:
    """What stands in for FILE and FOLDER in a header's command."""
    file, folder = tmp_path / "rows.jsonl", tmp_path / "folder"
    file.write_text(json.dumps({"prompt": "你好", "answer": "您好！"}, ensure_ascii=False) + "\n", encoding="utf-8")
    folder.mkdir()
    for name in ("hotel_dialogues.train.jsonl", "hotel_dialogues.validation.jsonl"):
        (folder / name).write_text("", encoding="utf-8")
    (folder / "hotel_db.json").write_text("[]", encoding="utf-8")
    return {"FILE": file, "FOLDER": folder}


def test_there_are_recipes():
    assert {"hotel-lora.yaml", "hotel-crosswoz.yaml", "tiny-zh-base.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_header_says_purpose_command_hardware_and_memory(recipe: Path):
    said = header(recipe)
    assert not [word for word in HEADER if not re.search(rf"^# {word}:", said, re.M)]
    assert f"weitiao train recipes/{recipe.name}" in said


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_it_dry_runs(recipe: Path, stand_ins: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    needs = NEEDED.findall(header(recipe))
    words = [f"{key}={stand_ins[kind]}" for key, kind in needs]
    assert cli.main(["train", str(recipe), *words, "--dry-run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["output"] == load(recipe, words)[0].output


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_what_it_needs_is_asked_for(recipe: Path, capsys: pytest.CaptureFixture[str]):
    if needs := NEEDED.findall(header(recipe)):
        assert cli.main(["train", str(recipe), "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert not [key for key, _ in needs if key not in said]


def test_every_recipe_is_in_the_table():
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in RECIPES if f"({path.name})" not in table]


@pytest.fixture
def crosswoz(tmp_path: Path) -> Path:
    """The first of CrossWOZ's dialogues and its whole database."""
    if not CROSSWOZ.is_dir():
        pytest.skip("CrossWOZ is not here")
    folder = tmp_path / "crosswoz"
    folder.mkdir()
    for part, count in (("train", 8), ("validation", 2)):
        name = f"hotel_dialogues.{part}.jsonl"
        lines = (CROSSWOZ / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    (folder / "hotel_db.json").write_bytes((CROSSWOZ / "hotel_db.json").read_bytes())
    return folder


SMALL = ["data.validation=null", "data.max_length=auto", "data.allow_truncated=1", "train.batch_size=4"]


@pytest.mark.parametrize(
    ("name", "family", "words"),
    [
        ("hotel-llama2", "llama", ["method.rank=2"]),
        ("hotel-chatglm3", "glm", ["method.tokens=4"]),
    ],
)
def test_the_large_ones_run_whole_at_a_tiny_shape(
    name: str, family: str, words: list[str], crosswoz: Path, tmp_path: Path
):
    base = tiny.make(family, tmp_path / "base")
    words = [*words, *SMALL, f"model.path={base}", f"data.folder={crosswoz}", "evaluate.max_new_tokens=4"]
    recipe, tree = load(ROOT / "recipes" / f"{name}.yaml", [*words, f"output={tmp_path / 'run'}"])
    result = run(recipe, tree=tree)
    assert result.fit.steps > 0 and (result.run.path / "adapter" / "adapter_config.json").is_file()
    assert result.figures and (result.run.path / "predictions.jsonl").read_text()


def test_gpt2_is_made_from_text_alone(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny.SENTENCES * 40), encoding="utf-8")
    small = ["n_layer=2", "n_embd=64", "n_head=2", "n_positions=64"]
    words = [f"model.config.{word}" for word in small]
    words += ["model.tokenizer.vocab_size=400", "data.max_length=64", "train.batch_size=8", "train.learning_rate=1e-2"]
    words += [f"data.train={text}", f"output={tmp_path / 'run'}", "train.warmup_steps=0"]
    recipe, tree = load(ROOT / "recipes" / "gpt2-pretrain.yaml", words)
    result = run(recipe, tree=tree)
    losses = [line["loss"] for line in result.run.metrics() if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert Tokenizer.from_file(str(result.run.path / "model" / "tokenizer.json")).get_vocab_size() <= 400


def test_gpt2_tells_the_sentiment_of_tweets(tmp_path: Path):
    """Rows of the hub set's form: labels are numbers, and columns beside them are left alone."""
    moods = {0: ["sad", "awful"], 1: ["monday", "lunch"], 2: ["love", "great"]}
    said = [f"{number} {text}" for number in range(9) for text in ("so {}", "{} again", "omg {} !!", "just {} really")]
    lines = [
        {"id": f"{word}-{number}", "text": text.format(word), "label": label, "label_text": "?"}
        for label, words in moods.items()
        for number, (word, text) in enumerate(product(words, said))
    ]
    rows = tmp_path / "tweets.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    base = tiny.make("gpt2", tmp_path / "base")
    small = ["train.batch_size=8", "train.warmup_steps=5", "train.epochs=6", "train.learning_rate=5e-3"]
    words = [*small, f"model.path={base}", "method.rank=8", f"data.train={rows}", f"output={tmp_path / 'run'}"]
    recipe, tree = load(ROOT / "recipes" / "tweet-sentiment.yaml", words)
    result = run(recipe, tree=tree)
    assert (result.fit.best_metric or 0.0) > 0.9  # macro F1
    config = json.loads((result.run.path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS"
