"""Checkpoints: everything a run needs to go on bit for bit as if it had never stopped.

    save(run.checkpoints, state)                       # checkpoints/step-00000100/
    path, skipped = newest(run.checkpoints)            # the newest one whose every byte is right
    state = load(path)

A checkpoint is safetensors and JSON. It is written to a temporary folder, hashed into a manifest, flushed to the disk
and renamed; a folder whose files do not match its manifest is no checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weitiao.errors import RunError, say, t
from weitiao.weights import shards
from weitiao.weights.folders import problems, seal, whole

PREFIX = "step-"
GROUPS, MOMENTS = ("parameters", "random", "method"), "optimizer"
OPTIMIZER = "optimizer*.safetensors"
SHARD_BYTES = 64 << 20  # of the optimiser's state in one file; paged state comes into memory by as much


class Poisoned(RunError):
    """A state that holds a number which is not finite; it never becomes a checkpoint."""


@dataclass
class State:
    """``parameters`` and ``optimizer`` are tensors by name; ``random`` is what :func:`random_state` gives; ``method``
    what the method keeps between steps; ``facts`` is JSON: step, position in the data, best so far, guard history,
    what the run was started with."""

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    method: dict[str, Tensor]
    facts: dict[str, Any]


def save(folder: Path, state: State, saved: Callable[[Tensor], None] | None = None) -> Path:
    """Write ``state`` below ``folder``, whole or not at all. RunError names the bytes needed if the disk is full;
    Poisoned for a weight or moment that is not finite. ``saved`` is told each of the optimiser's tensors that is
    written."""
    path = folder / f"{PREFIX}{state.step:08d}"
    with opened(path, state) as temporary:
        check_finite(state.parameters | state.method, path)
        _write(temporary, "parameters", state.parameters)
        for number, shard in enumerate(_shards(state.optimizer)):
            check_finite(shard, path)
            _write(temporary, f"{MOMENTS}-{number:05d}" if number else MOMENTS, shard)
            if saved:
                for tensor in shard.values():
                    saved(tensor)
        close(temporary, state)
    return path


def opened(path: Path, state: State) -> AbstractContextManager[Path]:
    """A temporary folder with room for ``state``, which becomes ``path``."""
    groups = (getattr(state, name) for name in (*GROUPS, MOMENTS))
    return whole(path, sum(tensor.nbytes for group in groups for tensor in group.values()))


def close(temporary: Path, state: State) -> None:
    """Write what is left of ``state`` beside parameters and optimiser, and seal the folder."""
    for name in ("random", "method"):
        _write(temporary, name, getattr(state, name))
    (temporary / "state.json").write_text(json.dumps({"step": state.step, **state.facts}), encoding="utf-8")
    seal(temporary)


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Poisoned if one of ``tensors`` holds a number that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise poisoned(path, name)


def poisoned(path: Path, name: str) -> Poisoned:
    """What is said of a tensor that holds a number which is not finite."""
    return Poisoned(t("{path}: not saved: {name} holds numbers that are not finite", path=path, name=name))


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """``tensors`` in parts of at most SHARD_BYTES, or of one tensor; one part at least."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors.items():
        if shard and held + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    yield shard


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint below ``folder`` that verifies, and what was skipped on the way to it and why."""
    skipped = []
    for path in reversed(listed(folder)):
        if not (wrong := problems(path)):
            return path, skipped
        skipped.append(f"{path}: {'; '.join(wrong)}")
    return None, skipped


def best(folder: Path) -> Path | None:
    """The checkpoint that the newest one calls the best so far, if it is there and verifies."""
    path, _ = newest(folder)
    step = path and (facts(path).get("best") or {}).get("step")
    found = folder / f"{PREFIX}{step:08d}" if step else None
    return found if found and found.is_dir() and not problems(found) else None


def load(path: Path) -> State:
    """Read the checkpoint at ``path``, whole, whoever has written it; RunError if it does not verify."""
    verify(path)
    state = load_small(path)
    state.parameters.update(shards.parameters(path))
    state.optimizer.update(
        shards.read(path, MOMENTS)
        if shards.sharded(path)
        else {name: tensor for file in sorted(path.glob(OPTIMIZER)) for name, tensor in load_file(file).items()}
    )
    return state


def load_small(path: Path) -> State:
    """The checkpoint at ``path``, which verifies, without its parameters and the optimiser's state."""
    known = facts(path)
    generators, method = (load_file(path / f"{name}.safetensors") for name in ("random", "method"))
    return State(known.pop("step"), {}, {}, generators, method, known)


def verify(path: Path) -> None:
    """RunError if the checkpoint at ``path`` does not verify."""
    if wrong := problems(path):
        raise RunError([f"{path}: {problem}" for problem in wrong])


def facts(path: Path) -> dict[str, Any]:
    """The facts of the checkpoint at ``path``, without its tensors; it is known to verify."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def listed(folder: Path) -> list[Path]:
    """Checkpoint folders below ``folder``, oldest first, verified or not."""
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the ``keep`` newest checkpoints and the best, and what a killed save left behind. One that cannot
    be moved (on a full disk even a name may need room) stays, whole, until the next save."""
    for path in listed(folder)[:-keep]:
        if path.name == f"{PREFIX}{best_step or 0:08d}":
            continue
        try:  # under its name it is whole, so that goes first
            os.replace(path, path.with_name(f".{path.name}.old.tmp"))
        except OSError as error:
            say("{path}: an old checkpoint stays, as it cannot be moved: {reason}", path=path, reason=error.strerror)
    for path in folder.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


# ---- random numbers ------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Tensor]:
    """The state of every generator a run draws from: torch (CPU and CUDA), numpy, Python."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, after = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.rest": torch.tensor([version, float("nan") if after is None else after], dtype=torch.float64),
    }
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return state | {f"cuda.{number}": tensor for number, tensor in enumerate(cuda)}


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put every generator back to ``state``."""
    torch.set_rng_state(state["torch"])
    position, has_gauss, gauss = state["numpy.rest"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, after = state["python.rest"].tolist()
    words = tuple(state["python.words"].tolist())
    random.setstate((int(version), words, None if after != after else after))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state[name] for name in sorted(state) if name.startswith("cuda.")])
