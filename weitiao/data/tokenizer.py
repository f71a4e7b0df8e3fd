"""Tokenizers trained on a person's own text, written as a folder that ``AutoTokenizer.from_pretrained`` loads.

    options = TokenizerOptions(kind="bpe", vocab_size=5000, isolate_chinese=True, special_tokens=["<|user|>"])
    folder = train(["你好，世界", "hello world"], options, "my-tokenizer")

``bpe`` works on bytes, so that any text comes back exactly; the other kinds map what they never saw to ``unk_token``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field, model_validator

from weitiao.config import Options, build
from weitiao.errors import InputError, say, t
from weitiao.runs import write_atomic

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

Kind = Literal["bpe", "wordpiece", "unigram", "word", "char"]
BYTES = 256
WORDPIECE_PREFIX = "##"


class TokenizerOptions(Options):
    """How a tokenizer is trained and which names its special tokens have."""

    kind: Kind = Field(
        default="bpe",
        description="bpe: merges of bytes, loses nothing; wordpiece, unigram; word: by spaces; char: characters",
    )
    vocab_size: int = Field(
        default=8000, ge=2, description="tokens at most, the special ones and bpe's 256 bytes included"
    )
    min_frequency: int = Field(
        default=2, ge=1, description="how often a pair, word or character must occur to become a token"
    )
    isolate_chinese: bool = Field(
        default=False, description="no token joins two Chinese characters, or one with anything else"
    )
    isolate_digits: bool = Field(default=False, description="every digit is a token of its own")
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
        if any(not token for token in self.fixed_tokens()):
            raise ValueError(t("a special token is empty"))
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

    Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if the options have one,
    chat_template.jinja. InputError when there is no text, or the chat template's file is missing.
    """
    template = _chat_template(options.chat_template)
    counted = _Counted(texts)
    tokenizer = TRAINERS[options.kind](counted, options)
    if not counted.characters:
        raise InputError(t("nothing to train a tokenizer on: there is no text"))
    folder = Path(folder)
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


# ---- the kinds -------------------------------------------------------------------------------------------------------


def _common(options: TokenizerOptions) -> dict[str, Any]:
    from tokenizers import AddedToken

    return {
        "vocab_size": options.vocab_size,
        "special_tokens": [AddedToken(token, special=True, normalized=False) for token in options.fixed_tokens()],
        "show_progress": sys.stderr.isatty(),
    }


def _cutter(options: TokenizerOptions, *last: PreTokenizer) -> PreTokenizer:
    """What cuts a text before any merging: where Chinese characters and digits stand alone, then ``last``."""
    from tokenizers import Regex, pre_tokenizers

    cuts: list[PreTokenizer] = []
    if options.isolate_chinese:
        cuts.append(pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"))
    if options.isolate_digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence([*cuts, *last])


def _bpe(texts: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _cutter(options, pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(min_frequency=options.min_frequency, initial_alphabet=alphabet, **_common(options))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _word(texts: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=options.unk_token))
    tokenizer.pre_tokenizer = _cutter(options, pre_tokenizers.WhitespaceSplit())
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(min_frequency=options.min_frequency, **_common(options))
    )
    return tokenizer


def _char(texts: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=options.unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(min_frequency=options.min_frequency, **_common(options))
    )
    return tokenizer


def _wordpiece(texts: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    common = _common(options)
    # A character may need two tokens: one that begins a word, one (##) within it.
    parts = _without_rare(texts, options, (options.vocab_size - len(options.fixed_tokens())) // 2)
    cutter = _cutter(options, pre_tokenizers.BertPreTokenizer())
    # The trainer numbers the ## characters in the order of a hash table that differs from run to run, and that order
    # decides ties. Given as special tokens they come first and sorted; they are none in the tokenizer that is kept.
    inner = [WORDPIECE_PREFIX + char for char in sorted({char for word in _words(parts, cutter) for char in word[1:]})]
    draft = Tokenizer(models.WordPiece(unk_token=options.unk_token))
    draft.pre_tokenizer = cutter
    drafted: dict[str, Any] = common | {"special_tokens": [*common["special_tokens"], *inner]}
    trainer = trainers.WordPieceTrainer(
        min_frequency=options.min_frequency, continuing_subword_prefix=WORDPIECE_PREFIX, **drafted
    )
    draft.train_from_iterator(parts, trainer)
    tokenizer = Tokenizer(models.WordPiece(draft.get_vocab(), unk_token=options.unk_token))
    tokenizer.add_special_tokens(common["special_tokens"])
    tokenizer.pre_tokenizer = cutter
    tokenizer.decoder = decoders.WordPiece(prefix=WORDPIECE_PREFIX, cleanup=False)
    return tokenizer


def _words(texts: Iterable[str], cutter: PreTokenizer) -> Iterable[str]:
    """The distinct pieces into which ``cutter`` cuts the texts."""
    from tokenizers import Tokenizer, models, trainers

    counter = Tokenizer(models.WordLevel())
    counter.pre_tokenizer = cutter
    counter.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=2**31, min_frequency=0, show_progress=False)
    )
    return counter.get_vocab()


def _unigram(texts: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    common = _common(options)
    cutter = _cutter(options, pre_tokenizers.Metaspace(prepend_scheme="never"))
    parts = _without_rare(texts, options, options.vocab_size - len(options.fixed_tokens()) - 1)
    draft = Tokenizer(models.Unigram())
    draft.pre_tokenizer = cutter
    draft.train_from_iterator(parts, trainers.UnigramTrainer(unk_token=options.unk_token, **common))
    model = json.loads(draft.to_str())["model"]
    vocab = [(piece, score) for piece, score in model["vocab"]]
    special = len(options.fixed_tokens())
    tokenizer = Tokenizer(models.Unigram([*vocab[:special], *_settled(vocab[special:])], model["unk_id"]))
    tokenizer.add_special_tokens(common["special_tokens"])
    tokenizer.pre_tokenizer = cutter
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer


def _settled(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Unigram pieces without what differs from run to run of the trainer.

    Scores carry the noise of sums in changing order (about 1e-14). Characters that no longer are a piece get back in at
    the lowest score plus 0.0001 for each, counted in a hash table's order: here they all get the lowest.
    """
    lowest = min((score for _, score in pieces), default=0.0)

    def settled(piece: str, score: float) -> float:
        steps = (score - lowest) / 0.0001
        added_back = len(piece) == 1 and abs(steps - round(steps)) < 1e-6
        return round(lowest if added_back else score, 9)

    return sorted(((piece, settled(piece, score)) for piece, score in pieces), key=lambda item: (-item[1], item[0]))


def _without_rare(texts: Iterable[str], options: TokenizerOptions, most: int) -> list[str]:
    """The texts cut at every character that is rarer than ``min_frequency`` or beyond the ``most`` frequent ones."""
    held = list(texts)
    counts: Counter[str] = Counter()
    for text in held:
        counts.update(text)
    frequent = sorted((char for char in counts if counts[char] >= options.min_frequency), key=lambda c: (-counts[c], c))
    keep = set(frequent[:most])
    cut = str.maketrans({char: "\0" for char in counts if char not in keep})
    return [part for text in held for part in text.translate(cut).split("\0") if part]


TRAINERS: dict[str, Callable[[Iterable[str], TokenizerOptions], Tokenizer]] = {
    "bpe": _bpe,
    "wordpiece": _wordpiece,
    "unigram": _unigram,
    "word": _word,
    "char": _char,
}


# ---- the verb --------------------------------------------------------------------------------------------------------


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """What a tokenizer makes of ``texts``: characters, tokens, unknown tokens, texts that do not come back exactly."""
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
        list[str], typer.Argument(help="files of rows or text, and data options such as columns.text=正文")
    ],
    output: Annotated[Path, typer.Option(help="the folder to write")],
    kind: Annotated[str, typer.Option(help="bpe, wordpiece, unigram, word or char")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="tokens at most")] = 8000,
    min_frequency: Annotated[int, typer.Option(help="how often something occurs before it becomes a token")] = 2,
    isolate_chinese: Annotated[bool, typer.Option(help="no token joins two Chinese characters")] = False,
    isolate_digits: Annotated[bool, typer.Option(help="every digit is a token of its own")] = False,
    special: Annotated[list[str] | None, typer.Option(help="a token that is never cut; may be repeated")] = None,
    chat_template: Annotated[str | None, typer.Option(help="a file with a Jinja chat template")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a tokenizer in the folder")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Train a tokenizer on the text of FILES and measure it on that text."""
    from tokenizers import Tokenizer

    from weitiao.data.sources import arguments, read_all, text_of

    values = {
        "kind": kind,
        "vocab_size": vocab_size,
        "min_frequency": min_frequency,
        "isolate_chinese": isolate_chinese,
        "isolate_digits": isolate_digits,
        "special_tokens": special or [],
        "chat_template": chat_template,
    }
    options = build(TokenizerOptions, values)
    if (output / "tokenizer.json").exists() and not overwrite:
        raise InputError(t("{path}: holds a tokenizer; --overwrite replaces it", path=output))
    sources = read_all(*arguments(files, skip_bad))
    for line in (line for source in sources for line in source.said):
        print(line, file=sys.stderr)
    texts = [text_of(row) for source in sources for row in source.rows]
    folder = train(texts, options, output)
    found = measure(Tokenizer.from_file(str(folder / "tokenizer.json")), texts)
    if found["vocabulary"] < vocab_size:
        message = "the text gives {found} tokens, not {asked}: nothing else occurs {times} times"
        say(message, found=found["vocabulary"], asked=vocab_size, times=min_frequency)
    if as_json:
        print(json.dumps({"folder": str(folder), "kind": kind, **found}, ensure_ascii=False))
        return
    for key, label in _labels().items():
        print(f"{label}\t{found[key]}")
    print(folder)


def _labels() -> dict[str, str]:
    return {
        "vocabulary": t("vocabulary"),
        "texts": t("texts"),
        "characters": t("characters"),
        "tokens": t("tokens"),
        "tokens_per_character": t("tokens per character"),
        "unknown_tokens": t("unknown tokens"),
        "round_trip_errors": t("texts that do not come back exactly"),
    }
