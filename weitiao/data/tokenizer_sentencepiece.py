"""SentencePiece models (github.com/google/sentencepiece) made here: trained, and grown with new pieces.

    content = train(texts, TokenizerOptions(kind="sentencepiece"))     # the bytes of a tokenizer.model
    content = grown(content, tokenizer, first)                         # with the tokens that it was extended by

Nothing is normalised, every space counts and what no piece has is spelled in bytes, so that any text comes back
exactly. Reading is in weights/sentencepiece.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from weitiao.data.tokenizer_kinds import BYTES, cuts, without_rare

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from weitiao.data.tokenizer import TokenizerOptions

FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
KINDS = {"sentencepiece": "unigram", "sentencepiece-bpe": "bpe"}  # ours: the library's
BETWEEN = "\x1e"  # stands in training text where no piece may reach across: ASCII's separator of records
LONGEST = 1 << 30  # bytes of a text; the library would leave longer ones out without a word


def train(texts: Iterable[str], options: TokenizerOptions) -> bytes:
    """The model of ``texts`` as a file's bytes; none where no character is common enough. The same texts give the
    same bytes."""
    import sentencepiece

    room = options.vocab_size - len(options.fixed_tokens()) - BYTES
    parts = [part for part in without_rare(_cut(texts, options), options, room) if part.strip(BETWEEN)]
    if not parts:
        return b""
    written = io.BytesIO()
    names = {name.removesuffix("_token"): text for name, text in options.named_tokens().items()}
    settings: dict[str, Any] = {
        "sentence_iterator": iter(parts),
        "model_writer": written,
        "model_type": KINDS[options.kind],
        "vocab_size": options.vocab_size,
        "hard_vocab_limit": False,
        "character_coverage": 1.0,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "max_sentence_length": LONGEST,
        "pretokenization_delimiter": BETWEEN,
        "num_threads": 1,  # sums in a changing order would differ
        "minloglevel": 2,
        "control_symbols": [token for token in options.fixed_tokens() if token not in names.values()],
    }
    settings |= {"bos_id": -1} | {f"{name}_id": place for place, name in enumerate(names)}
    settings |= {f"{name}_piece": text for name, text in names.items()}
    sentencepiece.SentencePieceTrainer.train(**settings)  # pyright: ignore[reportAttributeAccessIssue]
    return written.getvalue()


def _cut(texts: Iterable[str], options: TokenizerOptions) -> Iterable[str]:
    """The texts with a mark wherever a piece must end."""
    from tokenizers import pre_tokenizers

    own = cuts(options)
    if not own:
        return texts
    cutter = pre_tokenizers.Sequence(own)
    return (BETWEEN.join(piece for piece, _ in cutter.pre_tokenize_str(text)) for text in texts)


def grown(content: bytes, tokenizer: Tokenizer, first: int) -> bytes | None:
    """A model with the further tokens of ``tokenizer``, which was made of it and then extended from the id ``first``
    on; None where the model's pieces are not the first of its tokens. What lies between is taken as it stands."""
    from sentencepiece import sentencepiece_model_pb2

    library: Any = sentencepiece_model_pb2
    model = library.ModelProto.FromString(content)
    names = {number: name for name, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    own, least = len(model.pieces), min(piece.score for piece in model.pieces)
    if own > first or any(names.get(place) != piece.piece for place, piece in enumerate(model.pieces)):
        return None
    inner = json.loads(tokenizer.to_str())["model"]
    scores = dict(inner["vocab"]) if inner["type"] == "Unigram" else {}
    for place in range(own, max(names) + 1):
        kind = model.SentencePiece.NORMAL if place >= first else model.SentencePiece.USER_DEFINED
        name = names.get(place, f"<unused{place}>")
        model.pieces.add(piece=name, score=scores.get(name, least - 1 - place + own), type=kind)
    return model.SerializeToString(deterministic=True)


def differing(content: bytes, tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """How many of the texts the model cuts otherwise than the tokenizer."""
    from sentencepiece import SentencePieceProcessor

    model: Any = SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    return sum(model.EncodeAsIds(text) != tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
