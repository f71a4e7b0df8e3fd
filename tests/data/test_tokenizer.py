"""Trained tokenizers: what comes back exactly, what is never joined, and the same bytes for the same text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from weitiao.config import build
from weitiao.data.tokenizer import TokenizerOptions, measure, train
from weitiao.errors import InputError

KINDS = ("bpe", "wordpiece", "unigram", "word", "char", "sentencepiece", "sentencepiece-bpe")
TEXTS = [
    "你好，我想预订一家北京的酒店，价格在400-500元之间。",
    "好的，为您找到北京饭店，评分4.7分，电话是010-65137766。",
    "The hotel has free wifi, and the hotel is near the station.",
    "酒店的设施有免费wifi、停车场和健身房。",
] * 20
ODD = [
    "双  空格\n\n\t 制表 a b",
    "👩‍👩‍👧 🇨🇳 é é ﷽ 龘𠮷",
    " leading and trailing ",
    "a\r\nb\x00\x01　全角",
    "▁x ##y <pad> </s>",
    "",
]


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def back(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    options = TokenizerOptions(vocab_size=500, isolate_chinese=True, isolate_digits=True, special_tokens=["<|user|>"])
    return tokenizer_of(train(TEXTS, options, tmp_path_factory.mktemp("bpe")))


@pytest.mark.parametrize("text", ODD)
def test_bpe_gives_every_text_back(bpe: Tokenizer, text: str):
    assert back(bpe, text) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200)
def test_bpe_gives_any_unicode_back(bpe: Tokenizer, text: str):
    assert back(bpe, text) == text


def test_isolated_characters_and_digits_are_never_joined(bpe: Tokenizer):
    encoding = bpe.encode("酒店酒店酒店400500 hotel", add_special_tokens=False)
    pieces = [bpe.decode([id]) for id in encoding.ids]
    assert pieces[:12] == [*"酒店酒店酒店", *"400500"]
    for id in range(bpe.get_vocab_size()):
        text = bpe.decode([id], skip_special_tokens=False)
        assert sum("一" <= char <= "鿿" for char in text) <= 1
        assert len(text) == 1 or not any(char.isdigit() for char in text)


def test_an_isolated_word_is_the_same_tokens_wherever_it_stands(tmp_path: Path):
    texts = ['find(min_price, kind) {"min_price": 1300, "score": 4.6}', "从1300元到4.6分，min_price 1300"] * 3
    options = TokenizerOptions(vocab_size=600, isolate_chinese=True, isolate_words=True)
    tokenizer = tokenizer_of(train(texts, options, tmp_path))
    alone = {word: tokenizer.encode(word).ids for word in ("min_price", "1300", "4.6", "77.25", "price_new")}
    assert [len(alone[word]) for word in ("min_price", "1300", "4.6")] == [1, 1, 1]
    for word, ids in alone.items():
        for before, after in ((" ", ","), ('"', '": '), ("（", "元"), ("\n", "\n"), (", ", "…")):
            found = tokenizer.encode(before + word + after).ids
            assert any(found[start : start + len(ids)] == ids for start in range(len(found))), (before, word)
            assert back(tokenizer, before + word + after) == before + word + after
    assert all(back(tokenizer, text) == text for text in (*texts, *ODD))


def test_without_isolation_frequent_chinese_words_are_one_token(tmp_path: Path):
    tokenizer = tokenizer_of(train(TEXTS, TokenizerOptions(vocab_size=500), tmp_path))
    assert "酒店" in {tokenizer.decode([id]) for id in range(tokenizer.get_vocab_size())}


def test_frequent_characters_are_one_token_and_rare_ones_bytes(bpe: Tokenizer):
    assert all(len(bpe.encode(char).ids) == 1 for text in TEXTS for char in text)
    assert len(bpe.encode("龘").ids) == 3


def test_a_special_token_is_never_cut(bpe: Tokenizer):
    assert bpe.encode("酒店<|user|>酒店", add_special_tokens=False).tokens.count("<|user|>") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_bytes(kind: str, tmp_path: Path):
    options = build(TokenizerOptions, {"kind": kind, "vocab_size": 400, "special_tokens": ["<|a|>"]})
    first, second, third = (train(iter(TEXTS), options, tmp_path / name) for name in "abc")
    files = sorted(path.name for path in first.iterdir())
    written = {"special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
    assert {*files} == written | ({"tokenizer.model"} if kind.startswith("sentencepiece") else set())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes() == (third / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [300, 5000])
def test_the_vocabulary_is_no_larger_than_asked(kind: str, size: int, tmp_path: Path):
    options = build(TokenizerOptions, {"kind": kind, "vocab_size": size})
    folder = train(TEXTS, options, tmp_path)
    vocab = tokenizer_of(folder).get_vocab()
    assert len(vocab) <= size
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert [vocab[token] for token in options.fixed_tokens()] == list(range(len(options.fixed_tokens())))


@pytest.mark.parametrize("kind", ["unigram", "char"])
def test_kinds_that_keep_spaces_give_known_text_back(kind: str, tmp_path: Path):
    options = build(TokenizerOptions, {"kind": kind, "vocab_size": 400})
    tokenizer = tokenizer_of(train(TEXTS, options, tmp_path))
    assert all(back(tokenizer, text) == text for text in TEXTS)
    assert back(tokenizer, "龘酒店").startswith(options.unk_token)


def test_wordpiece_and_word_cut_as_they_say(tmp_path: Path):
    wordpiece = tokenizer_of(
        train(["hotel hotels", "hotel hotels"], TokenizerOptions(kind="wordpiece", vocab_size=60), tmp_path / "a")
    )
    assert wordpiece.encode("hotels").tokens in (["hotels"], ["hotel", "##s"])
    word = tokenizer_of(train(["a bb a", "a bb"], TokenizerOptions(kind="word", vocab_size=60), tmp_path / "b"))
    assert word.encode("a bb c").tokens == ["a", "bb", "<unk>"]


def test_wordpiece_has_no_special_tokens_but_its_own(tmp_path: Path):
    options = TokenizerOptions(kind="wordpiece", vocab_size=200)
    tokenizer = tokenizer_of(train(TEXTS, options, tmp_path))
    assert {token.content for token in tokenizer.get_added_tokens_decoder().values()} == set(options.fixed_tokens())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_folder(kind: str, tmp_path: Path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    template = "{% for message in messages %}<|user|>{{ message.content }}{{ eos_token }}{% endfor %}"
    values = {"kind": kind, "vocab_size": 400, "special_tokens": ["<|user|>"], "chat_template": template}
    folder = train(TEXTS, build(TokenizerOptions, values), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.unk_token == (None if kind == "bpe" else "<unk>")
    assert "<|user|>" in tokenizer.all_special_tokens
    assert tokenizer.chat_template == template
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert ids == tokenizer_of(folder).encode(TEXTS[0], add_special_tokens=False).ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|user|>x</s>"


def test_a_chat_template_may_be_a_file(tmp_path: Path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}", encoding="utf-8")
    options = TokenizerOptions(vocab_size=300, chat_template=str(tmp_path / "chat.jinja"))
    folder = train(TEXTS, options, tmp_path / "out")
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages }}"
    with pytest.raises(InputError, match=r"none\.jinja"):
        train(TEXTS, options.model_copy(update={"chat_template": str(tmp_path / "none.jinja")}), tmp_path / "out")


@pytest.mark.parametrize("texts", [[], [""]])
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_an_error(kind: str, texts: list[str], tmp_path: Path):
    with pytest.raises(InputError, match="no text"):
        train(texts, build(TokenizerOptions, {"kind": kind, "vocab_size": 300}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"vocab_size": 200}, {"kind": "char", "vocab_size": 4}, {"special_tokens": [""]}])
def test_options_that_cannot_work_are_refused(values: dict):
    with pytest.raises(InputError):
        build(TokenizerOptions, values)


def test_measure_counts_what_is_lost(tmp_path: Path):
    tokenizer = tokenizer_of(train(["ab ab"], TokenizerOptions(kind="char", vocab_size=50), tmp_path))
    found = measure(tokenizer, ["ab", "ax"])
    assert found["characters"] == found["tokens"] == 4
    assert (found["unknown_tokens"], found["round_trip_errors"], found["texts"]) == (1, 1, 2)


def test_texts_are_read_once(tmp_path: Path):
    read = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    train(texts(), TokenizerOptions(kind="unigram", vocab_size=300), tmp_path)
    assert len(read) == len(TEXTS)


def test_the_verb_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from weitiao.cli import main

    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(TEXTS), encoding="utf-8")
    words = ["tokenizer", "train", str(rows), "--vocab-size", "320", "--output", str(tmp_path / "t"), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["round_trip_errors"] == 0 and found["vocabulary"] == 320 and found["texts"] == len(TEXTS)
    assert found["tokens_per_character"] == round(found["tokens"] / found["characters"], 4)
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--kind", "bqe"]) == 2
