"""What a run says of its progress where stderr is no terminal, and how times are written."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace

import pytest

from tests.train.support import rows, train
from weitiao.train import progress
from weitiao.train.progress import Bar, clock, counting

LINE = {"step": 1, "loss": 2.5, "tokens": 100, "seconds": 0.5}


def test_a_log_gets_few_lines(capsys: pytest.CaptureFixture[str]):
    with Bar() as bar:
        for step in range(1, 101):
            bar(LINE | {"step": step}, 100)
        bar({"step": 100, "epoch": 1.0, "validation": {"loss": 1.25, "exact": 1}}, 100)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "step 1/100  loss 2.5000  200 tokens/s  0:50 left",
        "step 100/100  loss 2.5000  200 tokens/s  0:00 left",
        "step 100  validation: loss 1.2500  exact 1",
    ]


def test_a_loss_that_is_no_number_is_shown(capsys: pytest.CaptureFixture[str]):
    with Bar() as bar:
        bar(LINE | {"loss": "NaN", "seconds": 0.0}, 2)
    assert "loss NaN" in capsys.readouterr().err


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by four seconds whenever it is looked at."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=itertools.count(0.0, 4.0).__next__))


def test_counting_tells_a_log_every_half_minute(ticking: None, capsys: pytest.CaptureFixture[str]):
    with counting("rows") as tell:
        for done in range(21):
            tell(done, 20)
    assert capsys.readouterr().err.splitlines() == ["rows: 7 of 20  0:59 left", "rows: 15 of 20  0:21 left"]


def test_what_is_short_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]):
    with counting("rows") as tell:
        tell(1, 2)
    assert capsys.readouterr().err == ""


def test_validation_tells_how_far_it_is(ticking: None, tmp_path, capsys: pytest.CaptureFixture[str]):
    train(tmp_path / "run", rows(4), validation=rows(300, seed=1), options={"epochs": 1, "micro_batch_tokens": 24})
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("validating: ")]
    assert len(said) > 5 and all(" of 300 " in line and line.endswith(" left") for line in said)


def test_an_evaluation_s_bar_lies_inside_the_run_s(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", screen)
    with Bar() as bar:
        bar(LINE, 2)
        with counting("answering") as tell:
            tell(3, 4)
        bar(LINE | {"step": 2}, 2)
    assert "answering" in screen.getvalue() and "2/2" in screen.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text
