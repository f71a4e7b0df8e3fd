"""SentencePiece files and jieba's words: what is written cuts as the libraries themselves cut."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from weitiao.cli import main
from weitiao.config import build
from weitiao.data.extend import extend, grow
from weitiao.data.tokenizer import TokenizerOptions, train
from weitiao.data.tokenizer_sentencepiece import differing, grown
from weitiao.errors import InputError
from weitiao.models import tiny

TEXTS = [
    "你好，我想预订一家北京的酒店，价格在400-500元之间。",
    "The hotel has free wifi, and the hotel is near the station.",
    "酒店的设施有免费wifi、停车场和健身房。\n第二行  两个空格",
] * 20
ODD = ["双  空格\n\n\t 制表 a b", " é 龘𠮷 🇨🇳 ", "ＡＢＣ　１２３", "", "hotel酒店400", "<s>x</s>"]


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def made(kind: str, folder: Path, texts: list[str] = TEXTS, **options: object) -> Path:
    values = {"kind": kind, "vocab_size": 420, "special_tokens": ["<|user|>"], **options}
    return train(texts, build(TokenizerOptions, values), folder)


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-bpe"])
@pytest.mark.parametrize("isolated", [False, True])
def test_both_files_of_a_sentencepiece_folder_cut_alike(kind: str, isolated: bool, tmp_path: Path):
    folder = made(kind, tmp_path, isolate_chinese=isolated, isolate_digits=isolated, isolate_words=isolated)
    library, ours = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), tokenizer_of(folder)
    assert [library.IdToPiece(place) for place in range(5)] == ["<pad>", "<unk>", "<s>", "</s>", "<|user|>"]
    for text in [*TEXTS[:3], *ODD[:-1]]:  # the library takes no special token from a text
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == library.EncodeAsIds(text)
        assert ours.decode(ids, skip_special_tokens=False) == text == library.DecodeIds(ids)
    assert ours.encode("酒<|user|>店").tokens.count("<|user|>") == 1
    pieces = [library.IdToPiece(place) for place in range(5, library.GetPieceSize())]
    joined = [piece for piece in pieces if sum("一" <= char <= "鿿" for char in piece) > 1]
    assert bool(joined) != isolated
    assert any(piece.startswith("▁") and piece.strip("▁") for piece in pieces) != isolated


def test_no_common_character_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match="9 times"):
        made("sentencepiece", tmp_path / "a", ["ab"], min_frequency=9)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-bpe"])
def test_a_model_file_grows_with_its_tokenizer(kind: str, tmp_path: Path):
    folder = made(kind, tmp_path / "own", ["the price of a room", "rooms and prices"] * 9, vocab_size=300)
    more = ["酒店有停车场，停车场免费", "酒店的停车场很大 the price"] * 5
    wider = grow(tokenizer_of(folder), more, count=30)
    content = grown((folder / "tokenizer.model").read_bytes(), wider.tokenizer, wider.first)
    assert content is not None and differing(content, wider.tokenizer, [*more, "a room"]) == 0
    library = SentencePieceProcessor()
    library.LoadFromSerializedProto(content)
    assert library.GetPieceSize() == wider.first + len(wider.pieces)
    assert len(library.EncodeAsIds("停车场")) < len("停车场".encode())
    base = tiny.make("llama", tmp_path / "base")
    shutil.copytree(folder, base, dirs_exist_ok=True)
    extend(str(base), more, tmp_path / "wide", count=30)
    assert (tmp_path / "wide" / "tokenizer.model").read_bytes() == content
    other = made("sentencepiece", tmp_path / "other", vocab_size=300)
    assert grown((other / "tokenizer.model").read_bytes(), wider.tokenizer, wider.first) is None


def test_a_model_file_is_compared_like_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = made("sentencepiece", tmp_path)
    assert main(["tokenizer", "compare", str(folder), str(folder / "tokenizer.model"), "--json"]) == 0
    whole, file = json.loads(capsys.readouterr().out)["tokenizers"].values()
    for kind in whole["kinds"]:
        assert whole["kinds"][kind]["tokens"] == file["kinds"][kind]["tokens"]
    (tmp_path / "broken.model").write_bytes(b"nothing of the kind")
    assert main(["tokenizer", "compare", str(tmp_path / "broken.model")]) == 2
    assert "broken.model: not a SentencePiece model" in capsys.readouterr().err


def test_jieba_says_how_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(InputError, match=r"weitiao\[jieba\]"):
        made("jieba", tmp_path)


def test_words_are_cut_as_jieba_cuts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    jieba = pytest.importorskip("jieba")
    text = "我来到北京清华大学，他来到了网易杭研大厦。评分4.7分，hello world 有停车场吗"
    ours = tokenizer_of(made("jieba", tmp_path / "a", [text], min_frequency=1, unk_token="[UNK]"))
    assert ours.encode(text).tokens == jieba.lcut(text)
    assert ours.decode(ours.encode(text).ids) == text
    assert ours.encode("清华有停车场").tokens == [
        *"清华",
        "有",
        "停车场",
    ]  # 清华 alone was not seen
    assert ours.decode(ours.encode("龘").ids, skip_special_tokens=False) == "[UNK]"
    assert ours.encode("我<|user|>我").tokens == ["我", "<|user|>", "我"]
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join([text] * 2), encoding="utf-8")
    words = ["tokenizer", "train", str(rows), "--kind", "jieba", "--output", str(tmp_path / "b")]
    assert main([*words, "model.tokenizer.vocab_size=200"]) == 0
    assert "jieba's words that are one token\t1.0" in capsys.readouterr().out
    assert main([*words, "--overwrite", "isolate_words=true"]) == 2


def test_a_base_takes_no_tokenizer_whose_numbers_mean_other_tokens(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the hotel is near the station"}\n' * 9, encoding="utf-8")
    words = [
        "plan",
        f"model.path={tiny_llama}",
        f"data.train={rows}",
        "task.name=pretrain",
        f"output={tmp_path / 'run'}",
    ]
    made("sentencepiece", tmp_path / "other", vocab_size=300)
    assert main([*words, f"model.tokenizer={tmp_path / 'other'}"]) == 2
    assert "tokens that tiny-llama has learnt have another number in it" in capsys.readouterr().err
    shutil.copytree(tiny_llama, tmp_path / "same")
    assert main([*words, f"model.tokenizer={tmp_path / 'same'}"]) == 0
