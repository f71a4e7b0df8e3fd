"""Text to tokens with a mask: which tokens of a rendered conversation the model has to write itself.

A conversation is tokenised once, whole, with offsets. A turn of the assistant is trained from the first token after the
prompt that serving would send to the token that ends the turn. That the served prompt's tokens really are the first
tokens of the whole is checked; where the tokenizer merges across that boundary, the turn becomes an example of its own,
made of the prompt's tokens and the answer's, so that training sees exactly what serving sees.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from weitiao.errors import InputError, t

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


PROBE = "a"  # any text that every tokenizer makes a token of


@dataclass(frozen=True)
class Rendered:
    """Token ids [T], which of them are trained [T], and the text that they are."""

    ids: list[int]
    mask: list[bool]
    text: str


@dataclass(frozen=True)
class Piece:
    """A text to tokenise, and where in it the assistant's turns lie: (start, end) in characters, in order. Each start
    is where a prompt ends that serving would send; each end is where the template is done with the turn."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Tokens:
    """A tokenised text: ``ids`` [T], and for each token the characters [starts, ends) that it covers."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def blank(self, index: int) -> bool:
        """Whether a token is white space only."""
        return not self.text[self.starts[index] : self.ends[index]].strip()


class Marker:
    """Tokenises and marks for one tokenizer. ``more_ends``: tokens that end a turn, beside the special ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, more_ends: Collection[str] = ()):
        if not tokenizer.is_fast:
            raise InputError(
                t("{tokenizer}: needs a tokenizer.json (a fast tokenizer)", tokenizer=tokenizer.name_or_path)
            )
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = np.array(sorted(added), dtype=np.int64)
        ends = {index for index, token in added.items() if token.special or token.content in more_ends}
        self.eos_id, self.eos_token = int(tokenizer.eos_token_id), str(tokenizer.eos_token)  # type: ignore[arg-type]
        others = [tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id]
        self.end_ids = frozenset(ends.difference(others) | {self.eos_id})

    def ids(self, text: str) -> list[int]:
        """The tokens of a rendered text: the template has written every special token itself."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text, special ones included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def mark(self, pieces: Sequence[Piece]) -> list[Rendered]:
        """Every piece as a whole; of a turn whose first token also covers the prompt's end, that token is left out."""
        tokens = self._tokenise([piece.text for piece in pieces])
        starts = self._answer_starts(pieces, tokens)
        return [self._marked(*item) for item in zip(pieces, tokens, starts, strict=True)]

    def examples(self, pieces: Sequence[Piece]) -> list[list[Rendered]]:
        """Every piece as what is trained on: itself, or one example per turn where a boundary merges."""
        tokens = self._tokenise([piece.text for piece in pieces])
        starts = self._answer_starts(pieces, tokens)
        return [
            [self._joined(piece, *span) for span in piece.spans] if None in first else [self._marked(piece, row, first)]
            for piece, row, first in zip(pieces, tokens, starts, strict=True)
        ]

    def _tokenise(self, texts: list[str]) -> list[_Tokens]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        rows = []
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
            rows.append(_Tokens(text, np.array(ids, dtype=np.int64), places[:, 0], places[:, 1]))
        return rows

    def _answer_starts(self, pieces: Sequence[Piece], tokens: Sequence[_Tokens]) -> list[list[int | None]]:
        """For every turn the number of tokens that the served prompt has; None where they are not the first tokens of
        the whole. Only what follows the last added token is tokenised again: tokenizers cut the text there first."""
        places = [self._tail(row, start) for piece, row in zip(pieces, tokens, strict=True) for start, _ in piece.spans]
        tails = list(dict.fromkeys(tail for _, tail in places if tail))
        known = dict(zip(tails, (row.ids for row in self._tokenise(tails)), strict=True))
        empty, found, place = np.array([], dtype=np.int64), [], iter(places)
        for piece, row in zip(pieces, tokens, strict=True):
            starts: list[int | None] = []
            for first, tail in (next(place) for _ in piece.spans):
                stop = first + len(known.get(tail, empty))
                starts.append(stop if np.array_equal(row.ids[first:stop], known.get(tail, empty)) else None)
            found.append(starts)
        return found

    def _tail(self, row: _Tokens, end: int) -> tuple[int, str]:
        """The index of the last added token wholly before the character ``end``, and the text from there on."""
        candidates = np.flatnonzero(np.isin(row.ids, self._added) & (row.ends <= end) & (row.starts < end))
        index = int(candidates[-1]) if len(candidates) else 0
        return index, row.text[int(row.starts[index]) if len(candidates) else 0 : end]

    def _marked(self, piece: Piece, row: _Tokens, starts: Sequence[int | None]) -> Rendered:
        mask = np.zeros(len(row.ids), dtype=bool)
        for (start, end), first in zip(piece.spans, starts, strict=True):
            first = int(np.searchsorted(row.starts, start)) if first is None else first
            mask[first : self._turn_end(row, first, end)] = True
        return Rendered(row.ids.tolist(), mask.tolist(), piece.text)

    def _turn_end(self, row: _Tokens, first: int, end: int) -> int:
        """Where the tokens of a turn end that the model has to write: after its end-of-turn token, without the line
        break that a template puts behind, or the end token that closes the last one (Phi-3); where the next role's
        token ends the turn (GLM), after that one."""
        stop = int(np.searchsorted(row.starts, end))
        while stop > first and row.ends[stop - 1] > end:
            stop -= 1
        whole = stop
        while stop > first and row.ids[stop - 1] not in self.end_ids and row.blank(stop - 1):
            stop -= 1
        if stop > first and row.ids[stop - 1] in self.end_ids:
            before = stop - 1
            while before > first and row.blank(before - 1):
                before -= 1
            closes = row.ids[stop - 1] == self.eos_id and before > first and row.ids[before - 1] in self.end_ids
            return before if closes else stop
        while whole < len(row.ids) and row.ids[whole] not in self.end_ids and row.blank(whole):
            whole += 1
        return whole + 1 if whole < len(row.ids) and row.ids[whole] in self.end_ids else stop

    def _joined(self, piece: Piece, start: int, end: int) -> Rendered:
        """One turn as the served prompt's tokens and then the answer's, tokenised behind the eos token so that no
        tokenizer takes the answer for the beginning of a text."""
        prompt = self.ids(piece.text[:start])
        (row,) = self._tokenise([self.eos_token + piece.text[start:end]])
        first = 1 if len(row.ids) and row.ids[0] == self.eos_id else 0
        stop = self._turn_end(row, first, len(row.text))
        answer = row.ids[first:].tolist()
        trained = stop - first
        mask = [False] * len(prompt) + [True] * trained + [False] * (len(answer) - trained)
        return Rendered(prompt + answer, mask, piece.text[:end])


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> Rendered:
    """Plain text for pretraining: what the tokenizer itself begins a text with (a bos, GLM's two tokens, or nothing),
    the text, eos; every token is trained."""
    found: Any = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, added = found["input_ids"], found["special_tokens_mask"]
    start = next((place for place, own in enumerate(added) if not own), len(added))
    own = [token for token, outside in zip(ids, added, strict=True) if not outside]
    ids = [*ids[:start], *own, tokenizer.eos_token_id]
    return Rendered(ids, [True] * len(ids), text)


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Many texts as :func:`encode_text` has each: the ids of all, int32, end to end, and the length of each, int64. The
    library's own batch, which leaves the interpreter free for another thread."""
    begun = encode_text(tokenizer, PROBE).ids  # also takes off what a tokenizer.json says of cutting and padding
    backend = tokenizer.backend_tokenizer
    own = backend.encode(PROBE, add_special_tokens=False).ids
    start = begun[: len(begun) - 1 - len(own)]
    found = [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]  # "fast": no offsets
    counts = np.fromiter(map(len, found), np.int64, len(found))
    if begun[len(start) : -1] != own or not counts.all():  # a beginning of its own, or a text without a token
        singly = [encode_text(tokenizer, text).ids for text in texts]
        return np.concatenate([*map(np.array, singly)]).astype(np.int32), np.array([*map(len, singly)])
    lengths = counts + len(start) + 1
    ends = np.cumsum(lengths)
    ids, inner = np.empty(int(ends[-1]), np.int32), np.ones(int(ends[-1]), bool)
    ids[ends - 1], inner[ends - 1] = tokenizer.eos_token_id, False  # type: ignore[assignment]
    for place, token in enumerate(start):
        ids[ends - lengths + place], inner[ends - lengths + place] = token, False
    ids[inner] = np.fromiter(chain.from_iterable(found), np.int32, int(counts.sum()))
    return ids, lengths
