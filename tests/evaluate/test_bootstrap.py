"""Intervals by drawing dialogues."""

import numpy as np

from weitiao.evaluate.bootstrap import Resampling


def test_draws_without_a_single_case_still_give_the_value():
    groups = [f"d{number}" for number in range(40)]
    counted = np.array([1] + [0] * 39)
    for seed in range(8):
        figure = Resampling(groups, samples=1, seed=seed).ratio(counted, counted)
        assert figure.value == figure.low == figure.high == 1.0 and figure.count == 1
