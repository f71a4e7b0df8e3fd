"""Tokens -> text while they arrive: no character is split, and no part of a stop text is shown.

text = Detokenizer(tokenizer, stop=["\\n\\n"])
for token in tokens: print(text.add(token), end="")
print(text.flush())                                     # text.text is what was shown
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder puts where bytes are no complete character (yet)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included: calls may be written with them."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Detokenizer:
    """Feeds on one token at a time; ``stopped`` is true once a stop text has appeared, and the text ends before it."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = [text for text in stop if text]
        self.stopped = False
        self.text = ""
        self._ids: list[int] = []
        self._held = ""  # decoded, but perhaps the beginning of a stop text
        # ids[start:read] are shown already and go along as context: a decoder may treat a first token differently
        self._start = self._read = 0

    def add(self, token: int) -> str:
        """The text that has become certain with this token; may be empty."""
        self._ids.append(token)
        before = decode(self.tokenizer, self._ids[self._start : self._read])
        after = decode(self.tokenizer, self._ids[self._start :])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._show(after[len(before) :])

    def flush(self) -> str:
        """What is left at the end: incomplete bytes, and what might have become a stop text."""
        if self.stopped:
            return ""
        before = decode(self.tokenizer, self._ids[self._start : self._read])
        after = decode(self.tokenizer, self._ids[self._start :])
        shown = self._show(after[len(before) :])
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def _show(self, piece: str) -> str:
        self._held += piece
        found = [place for place in map(self._held.find, self.stop) if place >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
        else:
            certain = len(self._held) - self._longest_beginning()
            shown, self._held = self._held[:certain], self._held[certain:]
        self.text += shown
        return shown

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that a stop text begins with."""
        longest = max(map(len, self.stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self.stop):
                return length
        return 0
