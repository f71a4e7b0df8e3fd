"""Checkpoints that many processes write, each its own shards, and any number of processes reads: torch's distributed
checkpoints in the form of safetensors, so that nothing is unpickled.

    write(folder, {"parameters/lm_head.weight": a_dtensor})      # every process calls it, with its own shards
    read(folder)                                                 # one process: all of them whole
    fill(folder, tensors)                                        # every process: its own shards, whoever wrote them
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

FILES = "shard-*.safetensors"  # as torch names them
PARAMETERS = "parameters"


def sharded(folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` is of this kind."""
    return any(folder.glob(FILES))


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's shards of ``tensors`` into ``folder``, which all processes see. RunError for any of them."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise RunError(f"{folder}: {_reasons(error)}") from error


def kinds(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Shape and dtype of every tensor in ``folder``, by its name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}  # type: ignore[union-attr]


def fill(folder: Path, tensors: Mapping[str, Tensor], alone: bool = False) -> None:
    """Read into ``tensors`` what ``folder`` has of these names; every process calls it unless it is ``alone``."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it is when alone
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        raise RunError(f"{folder}: {_reasons(error)}") from error


def read(folder: Path, group: str) -> dict[str, Tensor]:
    """All tensors of ``group`` (``parameters``, ``optimizer``), whole, by their names in it."""
    import torch

    prefix = group + "/"
    tensors = {
        name: torch.empty(size, dtype=dtype) for name, (size, dtype) in kinds(folder).items() if name.startswith(prefix)
    }
    fill(folder, tensors, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def parameters(folder: Path) -> dict[str, Tensor]:
    """The parameters that train, of a checkpoint of either kind."""
    from safetensors.torch import load_file

    return read(folder, PARAMETERS) if sharded(folder) else load_file(folder / f"{PARAMETERS}.safetensors")


def _reasons(error: Any) -> str:
    """What went wrong, in the first process that it went wrong in."""
    rank, (reason, _) = next(iter(error.failures.items()))
    return f"{type(reason).__name__}: {reason} (RANK={rank})"
