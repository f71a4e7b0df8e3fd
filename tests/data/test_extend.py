"""A tokenizer that grew: old ids stay, new text takes fewer tokens, and the new rows are what they should be."""

import json
from pathlib import Path

import pytest
import torch

from weitiao.cli import main
from weitiao.data.extend import extend, grow
from weitiao.data.tokenizer import TokenizerOptions, train
from weitiao.errors import InputError
from weitiao.models import tiny
from weitiao.models.load import ModelOptions, load, load_tokenizer
from weitiao.models.modules import embedding

OLD = ["the price of a room is 300", "rooms and prices of the hotel", "a room for two nights in the hotel"] * 4
NEW = ["酒店有停车场，停车场免费", "酒店的停车场很大", "请问酒店有早餐吗", "酒店 酒店"] * 5


def tokenizer(kind: str, folder: Path):
    """One of ``kind`` that has read English only."""
    options = TokenizerOptions(kind=kind, vocab_size=300 if kind == "bpe" else 60)
    return load_tokenizer(train(OLD, options, folder)).backend_tokenizer


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "word"])
def test_old_tokens_stay_and_new_text_takes_fewer(kind: str, tmp_path: Path):
    before = tokenizer(kind, tmp_path)
    grown = grow(before, NEW, count=40)
    after = grown.tokenizer
    old = before.get_vocab(with_added_tokens=True)
    assert {token: after.token_to_id(token) for token in old} == old
    assert [after.token_to_id(piece.text) for piece in grown.pieces] == [
        *range(grown.first, grown.first + len(grown.pieces))
    ]
    for text in OLD:
        assert after.encode(text).ids == before.encode(text).ids
    lengths = [sum(len(tok.encode(text).ids) for text in NEW) for tok in (before, after)]
    assert kind != "bpe" or lengths[1] < 0.7 * lengths[0]  # of the other kinds, one unknown token stood for many
    unknown = before.token_to_id("<unk>")
    assert kind == "bpe" or any(unknown in before.encode(text).ids for text in NEW)
    assert not any(unknown in after.encode(text).ids for text in NEW)
    used = {one for text in NEW for one in after.encode(text).ids}
    assert len(used.intersection(range(grown.first, grown.first + 40))) > 3
    for text in NEW:
        assert after.decode(after.encode(text).ids).replace(" ", "") == text.replace(" ", "")
    assert grow(before, NEW, count=40).tokenizer.to_str() == after.to_str()


def test_byte_fallback_becomes_characters(tmp_path: Path):
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {"<unk>": 0} | {f"<0x{n:02X}>": n + 1 for n in range(256)} | {"▁": 257, "a": 258}
    before = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    before.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    before.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    before.add_special_tokens(["</s>"])
    assert len(before.encode("酒店").ids) == 7
    grown = grow(before, ["酒店 酒店", "a酒"], count=10)
    assert {piece.text for piece in grown.pieces} >= {"酒", "店", "▁酒店"}
    assert len(grown.tokenizer.encode("酒店").ids) <= 2
    assert grown.tokenizer.decode(grown.tokenizer.encode("a酒店").ids).strip() == "a酒店"
    character = next(piece for piece in grown.pieces if piece.text == "酒")
    assert list(character.old) == [byte + 1 for byte in "酒".encode()]
    assert grown.tokenizer.token_to_id("</s>") == before.token_to_id("</s>") == 259


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert"])
def test_the_model_has_rows_for_them(family: str, tmp_path: Path):
    folder = tiny.make(family, tmp_path / "base")
    grown, before = extend(str(folder), NEW, tmp_path / "wide", count=30)
    base, wide = (load(ModelOptions(path=str(path), dtype="float32")) for path in (folder, tmp_path / "wide"))
    words = load_tokenizer(tmp_path / "wide")
    assert wide.config.vocab_size == max(base.config.vocab_size, grown.first + len(grown.pieces))
    old, new = embedding(base).weight, embedding(wide).weight
    assert torch.equal(new[: grown.first], old[: grown.first])
    for row, piece in enumerate(grown.pieces):
        if piece.old:
            torch.testing.assert_close(new[grown.first + row], old[list(piece.old)].mean(0))
        else:
            assert 0.2 < new[grown.first + row].std() / old.std() < 3
    ids = torch.tensor([before.encode("the price of a room").ids])
    assert words("the price of a room").input_ids == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits[..., : grown.first], base(ids).logits[..., : grown.first])
    assert words(NEW[0]).input_ids == grown.tokenizer.encode(NEW[0]).ids
    assert words.chat_template == load_tokenizer(folder).chat_template


def test_the_verb_says_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in NEW))
    base = tiny.make("qwen2", tmp_path / "base")
    words = ["tokenizer", "extend", str(base), str(rows), "--output", str(tmp_path / "wide"), "--tokens", "9"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["new_tokens"] == 9 and said["after"]["tokens"] < said["before"]["tokens"]
    assert len(load_tokenizer(tmp_path / "wide")) == said["after"]["vocabulary"]
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_cannot_be_is_said(tmp_path: Path):
    with pytest.raises(InputError, match="no new tokens"):
        grow(tokenizer("bpe", tmp_path / "a"), ["x"], count=10)
    folder = tiny.make("llama", tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="quantised"):
        extend(str(folder), NEW, tmp_path / "c", count=10)
