"""Words as jieba cuts them, in a tokenizer.json that needs no jieba to be used.

jieba (github.com/fxsjy/jieba) takes the way through its dictionary's words with the greatest product of frequencies,
and a hidden Markov model finds words that the dictionary lacks. No tokenizer.json can call it; but the way of the
greatest product is what a unigram tokenizer takes (Kudo, arXiv 1804.10959). So the words that jieba finds in the
training text are its pieces, with the dictionary's frequencies; what jieba found beside the dictionary counts for just
more than its parts. A word outside the vocabulary falls into shorter ones and characters. :func:`agreement` measures
how often the cuts are jieba's.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from weitiao.errors import InputError, t

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from weitiao.data.tokenizer import TokenizerOptions

BLOCK = "[一-鿕a-zA-Z0-9+#&._%-]+"  # within these jieba looks for words; all else stands alone, sign by sign
LONGER = 0.01  # by so much a word beside the dictionary outweighs its parts, in the logarithm
SAMPLED_TEXTS = 2000


def _jieba() -> Any:
    """A jieba with its own dictionary alone; InputError where the package is missing."""
    try:
        import jieba  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(t('kind jieba needs the package jieba: pip install "weitiao[jieba]"')) from None
    jieba.setLogLevel(logging.WARNING)
    cutter: Any = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:  # else it would believe a cache that anybody may have put into /tmp
        cutter.tmp_dir = folder
        cutter.initialize()
    return cutter


def train(texts: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    """The characters of the texts, then the words, the commonest first. InputError without the package."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    cutter = _jieba()
    words, characters = Counter[str](), Counter[str]()
    for text in texts:
        words.update(cutter.cut(text))
        characters.update(text)
    fixed = options.fixed_tokens()
    room = options.vocab_size - len(fixed)
    single = _common(characters, options.min_frequency)[:room]
    several = [word for word in _common(words, options.min_frequency) if len(word) > 1 and word not in fixed]
    pieces = [*single, *several[: room - len(single)]]
    scored = [(piece, _score(piece, cutter)) for piece in pieces if piece not in fixed]
    least = min((score for _, score in scored), default=0.0)
    vocabulary = [(token, least) for token in fixed] + scored
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=fixed.index(options.unk_token)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(BLOCK), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in fixed])
    return tokenizer


def _common(counts: Counter[str], least: int) -> list[str]:
    """What occurs ``least`` times, commonest first."""
    return sorted((one for one, count in counts.items() if count >= least), key=lambda one: (-counts[one], one))


def _score(word: str, cutter: Any) -> float:
    """The logarithm of a word's probability in jieba's dictionary; of one that is not in it, just more than its
    parts'."""
    alone = math.log((cutter.FREQ.get(word) or 1) / cutter.total)
    if cutter.FREQ.get(word) or len(word) == 1:
        return alone
    parts = list(cutter.cut(word, HMM=False))
    return max(alone, sum(math.log((cutter.FREQ.get(part) or 1) / cutter.total) for part in parts) + LONGER)


def agreement(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """The share of jieba's words in the first texts that are one token each; 1 where there is none."""
    cutter = _jieba()
    same = whole = 0
    for text, _ in zip(texts, range(SAMPLED_TEXTS), strict=False):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ours, theirs = {*encoding.offsets}, list(_spans(cutter.cut(text)))
        same += sum(span in ours for span in theirs)
        whole += len(theirs)
    return round(same / whole, 4) if whole else 1.0


def _spans(words: Iterable[str]) -> Iterator[tuple[int, int]]:
    place = 0
    for word in words:
        yield place, place + len(word)
        place += len(word)
