"""Validation and test hold hotels and phrasings that neither the base's corpus nor the tuning rows have."""

import re
from collections.abc import Iterator
from itertools import combinations

import pytest

from weitiao.data.rows import Chat
from weitiao.demo import corpus, talks
from weitiao.demo.database import PARTS, Database
from weitiao.demo.dialogues import dialogues, phrases

HOLE = re.compile(r"\{\w+\}")


def pieces(pool: str, node: object = None) -> Iterator[str]:
    """Every piece of ``phrases.yaml`` that belongs to ``pool``."""
    node = phrases() if node is None else node
    if isinstance(node, dict):
        if "held" in node:
            yield from node[pool]
        else:
            for child in node.values():
                yield from pieces(pool, child)


def said(chats: list[Chat]) -> list[str]:
    return [message.content for chat in chats for message in chat.messages if message.role == "user"]


@pytest.fixture(scope="module")
def read_before() -> str:
    """All that the base and the tuning have read, with two seeds of tuning rows: the whole corpus, not a sample."""
    texts = [row.text for row in corpus.rows(0)]
    chats = [*talks.talks(0), *talks.searches(0)]
    texts += [message.content for chat in chats for message in chat.messages]
    for seed in (0, 1):
        rows = list(dialogues(Database.build(seed), "train", 1600, seed))
        texts += [message.content for chat in rows for message in chat.messages]
    return "\n".join(texts)


def test_no_held_piece_stands_in_what_was_read(read_before):
    carriers = {max(HOLE.split(piece), key=len) for piece in pieces("held")} - {"，"}
    assert len(carriers) > 150
    assert not [carrier for carrier in carriers if carrier in read_before]


def test_no_test_hotel_stands_in_what_was_read(read_before):
    for seed in range(4):
        database = Database.build(seed)
        names = [hotel.name for part in ("validation", "test") for hotel in database.part(part)]
        assert len(names) == 200
        assert not [name for name in names if name in read_before]


def test_every_held_guest_speaks_in_held_pieces_only():
    """Without its slot values, no sentence of a test guest is a sentence of a training guest."""
    database = Database.build(3)
    trained = set(said(list(dialogues(database, "train", 1600, 3))))
    for part in ("validation", "test"):
        sentences = said(list(dialogues(database, part, 100, 3)))
        assert len(sentences) > 150
        assert not trained.intersection(sentences)


def test_parts_share_no_hotel_and_no_abbreviation():
    for seed in (0, 7):
        database = Database.build(seed)
        assert [len(database.part(part)) for part in PARTS] == [800, 100, 100]
        for one, other in combinations(PARTS, 2):
            assert not {h.short for h in database.part(one)} & {h.short for h in database.part(other)}
