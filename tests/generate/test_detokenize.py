"""Text while it arrives: whole characters, nothing lost, stop texts hidden."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.generate.detokenize import Detokenizer, decode
from weitiao.models import tiny

TOKENIZER = tiny.make_tokenizer("llama")


class Letters:
    """A tokenizer of one character a token."""

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


@settings(max_examples=60)
@given(st.text(max_size=30))
def test_pieces_join_to_the_text_and_no_piece_is_half_a_character(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    stream = Detokenizer(TOKENIZER)
    pieces = [stream.add(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == stream.text == decode(TOKENIZER, ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("abcd", ["cd"], "ab"),
        ("abcabd", ["abd"], "abc"),
        ("aab", ["ab"], "a"),
        ("xyz", ["zz"], "xyz"),
        ("xyz", ["yz", "xyzw"], "x"),
        ("", ["a"], ""),
    ],
)
def test_stop_texts(text, stop, shown):
    stream = Detokenizer(Letters(), stop)
    pieces = []
    for letter in text:
        pieces.append(stream.add(ord(letter)))
        if stream.stopped:
            break
    pieces.append(stream.flush())
    assert "".join(pieces) == stream.text == shown
    assert stream.stopped == (shown != text)
