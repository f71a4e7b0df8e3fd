"""A seeded sample of the hostile and the valid files; ``make soak-files`` opens them all."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import pytest

from tests.hostile import corpus, fuzz, soak
from tests.hostile.case import CANARY, Case
from tests.hostile.pickled import argument, call
from tests.hostile.valid import valid

SEED = 7
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="each case is opened in a fork")


def sample() -> list[Case]:
    """Some of every kind."""
    draw, found = random.Random(SEED), []
    for make in corpus.HOSTILE:
        cases = list(make(random.Random(f"{SEED} {make.__name__}")))
        found += draw.sample(cases, 3)
    return found + draw.sample(valid(SEED), 6)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    soak.warm()


def test_a_sample_is_refused_or_opened_as_it_must_be():
    rows = [soak.run(case) for case in sample()]
    slow = [row for row in rows if any(text.endswith(" s") for text in row["wrong"])]  # no test depends on the machine
    assert not [(row["name"], row["wrong"]) for row in rows if row["wrong"] and row not in slow]


def test_changed_bytes_are_read_or_refused_and_nothing_else(tmp_path: Path):
    assert not [fault for fault in fuzz.faults(range(600), tmp_path) if not fault.endswith(" s")]


def test_there_are_as_many_as_are_promised():
    cases = corpus.hostile(SEED)
    assert len(cases) >= 400 and len(valid(SEED)) >= 100
    assert len({case.name for case in cases}) == len(cases)


def test_the_canary_sings_where_a_pickle_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "builtins.eval", "subprocess.getoutput"):
        pickle.loads(call(name, argument(name)))
        (tmp_path / CANARY).unlink()


def test_the_watch_notes_what_a_file_may_not_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def evil(path: Path) -> int:
        pickle.loads(call("os.system", "touch CANARY"))
        (path / "elsewhere").write_text("x")
        raise ValueError("not one of ours")

    monkeypatch.setitem(soak.OPENERS, "evil", evil)
    said = json.dumps(soak.run(Case("evil", {"x": b"1"}, "evil"))["wrong"])
    for part in ("canary:", "pickle.find_class", "os.system", "noted: open", "not foreseen"):
        assert part in said


def test_results_are_kept_and_gone_on_with(tmp_path: Path):
    cases = sample()[:3]
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"name": cases[0].name}) + "\n")
    assert [case.name for case in soak.todo(cases, results)] == [case.name for case in cases[1:]]
