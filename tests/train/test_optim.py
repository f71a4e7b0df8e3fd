"""Schedules by hand, and every optimiser against its definition."""

from __future__ import annotations

import pytest
import torch

from weitiao.methods.full import Full
from weitiao.models import tiny
from weitiao.train.optim import OPTIMIZERS, build, factor, set_rate, state_bytes
from weitiao.train.optimizers import AdamW8bit, Lion, Muon, orthogonal


def test_warm_up_is_linear_and_reaches_the_full_rate():
    assert [factor("constant", step, 100, 4, 0.0) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falls_towards_the_minimum_and_never_reaches_it(schedule: str):
    course = [factor(schedule, step, 50, 10, 0.1) for step in range(1, 52)]
    assert max(course) == course[9] == 1.0
    assert course[9:] == sorted(course[9:], reverse=True)
    assert course[49] > course[50] == pytest.approx(0.1)


def test_cosine_and_linear_are_half_way_in_the_middle():
    assert factor("cosine", 30, 49, 10, 0.0) == pytest.approx(0.5)
    assert factor("linear", 30, 49, 10, 0.2) == pytest.approx(0.6)


def test_short_runs_learn_in_every_step():
    assert factor("cosine", 2, 4, 100, 0.0) == 1.0  # warm-up takes half of the steps at most
    assert all(factor("cosine", step, steps, 20, 0.0) > 0 for steps in (1, 2, 3) for step in range(1, steps + 1))


def test_groups_keep_their_own_rates():
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.01, "weight_decay": 0.0}]
    optimizer = build("adamw", groups, learning_rate=0.1, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.5)
    assert set_rate(optimizer, 0.5) == 0.05
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def paths(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, steps: int = 20) -> list[float]:
    """How far two optimisers that hold copies of one parameter are apart after each step on the same gradients."""
    (one,), (other,) = ours.param_groups[0]["params"], theirs.param_groups[0]["params"]
    draw, apart = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        one.grad = torch.randn(one.shape, generator=draw)
        other.grad = one.grad.clone()
        ours.step()
        theirs.step()
        apart.append((one - other).abs().max().item())
    return apart


def copies(*shape: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())


def test_lion_by_hand():
    weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.5, 0.75), weight_decay=0.5)
    weight.grad = torch.tensor([4.0, -2.0])
    optimizer.step()  # average 0: the direction is the gradient's sign
    torch.testing.assert_close(weight.detach(), torch.tensor([0.95 - 0.1, -0.95 + 0.1]))
    weight.grad = torch.tensor([-1.5, 3.0])  # average [1, -0.5]: 0.5 * 1 - 0.5 * 1.5 < 0, and 0.5 * -0.5 + 1.5 > 0
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.85 * 0.95 + 0.1, -0.85 * 0.95 - 0.1]))


@pytest.mark.parametrize("shape", [(64, 128), (3,)])
def test_adamw_in_8_bits_follows_adamw(shape: tuple[int, ...]):
    one, other = copies(*shape)
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    apart = paths(AdamW8bit([one], **settings), torch.optim.AdamW([other], **settings))
    assert max(apart) <= (0.03 if len(shape) == 2 else 1e-6)  # twenty steps of at most 0.01 each


def test_adamw_in_8_bits_takes_a_quarter_of_the_memory():
    weight, _ = copies(256, 256)
    optimizer = AdamW8bit([weight], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(tensor.nbytes for tensor in optimizer.state[weight].values() if tensor.ndim)
    assert held == state_bytes("adamw8bit", weight.numel(), 0) <= 0.26 * state_bytes("adamw", weight.numel(), 0)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_muon_moves_as_torch_s_own(shape: tuple[int, int]):
    one, other = copies(*shape)
    ours = Muon([{"params": [one], "linear": True}], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    theirs = torch.optim.Muon(
        [other], lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    assert max(paths(ours, theirs)) <= 0.01 * max(shape) ** 0.5 * 0.2  # one step: bfloat16 or float32 inside


def test_an_orthogonal_direction_has_singular_values_about_one():
    drawn = torch.randn(40, 90, generator=torch.Generator().manual_seed(2))
    for matrix in (drawn, drawn.T):
        values = torch.linalg.svdvals(orthogonal(matrix).float())
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_leaves_embeddings_norms_and_biases_to_adamw():
    model = tiny.make("qwen2")
    groups = Full().parameter_groups(model, 1e-3)
    embedding = model.get_input_embeddings().weight
    assert [group.get("linear", False) for group in groups] == [True, False, False]
    assert any(embedding is parameter for parameter in groups[1]["params"])
    optimizer = build("muon", groups, learning_rate=1e-3, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kinds = {parameter: set(state) for parameter, state in optimizer.state.items()}
    assert all(kinds[weight] == {"momentum"} for weight in groups[0]["params"])
    assert all(kinds[other] == {"step", "exp_avg", "exp_avg_sq"} for group in groups[1:] for other in group["params"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_lowers_a_loss_and_keeps_what_the_plan_says(name: str):
    torch.manual_seed(0)
    network = torch.nn.Linear(64, 128)
    groups = [{"params": [network.weight], "lr": 0.01, "linear": True}, {"params": [network.bias], "lr": 0.01}]
    optimizer = build(name, groups, learning_rate=0.01, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.0)
    inputs, wanted = torch.randn(256, 64), torch.randn(256, 128)
    losses = []
    for _ in range(30):
        loss = (network(inputs) - wanted).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02
    held = sum(t.nbytes for state in optimizer.state.values() for kind, t in state.items() if kind != "step")
    assert abs(held - state_bytes(name, 64 * 128 + 128, 64 * 128)) <= 2048  # Adafactor's rows, what is small
