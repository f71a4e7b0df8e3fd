"""A SentencePiece model and its tokenizer.json, segment by segment against the sentencepiece library."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from weitiao.demo.drills import arithmetic, copying, sentences
from weitiao.errors import InputError
from weitiao.weights import sentencepiece as ours

library = pytest.importorskip("sentencepiece")

ODD = [
    "",
    " ",
    "hello",
    " hello  world ",
    "价格在300元以下，谢谢！",
    "ＡＢＣ　１２３",
    "tab\there",
    "a\nb\n",
    "🙂龘é",
    "<s>x</s>",
    "▁a",
]
SETTINGS = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "llama": {
        **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
        **{"split_digits": True, "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    },
    "unigram": {"model_type": "unigram"},
    "unigram bytes": {"model_type": "unigram", "byte_fallback": True, "add_dummy_prefix": False},
    "own tokens": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": "[gMASK],<|user|>"},
}


def lines(seed: int, count: int) -> list[str]:
    random_ = random.Random(seed)
    texts = [maker(random_) for _ in range(count) for maker in (sentences, arithmetic, copying)]
    return [line for text in texts for line in text.splitlines() if line]


@pytest.fixture(scope="module", params=SETTINGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(lines(0, 300)), encoding="utf-8")
    library.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=3000,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **SETTINGS[request.param],
    )
    return folder / "tokenizer.model"


def test_every_text_is_cut_as_the_library_cuts_it(model: Path):
    theirs, built = library.SentencePieceProcessor(model_file=str(model)), ours.build(ours.read(model))
    known = [piece for piece, _, kind in ours.read(model).pieces if kind in (ours.UNKNOWN, ours.CONTROL)]
    for text in [*lines(1, 40), *ODD]:
        if not any(piece in text for piece in known):  # special tokens in a text are text to the library
            found = built.encode(text, add_special_tokens=False)
            assert found.ids == theirs.encode(text), (text, found.tokens, theirs.encode(text, out_type=str))
            if theirs.unk_id() not in found.ids:  # which the library shows as a sign of its own
                assert built.decode(found.ids) == theirs.decode(found.ids), text


def test_ids_are_those_of_the_file_and_what_is_added_follows(model: Path, tmp_path: Path):
    ours.convert(model, tmp_path, {"tokens": ["<|assistant|>"], "eos": "</s>"})
    built, theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), library.SentencePieceProcessor()
    theirs.load(str(model))
    assert all(built.token_to_id(theirs.id_to_piece(id)) == id for id in range(theirs.get_piece_size()))
    assert built.token_to_id("<|assistant|>") == theirs.get_piece_size()
    assert built.encode("a<|assistant|>", add_special_tokens=False).ids[-1] == theirs.get_piece_size()


def test_a_file_that_is_something_else_or_cut_short_is_said(model: Path, tmp_path: Path):
    for content in (b"", b"not a model", model.read_bytes()[:-7]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(InputError, match="not a SentencePiece model"):
            ours.read(tmp_path / "tokenizer.model")
