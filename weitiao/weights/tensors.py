"""The tensors of a folder, one after another, and back into files: nothing is loaded into a model. And which they are.

    write(new_folder, ((name, tensor * 2) for name, tensor in read(folder)))

One tensor is in memory at a time, and a written file holds at most 2 GiB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from weitiao.errors import InputError
from weitiao.weights import formats
from weitiao.weights.inspect import INDEX, SAFETENSORS, weight_files

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2 << 30
SAMPLES, SAMPLE_BYTES = 256, 4096
Tensors = Iterator[tuple[str, "Tensor"]]


def read(folder: Path) -> Tensors:
    """Every tensor of a folder's safetensors or .bin files, file by file."""
    problems: list[str] = []
    files = weight_files(folder, problems)
    if problems:
        raise InputError(problems)
    for file in files:
        yield from load(file).items()


def load(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a file of any form, mapped and not read; nothing that it holds is run."""
    return formats.Tensors(file)


def write(folder: Path, tensors: Tensors) -> None:
    """model.safetensors, or several files of at most SHARD_BYTES and their index."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    names: list[list[str]] = []
    starts: set[int] = set()
    held = total = 0

    def flush() -> None:
        save_file(shards[0], folder / f"{len(names):05d}.safetensors", metadata={"format": "pt"})
        names.append(list(shards[0]))
        shards[0] = {}
        starts.clear()

    for name, tensor in tensors:
        if held and held + tensor.nbytes > SHARD_BYTES:
            flush()
            held = 0
        tensor = tensor.contiguous()
        shards[0][name] = tensor.clone() if tensor.data_ptr() in starts else tensor  # each has bytes of its own
        starts.add(tensor.data_ptr())
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(names) == 1:
        (folder / "00000.safetensors").rename(folder / SAFETENSORS)
        return
    places = {}
    for number, held_names in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{number:05d}.safetensors").rename(folder / file)
        places |= dict.fromkeys(held_names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def fingerprint(folder: Path) -> str:
    """A hash of a folder's weights by samples of their bytes, SAMPLES from each file: other weights have another."""
    found = hashlib.sha256()
    for file in weight_files(folder, []):
        size = file.stat().st_size
        found.update(f"{size} ".encode())
        with file.open("rb") as opened:
            for number in range(SAMPLES):
                opened.seek(size * number // SAMPLES)
                found.update(opened.read(SAMPLE_BYTES))
    return found.hexdigest()[:32]
