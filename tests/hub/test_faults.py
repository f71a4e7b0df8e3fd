"""A small sample of the soak: every family of schedules, kills included, by seed."""

from __future__ import annotations

import pytest

from tests.hub import soak

SHAPES = ("mixed", "kills", "cuts", "places", "no ranges")
SAMPLE = [seed for shape in SHAPES for seed in [s for s in soak.SEEDS if soak.plan(s).shape == shape][:2]]


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    soak.prepare()


@pytest.mark.parametrize("seed", SAMPLE)
def test_a_schedule_ends_with_the_right_bytes(seed: int):
    found = soak.play(seed)
    assert found["done"] and not found["wrong"] and not found["orphans"] and found["within"], found


def test_a_schedule_is_its_seed():
    assert soak.plan(7) == soak.plan(7) != soak.plan(8)
    shapes = [soak.plan(seed).shape for seed in soak.SEEDS]
    assert set(shapes) == set(SHAPES) and len(soak.SEEDS) == 1000


def test_wrong_bytes_would_be_noticed(tmp_path):
    blob = tmp_path / "models--org--soak" / "blobs" / "x"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"wrong")
    assert soak._wrong(tmp_path, "0" * 64) == 1
