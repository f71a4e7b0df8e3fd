"""Training in several processes, which torchrun has started: each computes its share of a step's rows.

    with joined(options.process_timeout) as ranks:
        many = of(ranks, model, task, options)      # FSDP2 puts a shard of every parameter in the place of the whole
        fit(model, …, many=many)
        many.make_whole(model)                      # the first process has the whole model again

A step is that of one process: the same rows, its loss and its gradient summed over all of them and divided by the
trained tokens of all. **ddp**: every process holds everything, and gradients are summed once a step, after its last
micro-batch. torch's DistributedDataParallel would sum during the last backward pass instead, which it knows by hooks
of autograd; blocks that are computed in one piece have a backward pass of their own and add to gradients in place, and
a step of several micro-batches has less to hide than it has to wait for. **fsdp2**: torch's ``fully_shard`` on every
block and on the rest (Zhao et al., arXiv 2304.11277): parameters, gradients and the optimiser's state are divided, and
a block is whole only while it is computed; transformers' own modules run.

In one process nothing here does anything.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weitiao import machine
from weitiao.data.batch import Example
from weitiao.errors import InputError, t
from weitiao.machine.ranks import SHOWN, STARTED, Ranks
from weitiao.methods.base import compute_dtype, trainable
from weitiao.models import modules
from weitiao.train import checkpoint
from weitiao.train.course import rows_crc32
from weitiao.train.modes import seed_everything
from weitiao.train.options import TrainOptions
from weitiao.train.stopping import Stop

if TYPE_CHECKING:
    from weitiao.data.batch import Batch
    from weitiao.train.tasks import Task

BUCKET_BYTES = 32 << 20  # gradients summed by one message: enough for a network's full rate


@dataclass(frozen=True)
class Many:
    """The processes of a run and, under FSDP2, the ``root`` through which a loss is computed; ``engine``: none, ddp or
    fsdp2."""

    ranks: Ranks = field(default_factory=Ranks)
    engine: str = "none"
    root: Any = None

    @property
    def sharded(self) -> bool:
        """Whether this process holds shards."""
        return self.root is not None

    def own(self, batches: Sequence[Sequence[Example]]) -> list[Sequence[Example]]:
        """The micro-batches of a step that this process computes; under FSDP2 all processes have as many, some of them
        empty, since a block becomes whole only if all of them ask for it."""
        size = self.ranks.size
        filled = [*batches, *([[]] * (-len(batches) % size))] if self.sharded else batches
        return [batch for batch in filled[self.ranks.rank :: size] if batch or self.sharded]

    def spare(self, batches: Sequence[Sequence[Example]]) -> list[Example]:
        """What a process computes, and counts for nothing, when it has no rows left: the shortest of all."""
        return [min((example for batch in batches for example in batch), key=len)]

    def total(self, task: Task, model: nn.Module, batch: Batch) -> Tensor:
        """The task's summed loss over a micro-batch."""
        return self.root(batch) if self.sharded else task.total(model, batch)

    def summed(self, facts: Tensor, parameters: Iterable[nn.Parameter], stop: Stop) -> Tensor:
        """The ``facts`` of a step (float32 [n]: its loss, and what must be finite in all processes), summed; gradients
        are summed in place, in float32 as they are held, and it is agreed whether to stop. A parameter without a
        gradient in any process has none; one that has, has one in all."""
        if self.ranks.alone:
            return facts
        import torch.distributed as dist

        trained = [] if self.sharded else list(parameters)
        flags = torch.tensor([stop.heard, *(p.grad is not None for p in trained)], device=facts.device)
        together = torch.cat([facts, flags.float()])
        dist.all_reduce(together)
        heard, *found = together[len(facts) :].tolist()
        stop.asked = stop.asked or heard > 0
        for parameter, there in zip(trained, found, strict=True):
            if there and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        add_up([parameter.grad for parameter in trained if parameter.grad is not None])
        return together[: len(facts)]

    def sum(self, total: Tensor) -> Tensor:
        """``total`` summed over all processes."""
        if not self.ranks.alone:
            import torch.distributed as dist

            dist.all_reduce(total)
        return total

    def agree(self, stop: Stop) -> bool:
        """Whether to stop, which all processes know from here on."""
        stop.asked = stop.asked or self.ranks.any(stop.heard)
        return stop.asked

    def measured(self, evaluator: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """What an evaluator finds in the first process; the others compute only what shards need them for, with its
        random numbers."""
        if not self.sharded:
            return dict(self.ranks.told(evaluator))
        checkpoint.set_random_state(self.ranks.told(checkpoint.random_state))
        found = dict(evaluator())
        return self.ranks.told(lambda: found)

    # ---- shards ----------------------------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While it is open, what lies outside of blocks is whole, and the model computes without its ``root``."""
        if not self.sharded:
            yield
            return
        self.root.unshard()
        try:
            yield
        finally:
            self.root.reshard()

    def make_whole(self, model: nn.Module) -> None:
        """Under FSDP2, put all parameters whole into the first process's ``model``, in the host's memory, to be saved;
        it computes nothing any more."""
        if not self.sharded:
            return
        whole: dict[int, Any] = {}
        held: list[dict[str, Any]] = [module._parameters for module in model.modules()]
        for parameters in held:
            for name, parameter in parameters.items():
                if parameter is None or not hasattr(parameter, "full_tensor"):
                    continue
                if id(parameter) not in whole:  # tied ones are one
                    tensor = parameter.full_tensor().detach()
                    kept = tensor.cpu() if self.ranks.first else parameter
                    whole[id(parameter)] = nn.Parameter(kept, parameter.requires_grad) if self.ranks.first else kept
                parameters[name] = whole[id(parameter)]

    # ---- random numbers --------------------------------------------------------------------------------------------

    def random_state(self) -> dict[str, Tensor]:
        """Those of all processes: the first's by their own names, the others' behind their numbers."""
        states = self.ranks.gathered(checkpoint.random_state())
        others = {
            f"{rank}/{name}": tensor for rank, state in enumerate(states[1:], 1) for name, tensor in state.items()
        }
        return states[0] | others

    def set_random_state(self, state: Mapping[str, Tensor], seed: int) -> None:
        """Put back this process's own; from ``seed`` where there was no such process then."""
        prefix = "" if self.ranks.first else f"{self.ranks.rank}/"
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        own = {name: tensor for name, tensor in own.items() if "/" not in name}
        checkpoint.set_random_state(own) if own else self.seed(seed)

    def seed(self, seed: int) -> None:
        """Seed every generator: the first process's as a single one's, and every other's otherwise."""
        seed_everything(seed + self.ranks.rank * 1_000_003)


ALONE = Many()


def add_up(gradients: Sequence[Tensor]) -> None:
    """Sum each of ``gradients`` over all processes, in place, small ones together."""
    import torch.distributed as dist

    for bucket in _buckets(gradients):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """``tensors`` in order, as many together as BUCKET_BYTES hold, or one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.nbytes for one in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


# ---- beginning -----------------------------------------------------------------------------------------------------


def engine(options: TrainOptions, ranks: Ranks) -> str:
    """What ``train.distributed`` comes to: none, ddp or fsdp2. InputError, before anything is loaded, where it does
    not go with how the process was started, or where the step's rows do not divide."""
    wanted, size, problems = options.distributed, ranks.size, []
    if wanted in ("ddp", "fsdp2") and not ranks.started:
        message = "train.distributed: {engine} is for processes that torchrun starts: {command}"
        problems.append(t(message, engine=wanted, command=STARTED.format(processes=2)))
    if wanted == "none" and size > 1:
        message = "train.distributed: none, but torchrun has started {size} processes; take auto, ddp or fsdp2"
        problems.append(t(message, size=size))
    if options.batch_size % size:
        message = "train.batch_size: the {rows} rows of a step do not divide among {size} processes; take {near}, say"
        near = options.batch_size // size * size or size
        problems.append(t(message, rows=options.batch_size, size=size, near=near))
    if problems:
        raise InputError(problems)
    return "none" if ranks.alone else "ddp" if wanted == "auto" else wanted


def fitting(options: TrainOptions, kind: str) -> TrainOptions:
    """``options`` as the engine ``kind`` computes: what frozen blocks make of a row is not kept, since another process
    has the row in the next epoch; and shards are for transformers' own modules."""
    if kind == "none":
        return options
    return options.model_copy(update={"trunk": "off"} | ({"engine": "plain"} if kind == "fsdp2" else {}))


def of(ranks: Ranks, model: nn.Module, task: Task, options: TrainOptions, train: Sequence[Example]) -> Many:
    """The processes of a run over ``model``, to which its method is attached, and the rows ``train``. InputError unless
    all of them have the same rows and weights."""
    kind = engine(options, ranks)
    if kind == "none":
        return Many(ranks)
    first = next(model.parameters()).detach().cpu().contiguous()
    facts = rows_crc32(train), zlib.crc32(first.view(torch.uint8).numpy().data)
    found = ranks.gathered(facts)
    if other := [str(rank) for rank, there in enumerate(found) if there != found[0]]:
        message = (
            "the processes {ranks} have other rows or weights than the first; are the files on their machine older?"
        )
        raise InputError(t(message, ranks=", ".join(other[:SHOWN])))
    if kind == "fsdp2":
        return Many(ranks, kind, _shard(model, task, ranks))
    import torch.distributed as dist

    for parameter in trainable(model).values():
        dist.broadcast(parameter.detach(), 0)
    return Many(ranks, kind)


class _Loss(nn.Module):
    """The whole of what a step computes, so that FSDP2 knows where it begins and ends, the head with it."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of a micro-batch."""
        return self.task.total(self.model, batch)


def _shard(model: nn.Module, task: Task, ranks: Ranks) -> nn.Module:
    """Divide every parameter of ``model``: a block's are together while it is computed, in the dtype that it computes
    in, the others' during the whole pass. Gradients are summed in float32, and not divided."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(machine.device(), (ranks.size,))
    dtype = compute_dtype(model)
    within = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    beside = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in modules.blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=within)
    root: Any = fully_shard(_Loss(model, task), mesh=mesh, mp_policy=beside)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root
