"""Cleaning: every kind of broken row is rejected with its reason, nothing is lost, nothing sound is taken out."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.cli import main
from weitiao.data.clean import CleanOptions, mended
from weitiao.data.encodings import broken

CHINESE = "你好，世界。今天天气很好，请问酒店几点入住？"


@pytest.mark.parametrize(
    ("written", "read"), [("utf-8", "latin-1"), ("utf-8", "cp1252"), ("utf-8", "gbk"), ("gbk", "latin-1")]
)
@given(
    st.lists(
        st.sampled_from([*"你好世界酒店价格设施评分地址电话可以没有我们早上"]), min_size=4, max_size=12, unique=True
    )
)
@settings(max_examples=60, deadline=None)
def test_chinese_that_was_decoded_wrongly_comes_back(written: str, read: str, characters: list[str]):
    text = "".join(characters) + "好" * (len(characters) % 2)  # GBK takes bytes in pairs
    try:
        wrong = text.encode(written).decode(read)
    except UnicodeDecodeError:
        return
    found = broken(wrong)
    assert found == text or (found == "" and written == "utf-8" and read == "gbk")


@pytest.mark.parametrize(
    "text",
    [
        CHINESE,
        "CAFÉ» naïve façade — “quoted”…",
        "Ça alors, «élève» déjà à l'été, São Paulo ÁÉÍÓÚ",
        "Žluťoučký kůň úpěl ďábelské ódy",
        "Größe über 20 °C, Привет, Ελληνικά",
        "日本語のテキスト 한국어 텍스트 👩‍👩‍👧 £½¼¾",
        "plain ASCII",
    ],
)
def test_sound_text_is_left_alone(text: str):
    assert broken(text) is None
    assert mended({"a": [text]}, CleanOptions(controls="remove", encodings="repair")) == {"a": [text]}


@pytest.mark.parametrize("text", ["锟斤拷锟斤拷", "你\ufffd好", "烫烫烫烫"])
def test_what_is_lost_cannot_be_repaired(text: str):
    assert broken(text) == ""


def row(question: str, answer: str, **more: Any) -> str:
    return json.dumps({"question": question, "answer": answer, **more}, ensure_ascii=False)


def words(seed: int, length: int = 60) -> str:
    return "".join(chr(0x4E00 + Random(f"{seed} {place}").randrange(3000)) for place in range(length))


def test_every_kind_is_rejected_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    near = words(1)
    lines = {
        "sound": row("几点开门？", "八点。", extra=1),
        "control_characters": row("几点\x07关门？", "十点。"),
        "encoding": row("地址？".encode().decode("latin-1"), "在人民路。"),
        "encoding 2": row("电话\ufffd？", "没有。"),
        "empty_answer": row("能停车吗？", "  "),
        "unreadable": '{"question": "x", ',
        "unreadable 2": '{"question": "\\ud83d", "answer": "x"}',
        "invalid": json.dumps({"question": "x"}),
        "duplicate": row("几点开门？", "八点。", extra=2),
        "too_long": row("长" * 300, "短"),
        "near": row(near, "好"),
        "near_duplicate": row(near[:-1] + "！？改", "好"),
        "leak": row("测试里的问题", "测试里的回答"),
    }
    file, test = tmp_path / "rows.jsonl", tmp_path / "test.jsonl"
    file.write_bytes(("\n".join(lines.values()) + "\n").encode() + b'{"question": "\xff", "answer": "x"}\n')
    test.write_text(lines["leak"] + "\n", encoding="utf-8")
    before = file.read_bytes()
    assert main(["data", "clean", str(file), "--against", str(test), "--max-characters", "200", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    kept = (tmp_path / "rows.clean.jsonl").read_text(encoding="utf-8").splitlines()
    assert kept == [lines["sound"], lines["near"]] and report["kept"] == 2
    rejects = [json.loads(line) for line in (tmp_path / "rows.rejects.jsonl").read_text("utf-8").splitlines()]
    found = {int(one["where"].rpartition(":")[2]): one for one in rejects}
    for number, name in enumerate(lines, 1):
        if name not in ("sound", "near"):
            assert found[number]["kinds"] == [name.partition(" ")[0]] and found[number]["why"], name
            stored = found[number]["row"]
            assert stored in (lines[name], json.loads(lines[name]) if "unreadable" not in name else "")
    assert found[len(lines) + 1]["kinds"] == ["unreadable"] and "\\xff" in found[len(lines) + 1]["row"]
    assert len(rejects) == report["rejected"] == len(lines) - 1 and file.read_bytes() == before
    assert main(["data", "clean", str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_what_can_be_repaired_is(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    rows = [row("几点\x00开门？", "八点。"), row("地址在哪里？".encode().decode("cp1252", "ignore"), "在人民路。")]
    file.write_text("\n".join([*rows, row("电话", "010")]), encoding="utf-8")
    assert main(["data", "clean", str(file), "--controls", "remove", "--encodings", "repair"]) == 0
    kept = [json.loads(line) for line in (tmp_path / "rows.clean.jsonl").read_text("utf-8").splitlines()]
    assert [one["question"] for one in kept][0::2] == ["几点开门？", "电话"] and kept[1]["answer"] == "在人民路。"


def test_bad_options_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "rows.jsonl"
    file.write_text(row("a", "b"), encoding="utf-8")
    assert main(["data", "clean", str(file), "--encodings", "mend", "--near", "2"]) == 2
    err = capsys.readouterr().err
    assert "encodings" in err and "near" in err


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_whatever_is_broken(seed: int, tmp_path: Path):
    random = Random(seed)
    lines = [
        row(words(seed * 100 + place, random.randrange(1, 40)), random.choice(["好", "", "\x01"]))
        for place in range(80)
    ]
    raw = [bytearray(line.encode()) for line in lines]
    for line in random.sample(raw, 25):
        for _ in range(random.randrange(1, 4)):
            line[random.randrange(len(line))] = random.choice([b for b in range(256) if b not in (10, 13)])
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(raw) + b"\n")
    assert main(["data", "clean", str(file)]) == 0
    counts = [len((tmp_path / f"rows.{name}.jsonl").read_text("utf-8").splitlines()) for name in ("clean", "rejects")]
    assert sum(counts) == 80 and all(counts)
