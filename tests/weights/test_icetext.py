"""ChatGLM-6B's tokenizer, id by id against the sentencepiece library behind the published steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.weights.test_sentencepiece import lines
from weitiao.data.render import Renderer
from weitiao.data.rows import Chat, Message
from weitiao.errors import InputError
from weitiao.models.load import load_tokenizer
from weitiao.weights import icetext

library = pytest.importorskip("sentencepiece")

SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
BLANKS = [f"<|blank_{count}|>" for count in range(2, 81)]
TEXTS = [
    "[Round 0]\n问：你好\n答：您好，请问有什么可以帮您？\n[Round 1]\n问：价格在300元以下\n答：",
    "def main():\n    print('hello')\t# greeting\n\n\n",
    "\n两行\n",
    "\t tab",
    "a  b   c" + " " * 81 + "d" + " " * 200,
    " one space, then two  ",
    "　ＡＢＣ　　１２３　",
    "龘 🙂 é",
    "<n> and <|tab|> and <|blank_3|> as they stand",
    "",
]


def preprocessed(text: str) -> str:
    """Published: spaces that carry meaning become words, the longest first."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for count in range(80, 1, -1):
        text = text.replace(" " * count, f"<|blank_{count}|>")
    return text


def postprocessed(text: str) -> str:
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    for count in range(2, 81):
        text = text.replace(f"<|blank_{count}|>", " " * count)
    return text


def trained(folder: Path, special: list[str] = SPECIAL, **settings: str) -> Path:
    """A small ice_text.model: the same kinds of pieces as in the published one."""
    (folder / "text").write_text("\n".join(preprocessed(line) for line in lines(0, 200)), encoding="utf-8")
    library.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "ice_text"),
        vocab_size=2500,
        byte_fallback=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        pad_id=3,
        split_digits=True,
        user_defined_symbols=["<n>", *special, "<|tab|>", *BLANKS],
        minloglevel=2,
        **settings,
    )
    return folder


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("ice"), model_type=request.param)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


def test_every_text_is_cut_as_published(folder: Path, tokenizer: PreTrainedTokenizerFast):
    theirs = library.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    for text in [*lines(1, 40), *TEXTS]:
        wanted = theirs.encode(preprocessed(text))
        found = tokenizer(text, add_special_tokens=False).input_ids
        assert found == wanted, (text, tokenizer.convert_ids_to_tokens(found), theirs.id_to_piece(wanted))
        decoded = tokenizer.decode(found, clean_up_tokenization_spaces=False)
        assert decoded == postprocessed(theirs.decode(wanted)), text


def test_ids_are_the_file_s_and_a_prompt_ends_as_published(folder: Path, tokenizer: PreTrainedTokenizerFast):
    theirs = library.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    assert len(tokenizer) == theirs.get_piece_size()
    names = [*SPECIAL, "<pad>", "<unk>"]
    assert tokenizer.convert_tokens_to_ids(names) == [theirs.piece_to_id(name) for name in names]
    ends = [theirs.piece_to_id("[gMASK]"), theirs.piece_to_id("<sop>")]
    assert tokenizer("你好").input_ids == [*theirs.encode("你好"), *ends]
    assert tokenizer("你好", "您好").input_ids[-1] == tokenizer.eos_token_id == theirs.piece_to_id("<eop>")
    assert tokenizer.pad_token_id == 3 and tokenizer.model_max_length == 2048


def test_a_conversation_is_tokenised_as_the_published_training_does(folder: Path, tokenizer: PreTrainedTokenizerFast):
    """Prompt and answer are encoded apart there, each with a space before it."""
    theirs = library.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    question, answer = "请问\n价格多少？", "300元。"
    renderer = Renderer.of(tokenizer)
    (made,) = renderer.renders([Chat((Message("user", question), Message("assistant", answer)))])
    assert not isinstance(made, InputError)
    ((ids, mask),) = [(one.ids, one.mask) for one in made]
    prompt, written = theirs.encode(preprocessed(question)), theirs.encode(preprocessed(answer))
    assert ids == [*prompt, *tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"]), *written, tokenizer.eos_token_id]
    assert mask == [place > len(prompt) + 1 for place in range(len(ids))]
    assert renderer.decode(ids[len(prompt) + 2 :]) == "300元。" and renderer.stop_ids == [tokenizer.eos_token_id]


def test_it_is_saved_as_any_other(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again("a\n  你好").input_ids == tokenizer("a\n  你好").input_ids
    assert again.chat_template == tokenizer.chat_template


def test_older_revisions_and_other_files_are_said(tmp_path: Path):
    (tmp_path / "old").mkdir()
    with pytest.raises(InputError, match="March 2023"):
        load_tokenizer(trained(tmp_path / "old", special=[]))
    (tmp_path / icetext.FILE).write_bytes(b"no model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
