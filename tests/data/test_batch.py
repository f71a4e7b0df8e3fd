"""Batches: every row once, bounded, deterministic, and the same rows a step however a step is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weitiao.data import batch
from weitiao.data.batch import START_TOKENS, Example, collate, pack, padded_length, plan_epoch, shared_tokens
from weitiao.errors import InputError

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


def example(length: int, start: int = 0, trained_from: int = 0) -> Example:
    ids = np.arange(start, start + length, dtype=np.int32)
    return Example(ids, np.arange(length) >= trained_from, f"row {start}")


@given(LENGTHS, st.integers(1, 9), st.integers(1, 600), st.integers(0, 99), st.integers(0, 3))
def test_every_row_once_in_whole_steps_and_bounded_micro_batches(lengths, batch_size, bound, seed, epoch):
    steps = plan_epoch(lengths, batch_size, bound, seed, epoch)
    rows = [[row for micro in step for row in micro] for step in steps]
    assert sorted(row for step in rows for row in step) == list(range(len(lengths)))
    assert all(len(step) == batch_size for step in rows[:-1])
    for micro in (micro for step in steps for micro in step):
        assert micro
        assert len(micro) == 1 or len(micro) * padded_length(max(lengths[row] for row in micro)) <= bound


@given(LENGTHS, st.integers(1, 9), st.integers(1, 600), st.integers(0, 99))
def test_the_bound_moves_no_row_to_another_step(lengths, batch_size, bound, seed):
    cut = plan_epoch(lengths, batch_size, bound, seed, 0)
    whole = plan_epoch(lengths, batch_size, None, seed, 0)
    assert [{row for micro in step for row in micro} for step in cut] == [
        {row for micro in step for row in micro} for step in whole
    ]


def test_the_order_follows_from_seed_and_epoch():
    lengths = list(range(1, 101))
    plan = plan_epoch(lengths, 8, 256, seed=1, epoch=0)
    assert plan == plan_epoch(lengths, 8, 256, seed=1, epoch=0)
    assert plan != plan_epoch(lengths, 8, 256, seed=2, epoch=0)
    assert plan != plan_epoch(lengths, 8, 256, seed=1, epoch=1)


def test_a_step_is_an_even_draw_whatever_the_lengths():
    lengths = [10] * 200 + [200] * 200
    steps = plan_epoch(lengths, 40, 4096, seed=0, epoch=0)
    long = [sum(lengths[row] == 200 for micro in step for row in micro) for step in steps]
    assert min(long) >= 10 and max(long) <= 30


def test_cutting_saves_padding_but_not_for_nothing():
    (step,) = plan_epoch([500, 500, 20, 20], 4, None, seed=0, epoch=0)
    assert sorted(map(sorted, step)) == [[0, 1], [2, 3]]
    (step,) = plan_epoch([50, 49, 48, 47], 4, None, seed=0, epoch=0)
    assert len(step) == 1


def test_padding_stays_small_on_uneven_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.6, 1000), 10, 1500).astype(int).tolist()
    steps = plan_epoch(lengths, 8, 4096, seed=0, epoch=0)
    padded = sum(len(micro) * max(lengths[row] for row in micro) for step in steps for micro in step)
    assert sum(lengths) / padded > 0.85


@given(LENGTHS, st.integers(1, 12), st.integers(1, 600))
def test_without_padding_parts_are_few_and_even(lengths, batch_size, bound):
    for step in plan_epoch(lengths, batch_size, bound, 0, 0, padded=False):
        tokens = [sum(lengths[row] for row in micro) for micro in step]
        assert all(total <= bound or len(micro) == 1 for total, micro in zip(tokens, step, strict=True))
        assert len(step) <= 1 + 2 * sum(tokens) // bound  # two neighbours never fit into one


def test_without_padding_lengths_may_differ():
    (step,) = plan_epoch([500, 500, 20, 20], 4, 1100, seed=0, epoch=0, padded=False)
    assert len(step) == 1
    (step,) = plan_epoch([100] * 8, 8, 700, seed=0, epoch=0, padded=False)
    assert [len(micro) for micro in step] == [4, 4]


def begun(common: int, own: int, number: int) -> Example:
    ids = np.concatenate([np.arange(common), 10_000 * number + np.arange(own)]).astype(np.int32)
    return Example(ids, np.ones(len(ids), dtype=bool), f"row {number}")


def test_what_is_in_common_counts_once():
    rows = [begun(60, 20 + n, n + 1) for n in range(8)] + [begun(40, 30, 20), begun(0, 90, 21)]
    shared = shared_tokens(rows)
    assert shared.tolist() == 8 * [60] + [0, 0]  # the one that has only forty of them shares none: it would cost others
    (step,) = plan_epoch([*map(len, rows)], 10, 400, 0, 0, padded=False, shared=shared)
    assert sorted(row for micro in step for row in micro) == [*range(10)]
    tokens = [sum(len(rows[row]) - shared[row] for row in micro) + max(shared[row] for row in micro) for micro in step]
    assert max(tokens) <= 400 and len(step) == 2  # of 844 tokens 424 are left


def test_rows_without_anything_in_common_share_nothing():
    assert not shared_tokens([begun(0, 40, number) for number in range(1, 6)]).any()
    assert shared_tokens([]).tolist() == [] and shared_tokens([begun(30, 2, 1)]).tolist() == [0]


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError):
        plan_epoch([1], 0, 10, 0, 0)
    with pytest.raises(InputError):
        plan_epoch([1], 1, 0, 0, 0)


def test_collate_pads_on_the_right_and_never_trains_padding():
    batch = collate([example(3, trained_from=1), example(1, start=9)], pad_id=7, positions=4)
    assert batch.ids.tolist() == [[0, 1, 2, 7], [9, 7, 7, 7]]
    assert batch.mask.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch.attention.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert str(batch.ids.dtype) == "torch.int64" and str(batch.mask.dtype) == "torch.bool"


@given(st.integers(1, 5000))
def test_rows_are_padded_little_and_to_few_lengths(length):
    width = padded_length(length)
    assert length <= width < length + (8 if length <= 64 else 32) and padded_length(width) == width
    assert collate([example(length)], 0).ids.shape == (1, width)
    assert collate([example(length)], 0, positions=length).ids.shape == (1, length)


def test_the_first_token_of_a_row_is_never_counted_as_trained():
    assert example(5).trained_tokens == 4
    assert example(5, trained_from=3).trained_tokens == 2
    assert example(1).trained_tokens == 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 33), st.integers(0, 5))
def test_packing_loses_and_repeats_no_token(lengths, length, epoch):
    starts = np.cumsum([0, *lengths])
    documents = [example(size, int(start)) for size, start in zip(lengths, starts, strict=False)]
    rows = pack(documents, length, seed=3, epoch=epoch)
    found = np.concatenate([row.ids for row in rows]) if rows else np.array([])
    assert len(set(found.tolist())) == len(found)
    assert len(found) in (sum(lengths), sum(lengths) - 1)
    assert all(len(row) == length for row in rows[:-1]) and all(2 <= len(row) <= length for row in rows)
    assert sum(np.diff(found) != 1) <= len(lengths)  # whole documents, in another order


def test_packing_draws_its_order_from_seed_and_epoch():
    documents = [example(10, 100 * index) for index in range(20)]

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate([row.ids for row in pack(documents, 16, seed=seed, epoch=epoch)]).tolist()

    assert order(0, 0) == order(0, 0) != order(0, 1) != order(1, 1)
    assert not list(pack([], 16, seed=0, epoch=0))
    with pytest.raises(InputError):
        pack(documents, 1, seed=0, epoch=0)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.booleans())
def test_a_bound_that_binds_nothing_cuts_as_none_and_as_the_best_of_all_cuts(lengths, padded):
    bound = len(lengths) * padded_length(max(lengths))
    (step,) = plan_epoch(lengths, len(lengths), bound, 0, 0, padded=padded)
    assert [step] == list(plan_epoch(lengths, len(lengths), None, 0, 0, padded=padded))
    sizes = sorted((padded_length(length) for length in lengths), reverse=True)
    least = [0]  # cost of the first rows, by every cut there is
    for end in range(1, len(sizes) + 1):
        least.append(min(least[start] + (end - start) * sizes[start] + START_TOKENS for start in range(end)))
    cost = sum(len(micro) * padded_length(max(lengths[row] for row in micro)) + START_TOKENS for micro in step)
    assert cost == least[-1] if padded else len(step) == 1


def test_the_work_of_a_huge_batch_grows_with_its_rows_alone(monkeypatch):
    lengths, looked = np.random.default_rng(0).integers(20, 200, 5_000).tolist(), []
    monkeypatch.setattr(batch, "padded_length", lambda length: looked.append(length) or padded_length(length))
    for padded in (True, False):
        list(plan_epoch(lengths, 1 << 40, 1 << 40, 0, 0, padded=padded))
    assert len(looked) < 2 * len(lengths)  # every row beside every other would be twelve million
