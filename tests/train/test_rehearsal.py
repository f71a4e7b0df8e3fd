"""The rehearsal takes the worst micro-batch, leaves nothing behind, and says what to change if memory is too small."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weitiao.data.batch import Example
from weitiao.errors import RunError
from weitiao.methods import METHODS
from weitiao.models import tiny
from weitiao.train import logps, rehearsal
from weitiao.train.course import Course
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import TaskOptions


def example(length: int) -> Example:
    ids = np.arange(length, dtype=np.int32) % 50
    return Example(ids, np.ones(length, dtype=bool), id=f"row of {length}")


EXAMPLES = [example(length) for length in (5, 9, 30, 6, 7, 8, 12, 4)]
OPTIONS = TrainOptions.model_validate({"batch_size": 2, "micro_batch_tokens": 32})
TASK = TaskOptions.model_validate({}).build()


def test_the_worst_micro_batch_has_the_most_padded_tokens():
    course = Course(EXAMPLES, TASK, OPTIONS)
    batches = [batch for step in range(1, course.steps_per_epoch + 1) for batch in course.micro_batches(step)]
    worst = rehearsal.worst(course)
    assert course.computed_tokens(worst) == max(map(course.computed_tokens, batches)) >= 30


def test_nothing_is_left_behind():
    model = METHODS["full"]().attach(tiny.make("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    loss = rehearsal.rehearse(model, METHODS["full"](), TASK, EXAMPLES, OPTIONS, pad_id=0)
    assert loss > 0
    assert torch.equal(torch.rand(3), drawn)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_names_what_to_change(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise error

    model = METHODS["full"]().attach(tiny.make("llama"))
    monkeypatch.setattr(logps, "token_logps", fail)
    with pytest.raises(RunError, match=r"up to 30 tokens; take train\.memory=low, train\.micro_batch_tokens=30"):
        rehearsal.rehearse(model, METHODS["full"](), TASK, EXAMPLES, OPTIONS, pad_id=0)


def test_a_loss_that_is_not_finite_is_said_before_step_1():
    model = METHODS["full"]().attach(tiny.make("llama"))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match=r"the loss is nan before the first step \(rows row of 30\)"):
        rehearsal.rehearse(model, METHODS["full"](), TASK, EXAMPLES, OPTIONS, pad_id=0)
