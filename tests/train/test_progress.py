"""What a run says of its progress where stderr is no terminal, and how times are written."""

from __future__ import annotations

import pytest

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


def test_counting_is_silent_in_a_log(capsys: pytest.CaptureFixture[str]):
    with counting("rows") as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text
