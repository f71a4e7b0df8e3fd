"""Rows on disk: the same examples and the same complaints as in memory, whatever is killed or damaged on the way."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from weitiao.data import columns, mapped, tokenise
from weitiao.data.examples import examples
from weitiao.data.options import DataOptions
from weitiao.data.render import Renderer
from weitiao.data.sources import load
from weitiao.errors import InputError
from weitiao.models.load import load_tokenizer
from weitiao.weights.fetch import embedded

WORDS = "酒店 价格 早餐 免费 北京 地铁 the room is cheap 请问 有没有 可以 推荐 附近 with breakfast 4.6".split()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and pieces so small that a few rows are several."""
    monkeypatch.setattr(tokenise, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(tokenise, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(tokenise, "ROWS_A_COMMIT", 48)
    return tmp_path / "cache"


def words(rng: random.Random, most: int = 30) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def texts(path: Path, rows: int, seed: int = 0, broken: float = 0.0) -> Path:
    rng = random.Random(seed)
    lines = [json.dumps({"text": words(rng), "page": 1}, ensure_ascii=False) for _ in range(rows)]
    path.write_text("".join((line[:5] if rng.random() < broken else line) + "\n" for line in lines), "utf-8")
    return path


def chats(path: Path, rows: int, seed: int = 0, tools: float = 0.0) -> Path:
    rng, schema = random.Random(seed), {"name": "find", "parameters": {"type": "object", "properties": {}}}
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turns = [{"role": "system", "content": words(rng)}] if rng.random() < 0.5 else []
            for _ in range(rng.randint(1, 3)):
                turns += [{"role": "user", "content": words(rng)}, {"role": "assistant", "content": words(rng)}]
            row = {"messages": turns} | ({"group": f"g{number // 3}", "id": f"chat {number}"} if number % 2 else {})
            row |= {"tools": [schema]} if rng.random() < tools else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def alike(said):
    """What is said of rows wherever they are; duplicates, and reasons of bad ones, are said in memory alone."""
    return [line for line in said if not line.startswith(("  ", "exact duplicates"))]


def in_memory(options, task, tokenizer, positions=None, seed=0):
    splits = load(options, task, seed=seed)
    tools = any(getattr(row, "tools", ()) for row in splits.train)
    renderer = Renderer.of(tokenizer, tools=tools, override=options.chat_template)
    parts = (splits.train, splits.validation)
    made = [examples(part, renderer, options, task, max_positions=positions) if part else [] for part in parts]
    return *made, alike(splits.said)


def same(one, two) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.ids, b.ids) and a.ids.dtype == b.ids.dtype
        assert np.array_equal(a.mask, b.mask) and a.mask.dtype == b.mask.dtype
        assert a.id == b.id and a.trained_tokens == b.trained_tokens
    assert [*one.lengths] == [*map(len, two)] and one.tokens == sum(map(len, two))
    assert [*one.trained] == [example.trained_tokens for example in two]
    assert (one.rows, one.truncated, one.masked_out, one.said) == (two.rows, two.truncated, two.masked_out, two.said)


def check(options, task, tokenizer, positions=None, seed=0):
    train, validation, said = in_memory(options, task, tokenizer, positions, seed)
    made = mapped.load(options, task, tokenizer, seed=seed, max_positions=positions)
    same(made.train, train)
    assert bool(validation) == bool(made.validation)
    if validation:
        same(made.validation, validation)
    assert alike(made.said) == said
    return made


@pytest.mark.parametrize("positions", [None, 20])
def test_texts_are_what_they_are_in_memory(tmp_path, tokenizer, positions):
    file = texts(tmp_path / "rows.jsonl", 300)
    check(DataOptions(train=str(file), validation=0.1, test=0.05), "pretrain", tokenizer, positions)


@pytest.mark.parametrize("tools", [0.0, 0.02, 1.0])
def test_chats_are_what_they_are_in_memory(tmp_path, tokenizer, tools):
    file = chats(tmp_path / "rows.jsonl", 150, tools=tools)
    options = DataOptions(train=str(file), validation=0.2, allow_truncated=1, skip_bad=True)
    made = check(options, "sft", tokenizer, positions=90)
    assert made.train.truncated and bool(made.tools) == bool(tools)


def test_several_sources_mixed_and_a_file_to_validate_on(tmp_path, tokenizer):
    one, two = texts(tmp_path / "one.jsonl", 100), texts(tmp_path / "two.jsonl", 70, seed=1)
    sources = [{"path": str(one), "repeat": 2.5}, {"path": str(two), "repeat": 0.5}]
    held = texts(tmp_path / "held.jsonl", 40, seed=2)
    check(DataOptions(train=sources, validation=str(held)), "pretrain", tokenizer, seed=5)


@pytest.mark.parametrize("kind", ["csv", "json", "txt", "parquet"])
def test_every_kind_of_file(tmp_path, tokenizer, kind):
    rng, path = random.Random(3), tmp_path / f"rows.{kind}"
    rows = [{"text": words(rng)} for _ in range(60)]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "\n".join(row["text"] for row in rows)
        path.write_text({"json": json.dumps(rows), "csv": "text\n" + lines, "txt": lines}[kind], "utf-8")
    check(DataOptions(train=str(path), validation=0.1), "pretrain", tokenizer)


@pytest.mark.parametrize("skip", [False, True])
def test_broken_lines_are_counted_and_the_first_named(tmp_path, tokenizer, skip):
    file = texts(tmp_path / "rows.jsonl", 2000, broken=0.05)
    options = DataOptions(train=str(file), validation=0.1, skip_bad=skip)
    if skip:
        check(options, "pretrain", tokenizer)
        return
    with pytest.raises(InputError) as here:
        mapped.load(options, "pretrain", tokenizer)
    with pytest.raises(InputError) as there:
        load(options, "pretrain")
    assert here.value.problems[-1] == there.value.problems[-1] and len(here.value.problems) == 22
    assert set(here.value.problems[:3]) == set(there.value.problems[:3])
    check(options.model_copy(update={"skip_bad": True}), "pretrain", tokenizer)  # and goes on from there


def test_complaints_of_rows_are_the_same(tmp_path, tokenizer):
    file = chats(tmp_path / "rows.jsonl", 100)
    options = DataOptions(train=str(file), validation=None, max_length=40)
    with pytest.raises(InputError) as there:
        in_memory(options, "sft", tokenizer)
    with pytest.raises(InputError) as here:
        mapped.load(options, "sft", tokenizer)
    assert here.value.problems == there.value.problems
    plain = texts(tmp_path / "plain.jsonl", 5)
    with pytest.raises(InputError, match=r"plain.jsonl:1: is plain text"):
        mapped.load(DataOptions(train=str(plain)), "sft", tokenizer)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("place", [0, 1, 4, 9, 15])
def test_a_killed_run_goes_on_behind_the_last_commit(tmp_path, tokenizer, monkeypatch, place):
    file = texts(tmp_path / "rows.jsonl", 300, broken=0.01)
    options = DataOptions(train=str(file), validation=0.1, skip_bad=True)
    made, rows, real = [0], [0], tokenise.piece_of

    def killed(some, job):
        if made[0] == place:
            raise Killed
        made[0] += 1
        return real(some, job)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(tokenise, "piece_of", killed)
        mapped.load(options, "pretrain", tokenizer)

    def counted(some, job):
        rows[0] += len(some)
        return real(some, job)

    monkeypatch.setattr(tokenise, "piece_of", counted)
    made_of = check(options, "pretrain", tokenizer)
    assert rows[0] == len(made_of.train) + len(made_of.validation) - place // 3 * 48
    rows[0] = 0
    check(options, "pretrain", tokenizer)
    assert rows[0] == 0


def columns_of(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("tokens/*/*") if path.name != ".lock" and path.parent.name != "files")


@pytest.mark.parametrize("fault", ["flip", "cut", "journal", "lost"])
def test_a_damaged_cache_is_made_again(tmp_path, tokenizer, cache, fault):
    file = texts(tmp_path / "rows.jsonl", 200)
    options = DataOptions(train=str(file), validation=0.1)
    check(options, "pretrain", tokenizer)
    for path in columns_of(cache):
        if not path.stat().st_size or (fault == "journal") != (path.name == "journal"):
            continue
        content = bytearray(path.read_bytes())
        content[random.Random(path.name).randrange(len(content))] ^= 4
        path.unlink() if fault == "lost" else path.write_bytes(content[:-1] if fault == "cut" else content)
        check(options, "pretrain", tokenizer)


def test_files_that_have_not_changed_are_not_summed_again(tmp_path, tokenizer, monkeypatch):
    options = DataOptions(train=str(texts(tmp_path / "rows.jsonl", 60)), memory_map="on")
    first, summed = mapped.load(options, "pretrain", tokenizer).train, []
    monkeypatch.setattr(columns, "_sum", lambda *given: summed.append(given))
    again = mapped.load(options, "pretrain", tokenizer).train
    assert again.digest == first.digest and again[7].ids.tolist() == first[7].ids.tolist() and not summed


def test_what_is_stored_follows_from_content_and_options(tmp_path, tokenizer, cache):
    file = texts(tmp_path / "rows.jsonl", 60)
    options = DataOptions(train=str(file), validation=0.1)

    def stores() -> int:
        return len([path for path in (cache / "tokens").iterdir() if path.name != "files"])

    first = check(options, "pretrain", tokenizer).train.digest
    shutil.copy(file, tmp_path / "moved.jsonl")
    moved = check(options.model_copy(update={"train": str(tmp_path / "moved.jsonl")}), "pretrain", tokenizer)
    assert stores() == 1 and moved.train.digest == first and moved.train[0].id.startswith(str(tmp_path / "moved"))
    check(options.model_copy(update={"max_length": 9}), "pretrain", tokenizer)
    assert stores() == 2
    with file.open("a") as grown:
        grown.write('{"text": "one more"}\n')
    assert check(options, "pretrain", tokenizer).train.digest != first
    assert stores() == 3


def test_what_cannot_be_mapped_says_why(tmp_path):
    file = texts(tmp_path / "rows.jsonl", 3)
    on = DataOptions(train=str(file), memory_map="on")
    assert mapped.applies(on, "pretrain") and not mapped.applies(DataOptions(train=str(file)), "pretrain")
    with pytest.raises(InputError, match="memory_map"):
        mapped.applies(on, "classify")
    with pytest.raises(InputError, match="memory_map"):
        mapped.applies(on.model_copy(update={"train": "generate:x"}), "sft")
