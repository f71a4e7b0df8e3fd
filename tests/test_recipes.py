"""Every shipped recipe says what it is for, loads, and dry-runs with what its header says it needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from weitiao import cli
from weitiao.recipe import load

ROOT = Path(__file__).parent.parent
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
