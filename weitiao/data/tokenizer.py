"""Tokenizers trained on a person's own text, written as a folder that ``AutoTokenizer.from_pretrained`` loads.

    options = TokenizerOptions(kind="bpe", vocab_size=5000, isolate_chinese=True, special_tokens=["<|user|>"])
    folder = train(["你好，世界", "hello world"], options, "my-tokenizer")

``bpe`` and the SentencePiece kinds spell in bytes what they never saw, so that any text comes back exactly; the others
map it to ``unk_token``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field, model_validator

from weitiao import config
from weitiao.config import Options, build
from weitiao.data import tokenizer_sentencepiece
from weitiao.data.tokenizer_kinds import BYTES, TRAINERS
from weitiao.errors import InputError, say, t
from weitiao.runs import write_atomic
from weitiao.weights import sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["bpe", "wordpiece", "unigram", "word", "char", "jieba", "sentencepiece", "sentencepiece-bpe"]
KINDS = "bpe, wordpiece, unigram, word, char, jieba, sentencepiece or sentencepiece-bpe"


class TokenizerOptions(Options):
    """How a tokenizer is trained and which names its special tokens have."""

    kind: Kind = Field(
        default="bpe",
        description="bpe: merges of bytes, loses nothing; wordpiece, unigram; word: by spaces; char: characters;"
        " jieba: words as jieba cuts them; sentencepiece, sentencepiece-bpe: unigram or merges, with a tokenizer.model",
    )
    vocab_size: int = Field(
        default=8000, ge=2, description="tokens at most, the special ones and, where bytes are tokens, these included"
    )
    min_frequency: int = Field(
        default=2, ge=1, description="how often a pair, word or character must occur to become a token"
    )
    isolate_chinese: bool = Field(
        default=False, description="no token joins two Chinese characters, or one with anything else"
    )
    isolate_digits: bool = Field(default=False, description="every digit is a token of its own")
    isolate_words: bool = Field(
        default=False,
        description="no token joins a word, name or number with what stands around it, not even a space:"
        " min_price, 1300 and 4.6 are the same tokens wherever they stand",
    )
    special_tokens: list[str] = Field(default=[], description="further tokens that are never cut, such as <|user|>")
    bos_token: str | None = Field(
        default="<s>", description="begins a text; it is never added unless a template says so"
    )
    eos_token: str = Field(default="</s>", description="ends a text or a turn")
    pad_token: str = Field(default="<pad>", description="fills up a batch")
    unk_token: str = Field(
        default="<unk>", description="stands for what was never seen; kind bpe needs none and has none"
    )
    chat_template: str | None = Field(
        default=None, description="a Jinja chat template: its text, or a file that holds it"
    )

    @model_validator(mode="after")
    def _room_for_the_fixed_tokens(self) -> TokenizerOptions:
        needed = len(self.fixed_tokens()) + (BYTES if self.kind == "bpe" else 1)
        needed += BYTES if self.kind in tokenizer_sentencepiece.KINDS else 0
        if any(not token for token in self.fixed_tokens()):
            raise ValueError(t("a special token is empty"))
        if self.kind == "jieba" and (self.isolate_chinese or self.isolate_words or self.isolate_digits):
            raise ValueError(t("kind jieba takes the words that jieba finds; isolate_… are for the other kinds"))
        if self.vocab_size < needed:
            raise ValueError(
                t(
                    "vocab_size is {size}: kind {kind} with {special} special tokens needs at least {needed}",
                    size=self.vocab_size,
                    kind=self.kind,
                    special=len(self.fixed_tokens()),
                    needed=needed,
                )
            )
        return self

    def named_tokens(self) -> dict[str, str]:
        """``pad_token`` and the like with their text, in the order of their ids."""
        names = ["pad_token", "unk_token", "bos_token", "eos_token"]
        if self.kind == "bpe":
            names.remove("unk_token")
        return {name: text for name in names if (text := getattr(self, name)) is not None}

    def fixed_tokens(self) -> list[str]:
        """Every special token once; its index is its id."""
        return list(dict.fromkeys([*self.named_tokens().values(), *self.special_tokens]))


def train(texts: Iterable[str], options: TokenizerOptions, folder: str | Path) -> Path:
    """Train on ``texts`` (any iterable, read once) and write ``folder``: the same texts give the same bytes.

    Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json, of a SentencePiece kind tokenizer.model and,
    if the options have one, chat_template.jinja. InputError when there is no text, or the chat template's file is
    missing.
    """
    template, folder = _chat_template(options.chat_template), Path(folder)
    counted, content = _Counted(texts), b""
    if options.kind in tokenizer_sentencepiece.KINDS:
        content = tokenizer_sentencepiece.train(counted, options)
        tokenizer = None
    else:
        tokenizer = TRAINERS[options.kind](counted, options)
    if not counted.characters:
        raise InputError(t("nothing to train a tokenizer on: there is no text"))
    if tokenizer is None:
        if not content:
            message = "nothing to train a tokenizer on: no character occurs {times} times"
            raise InputError(t(message, times=options.min_frequency))
        write_atomic(folder / tokenizer_sentencepiece.FILES[0], content)
        tokenizer = sentencepiece.build(sentencepiece.read(folder / tokenizer_sentencepiece.FILES[0]))
    named = options.named_tokens()
    extra = [token for token in options.fixed_tokens() if token not in named.values()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        **named,
    }
    special = named | ({"additional_special_tokens": extra} if extra else {})
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_atomic(folder / "tokenizer_config.json", _json(config))
    write_atomic(folder / "special_tokens_map.json", _json(special))
    if template is not None:
        write_atomic(folder / "chat_template.jinja", template)
    return folder


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _chat_template(given: str | None) -> str | None:
    """The template's text: anything with a Jinja bracket is the text itself, the rest names a file."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(t("chat_template: {path} cannot be read: {error}", path=given, error=error)) from None


class _Counted:
    """The texts, passed on as they come; ``characters`` is how many have passed."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield text


# ---- the verb --------------------------------------------------------------------------------------------------------


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """What a tokenizer makes of ``texts``: characters, tokens, unknown tokens, texts that do not come back exactly."""
    tokenizer = tokenizer.from_str(tokenizer.to_str())  # a file may ask for padding and truncation
    tokenizer.no_padding()
    tokenizer.no_truncation()
    unknown = getattr(tokenizer.model, "unk_token", None) or getattr(tokenizer.model, "unk_id", None)
    unknown_id: Any = tokenizer.token_to_id(unknown) if isinstance(unknown, str) else unknown
    count = characters = tokens = unknowns = changed = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        count += 1
        characters += len(text)
        tokens += len(ids)
        unknowns += ids.count(unknown_id)
        changed += tokenizer.decode(ids, skip_special_tokens=False) != text
    return {
        "vocabulary": tokenizer.get_vocab_size(),
        "texts": count,
        "characters": characters,
        "tokens": tokens,
        "tokens_per_character": round(tokens / characters, 4) if characters else 0.0,
        "unknown_tokens": unknowns,
        "round_trip_errors": changed,
    }


def train_verb(
    files: Annotated[
        list[str],
        typer.Argument(help="files of rows or text, and options such as columns.text=正文 or unk_token=[UNK]"),
    ],
    output: Annotated[Path, typer.Option(help="the folder to write")],
    kind: Annotated[str, typer.Option(help=KINDS)] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="tokens at most")] = 8000,
    min_frequency: Annotated[int, typer.Option(help="how often something occurs before it becomes a token")] = 2,
    isolate_chinese: Annotated[bool, typer.Option(help="no token joins two Chinese characters")] = False,
    isolate_digits: Annotated[bool, typer.Option(help="every digit is a token of its own")] = False,
    isolate_words: Annotated[bool, typer.Option(help="no token joins a word or number with what is around it")] = False,
    special: Annotated[list[str] | None, typer.Option(help="a token that is never cut; may be repeated")] = None,
    chat_template: Annotated[str | None, typer.Option(help="a file with a Jinja chat template")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a tokenizer in the folder")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Train a tokenizer on the text of FILES and measure it on that text."""
    from tokenizers import Tokenizer

    from weitiao.data.rows import text_of
    from weitiao.data.sources import arguments, read_all

    values = {
        "kind": kind,
        "vocab_size": vocab_size,
        "min_frequency": min_frequency,
        "isolate_chinese": isolate_chinese,
        "isolate_digits": isolate_digits,
        "isolate_words": isolate_words,
        "special_tokens": special or [],
        "chat_template": chat_template,
    }
    words, settings = _settings(files)
    options = build(TokenizerOptions, config.read(values, settings))
    if (output / "tokenizer.json").exists() and not overwrite:
        raise InputError(t("{path}: holds a tokenizer; --overwrite replaces it", path=output))
    sources = read_all(*arguments(words, skip_bad))
    for line in (line for source in sources for line in source.said):
        print(line, file=sys.stderr)
    texts = [text_of(row) for source in sources for row in source.rows]
    folder = train(texts, options, output)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = measure(tokenizer, texts)
    if options.kind == "jieba":
        from weitiao.data.tokenizer_jieba import agreement

        found["as_jieba"] = agreement(tokenizer, texts)
    if found["vocabulary"] < options.vocab_size:
        message = "the text gives {found} tokens, not {asked}: nothing else occurs {times} times"
        say(message, found=found["vocabulary"], asked=options.vocab_size, times=options.min_frequency)
    if as_json:
        print(json.dumps({"folder": str(folder), "kind": options.kind, **found}, ensure_ascii=False))
        return
    for key, label in (labels() | {"as_jieba": t("jieba's words that are one token")}).items():
        if key in found:
            print(f"{label}\t{found[key]}")
    print(folder)


def _settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's words without the tokenizer's options, and these: ``unk_token=[UNK]``, also by the name that a
    recipe has for them."""
    files: list[str] = []
    found: list[str] = []
    for word in words:
        key, sign, value = word.partition("=")
        key = key.removeprefix("model.tokenizer.")
        own = sign and key in TokenizerOptions.model_fields and not Path(word).exists()
        found.append(f"{key}={value}") if own else files.append(word)
    return files, found


def labels() -> dict[str, str]:
    """The figures of :func:`measure` by the name a person reads."""
    return {
        "vocabulary": t("vocabulary"),
        "texts": t("texts"),
        "characters": t("characters"),
        "tokens": t("tokens"),
        "tokens_per_character": t("tokens per character"),
        "unknown_tokens": t("unknown tokens"),
        "round_trip_errors": t("texts that do not come back exactly"),
    }
