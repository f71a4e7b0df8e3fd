"""How each kind of tokenizer is trained: ``TRAINERS[kind](texts, options)``; the same texts give the same tokenizer."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

    from weitiao.data.tokenizer import TokenizerOptions

BYTES = 256
WORDPIECE_PREFIX = "##"
WORD = r"\p{N}+(?:\.\p{N}+)?|[\p{L}_]+"  # 4.6, min_price
# What bpe merges within if words stand alone: those, signs with the space before them, and other space.
PIECES = WORD + r"| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def _common(options: TokenizerOptions) -> dict[str, Any]:
    from tokenizers import AddedToken

    return {
        "vocab_size": options.vocab_size,
        "special_tokens": [AddedToken(token, special=True, normalized=False) for token in options.fixed_tokens()],
        "show_progress": sys.stderr.isatty(),
    }


def cuts(options: TokenizerOptions) -> list[PreTokenizer]:
    """What cuts a text before any merging: Chinese characters, digits and words that stand alone."""
    from tokenizers import Regex, pre_tokenizers

    found: list[PreTokenizer] = []
    if options.isolate_chinese:
        found.append(pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"))
    if options.isolate_digits:
        found.append(pre_tokenizers.Digits(individual_digits=True))
    if options.isolate_words:
        found.append(pre_tokenizers.Split(Regex(WORD), "isolated"))
    return found


def _cutter(options: TokenizerOptions, *last: PreTokenizer) -> PreTokenizer:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([*cuts(options), *last])


def _bpe(texts: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    own = options.isolate_words  # byte level's own cut (GPT-2's) parts 4.6 and min_price, and joins a word to a space
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own)
    pieces = [pre_tokenizers.Split(Regex(PIECES), "isolated")] if own else []
    tokenizer.pre_tokenizer = _cutter(options, *pieces, byte_level)
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
    parts = without_rare(texts, options, (options.vocab_size - len(options.fixed_tokens())) // 2)
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
    parts = without_rare(texts, options, options.vocab_size - len(options.fixed_tokens()) - 1)
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


def without_rare(texts: Iterable[str], options: TokenizerOptions, most: int) -> list[str]:
    """The texts cut at every character that is rarer than ``min_frequency`` or beyond the ``most`` frequent ones."""
    held = list(texts)
    counts: Counter[str] = Counter()
    for text in held:
        counts.update(text)
    frequent = sorted((char for char in counts if counts[char] >= options.min_frequency), key=lambda c: (-counts[c], c))
    keep = set(frequent[:most])
    cut = str.maketrans({char: "\0" for char in counts if char not in keep})
    return [part for text in held for part in text.translate(cut).split("\0") if part]


def _jieba(texts: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    from weitiao.data import tokenizer_jieba

    return tokenizer_jieba.train(texts, options)


TRAINERS: dict[str, Callable[[Iterable[str], TokenizerOptions], Tokenizer]] = {
    "bpe": _bpe,
    "wordpiece": _wordpiece,
    "unigram": _unigram,
    "word": _word,
    "char": _char,
    "jieba": _jieba,
}
