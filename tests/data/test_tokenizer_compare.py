"""Comparing tokenizers: figures checked by hand on tokenizers that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weitiao.cli import main
from weitiao.data.tokenizer import TokenizerOptions, train
from weitiao.data.tokenizer_compare import measure, samples
from weitiao.models.load import load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = ["你好你好你好", "hello hello"] * 9
    kinds: dict[str, Any] = {"bytes": {"kind": "bpe", "vocab_size": 262}, "char": {"kind": "char", "vocab_size": 60}}
    return {name: train(texts, TokenizerOptions(**options), folder / name) for name, options in kinds.items()}


def test_figures_by_hand(folders: dict[str, Path]):
    found = measure(load_tokenizer(folders["char"]), ["你好龘", "你a"])
    assert (found["characters"], found["tokens"], found["unknown_tokens"]) == (5, 5, 2)
    assert found["round_trip_errors"] == 2 and found["han"] == 4 and found["split_han"] == 0
    assert found["bytes_per_token"] == round(13 / 5, 4)
    found = measure(load_tokenizer(folders["bytes"]), ["龘好", "龘龘"])
    assert (found["unknown_tokens"], found["round_trip_errors"]) == (0, 0)
    assert found["split_han"] >= 0.75 and found["split_han_kinds"] >= 0.5 and found["characters_per_second"] > 0


def test_the_verb(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names, html = [str(folder) for folder in folders.values()], tmp_path / "page.html"
    assert main(["tokenizer", "compare", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tokenizers"]
    assert list(found) == names and all(set(one["kinds"]) == set(samples()) for one in found.values())
    text = tmp_path / "news.txt"
    text.write_text("你好\nhello\n", encoding="utf-8")
    assert main(["tokenizer", "compare", *names, "--text", f"zh={text}", "--text", str(text), "--html", str(html)]) == 0
    assert "news" in capsys.readouterr().out and "<svg" in html.read_text(encoding="utf-8")
    assert main(["tokenizer", "compare", str(tmp_path / "none"), str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("error: ") >= 2
