"""Checkpoints of a run in several processes, and which of them writes and reads what.

    save(many, run.checkpoints, state)               # one process, or each its shards into one folder
    state = load(many, path, parameters)             # written by any number of processes

Where every process holds everything (ddp), the first writes an ordinary checkpoint, and reads it for all. Under FSDP2
each writes its shards (torch's distributed checkpoints, as safetensors) into one folder, which all of them must see;
the first seals it with the manifest and gives it its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weitiao.errors import RunError, t
from weitiao.machine.ranks import SHOWN, Ranks
from weitiao.train import checkpoint
from weitiao.train.many import Many
from weitiao.weights import shards

SHARDED = (shards.PARAMETERS, checkpoint.MOMENTS)  # what of a state is divided


def save(many: Many, folder: Path, state: checkpoint.State, saved: Callable[[Tensor], None] | None = None) -> None:
    """Write ``state`` below ``folder`` as ``checkpoint.save`` does: the first process alone or, under FSDP2, each its
    shards into one folder, which the first seals. Poisoned in all of them if it is so in one."""
    if not many.sharded:
        many.ranks.told(lambda: str(checkpoint.save(folder, state, saved)))
        return
    path = folder / f"{checkpoint.PREFIX}{state.step:08d}"
    tensors = {f"{group}/{name}": tensor for group in SHARDED for name, tensor in getattr(state, group).items()}
    bad = [name for name, tensor in tensors.items() if not _local(tensor).isfinite().all()]
    if bad := next((names for names in many.ranks.gathered(bad) if names), None):
        raise checkpoint.poisoned(path, bad[0])
    whole = checkpoint.opened(path, state) if many.ranks.first else nullcontext(path)
    with whole as temporary:
        temporary = Path(many.ranks.told(lambda: str(temporary)))
        _check_seen(many.ranks, temporary)
        shards.write(temporary, tensors)
        if many.ranks.first:
            checkpoint.close(temporary, state)
    many.ranks.told(lambda: None)  # nobody goes on before the folder has its name


def _check_seen(ranks: Ranks, folder: Path) -> None:
    """RunError unless all processes see ``folder``, which the first has made: shards would be written elsewhere."""
    if blind := [str(rank) for rank, sees in enumerate(ranks.gathered(folder.is_dir())) if not sees]:
        message = "{path}: the processes {ranks} do not see this folder; with fsdp2 all machines must share the output"
        raise RunError(t(message, path=folder.parent, ranks=", ".join(blind[:SHOWN])))


def load(many: Many, path: Path, parameters: Mapping[str, nn.Parameter]) -> checkpoint.State:
    """The checkpoint at ``path``, written by any number of processes: whole, or this process's shards of it. Where
    nobody holds shards the first process reads it for all of them, so that only it must see the folder."""
    if many.ranks.alone:
        return checkpoint.load(path)
    if not many.sharded:
        return _spread(many.ranks, path)
    if not shards.sharded(path):
        state = checkpoint.load(path)
        for tensors in (state.parameters, state.optimizer):
            tensors.update({name: _sharded_like(tensor, parameters, name) for name, tensor in tensors.items()})
        return state
    many.ranks.told(lambda: checkpoint.verify(path))
    state = checkpoint.load_small(path)
    wanted = {
        name: _empty_like(size, dtype, parameters, name)
        for name, (size, dtype) in shards.kinds(path).items()
        if name.startswith(tuple(f"{group}/" for group in SHARDED))
    }
    shards.fill(path, wanted)
    for name, tensor in wanted.items():
        group, _, rest = name.partition("/")
        getattr(state, group)[rest] = tensor
    return state


def _spread(ranks: Ranks, path: Path) -> checkpoint.State:
    """The state that the first process reads, in all of them; tensors go one by one."""
    import torch.distributed as dist

    read: list[checkpoint.State] = []

    def begin() -> tuple[Any, ...]:
        read.append(state := checkpoint.load(path))
        kinds = {
            group: {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in getattr(state, group).items()}
            for group in (*checkpoint.GROUPS, checkpoint.MOMENTS)
        }
        return state.step, kinds, state.facts

    step, kinds, facts = ranks.told(begin)
    if not ranks.first:
        empty = {
            group: {name: torch.empty(*kind[:1], dtype=kind[1]) for name, kind in kinds[group].items()}
            for group in kinds
        }
        read.append(checkpoint.State(step=step, facts=facts, **empty))
    for group in kinds:
        for tensor in getattr(read[0], group).values():
            dist.broadcast(tensor, 0)
    return read[0]


def _of(parameters: Mapping[str, nn.Parameter], name: str, size: Any) -> Any:
    """The parameter of which the tensor ``name`` of a checkpoint is a part of the state, if it is divided as that."""
    found = next((parameters[part] for part in (name, name.partition("/")[2]) if part in parameters), None)
    return found if found is not None and found.shape == size else None


def _empty_like(size: Any, dtype: torch.dtype, parameters: Mapping[str, nn.Parameter], name: str) -> Tensor:
    like = _of(parameters, name.partition("/")[2], size)
    return torch.empty(size, dtype=dtype) if like is None else torch.empty_like(like, dtype=dtype).detach()


def _sharded_like(tensor: Tensor, parameters: Mapping[str, nn.Parameter], name: str) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    like = _of(parameters, name, tensor.shape)
    if like is None:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
