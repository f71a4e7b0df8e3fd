"""Room on the disk: as many checkpoints as the loop's own rule can write, and at once what pruning lets stand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.train.support import rows
from weitiao.train.course import Course
from weitiao.train.options import TrainOptions
from weitiao.train.room import Room, saves
from weitiao.train.tasks import TaskOptions
from weitiao.weights.folders import ROOM_BYTES

CADENCES = st.one_of(st.sampled_from(["epoch", "none"]), st.integers(1, 9))


@given(CADENCES, CADENCES, st.integers(1, 4), st.sampled_from([0.4, 1, 1.5, 3]), st.booleans())
def test_checkpoints_are_those_of_a_run_that_saves_all_it_may(save_every, evaluate_every, keep, epochs, tested):
    options = TrainOptions(epochs=epochs, save_every=save_every, evaluate_every=evaluate_every, keep=keep, batch_size=4)
    course = Course(rows(11), TaskOptions().build(), options)
    last, held, most, count = course.total_steps, [], 0, 0
    for step in range(1, last + 1):  # as loop.fit does, where every evaluation is the best so far up to the first
        measured = tested and course.due(evaluate_every, step)
        if measured or step == last or course.due(save_every, step):
            count, held = count + 1, [*held, step]
            most, best = max(most, len(held)), next((one for one in held if course.due(evaluate_every, one)), 0)
            held = [one for one in held if one in held[-keep:] or (tested and one == best)]
    room = Room.of(course, options, tested, weights=100, state=200, result=1000)
    assert saves(course, options, tested) == count
    assert most <= room.most <= most + 1 and len(held) <= room.kept <= len(held) + 1
    if not tested or evaluate_every == "none":
        assert (room.most, room.kept) == (most, len(held))
    assert room.needed == max(room.most * (300 + ROOM_BYTES), room.kept * (300 + ROOM_BYTES) + 1000)
