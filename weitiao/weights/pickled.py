"""A file of torch.save described: which tensors it holds, where their bytes lie, and what else is in it.

    found = describe(Path("pytorch_model.bin"))     # called by weights.child in a process of its own

Both forms are read: the zip archive of torch 1.6 and later (``data.pkl`` beside ``data/0``, ``data/1``, …) and the
stream before it (five pickles, then each storage behind its number of elements). A tar archive, the form before those,
and TorchScript, which is a program, are refused. Nothing but sizes and names is read; the data stay where they are.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from weitiao.weights import archive, pickles
from weitiao.weights.archive import Entry, Refused
from weitiao.weights.header import BITS
from weitiao.weights.pickles import Held, Storage, Tensor

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the stream of old
WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "net", "network", "weights")
OTHERS = ("optim", "sched", "rng", "random", "scaler", "callback", "loop", "hyper", "hparam", "args", "config")
DEEP = 6  # levels of tables between the top and a tensor
SHOWN = 60


def describe(path: Path, timed: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """What ``path`` holds: ``form``, ``holds``, ``tensors`` as [name, dtype, shape, strides, start, bytes] with
    ``start`` in the file, and ``left_out``, a line for each thing beside the weights. Refused says what is wrong.

    ``timed`` is told the bytes of the pickle before it is read.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start == archive.LOCAL:
            form, (tree, places) = "zip archive of torch", _zipped(path, file, timed)
        else:
            form, (tree, places) = "stream of torch before 1.6", _streamed(path, file, timed)
    tensors, holds, left_out = _weights(tree)
    rows = [_row(name, tensor, places) for name, tensor in tensors.items()]
    return {"form": form, "holds": holds, "tensors": rows, "left_out": left_out}


def _zipped(path: Path, file: BinaryIO, timed: Callable[[int], None]) -> tuple[Any, dict[str, Entry]]:
    entries = archive.directory(path)
    if "constants.pkl" in entries or any(name.startswith("code/") for name in entries):
        raise Refused("it is a TorchScript program; save its state_dict() instead")
    if "data.pkl" not in entries:
        raise Refused("it is an archive without data.pkl, not one of torch")
    if (order := entries.get("byteorder")) and _content(file, order, 16) != b"little":
        raise Refused("its numbers are big-endian")
    timed(entries["data.pkl"].bytes)
    tree = pickles.read(_content(file, entries["data.pkl"], pickles.PICKLE_BYTES))
    return tree, {name.removeprefix("data/"): entry for name, entry in entries.items() if name.startswith("data/")}


def _content(file: BinaryIO, entry: Entry, limit: int) -> bytes:
    if entry.bytes > limit:
        raise Refused("an entry of {size} bytes where at most {limit} are expected", size=entry.bytes, limit=limit)
    file.seek(entry.start)
    return file.read(entry.bytes)


def _streamed(path: Path, source: BinaryIO, timed: Callable[[int], None]) -> tuple[Any, dict[str, Entry]]:
    head, size = source.read(512), path.stat().st_size
    if head[257:262] == b"ustar":
        raise Refused("it is a tar archive, the form of torch before 0.1.10")
    if head[:1] != b"\x80":
        raise Refused("it is neither an archive nor a pickle of torch")
    file: Any = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)  # never reads more than there is, as files try
    if pickles.read(file) != MAGIC or pickles.read(file) != PROTOCOL:
        raise Refused("it is a pickle, but not one of torch")
    system = pickles.read(file)
    if not isinstance(system, Mapping) or system.get("little_endian") is not True:
        raise Refused("its numbers are big-endian")
    timed(min(size, pickles.PICKLE_BYTES))
    tree, keys = pickles.read(file), pickles.read(file)
    storages = {storage.key: storage for storage in _storages(tree)}
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise Refused("its list of storages is not that of its tensors")
    places: dict[str, Entry] = {}
    for key in keys:
        length = storages[key].elements * BITS[storages[key].dtype] // 8
        start = file.tell()
        (elements,) = struct.unpack("<q", file.read(8).ljust(8, b"\xff"))
        if elements != storages[key].elements or start + 8 + length > size or key in places:
            raise Refused("cut short, or a storage has another size than its tensors say")
        places[key] = Entry(start + 8, length)
        file.seek(start + 8 + length)
    if file.tell() != size:
        raise Refused("{count} bytes follow the last storage", count=size - file.tell())
    return tree, places


def _storages(tree: Any) -> Iterator[Storage]:
    """Every storage below ``tree``; what is there twice is visited once."""
    seen, waiting = set(), [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value.storage
        elif isinstance(value, Storage):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value


def _row(name: str, tensor: Tensor, places: Mapping[str, Entry]) -> list[Any]:
    """A tensor with its place in the file; Refused where its storage is missing or of another size."""
    entry, storage = places.get(tensor.storage.key), tensor.storage
    if entry is None or entry.bytes != storage.elements * BITS[storage.dtype] // 8:
        raise Refused(
            "the storage {key} of {name} is missing or of another size than the tensor says",
            key=storage.key,
            name=name[:SHOWN],
        )
    width = BITS[tensor.dtype] // 8
    strides = None if tensor.strides == _plain(tensor.shape) else tensor.strides
    return [name, tensor.dtype, tensor.shape, strides, entry.start + tensor.offset * width, tensor.elements * width]


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor that lies row after row."""
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= max(side, 1)
    return tuple(reversed(strides))


# ---- which of the tensors are the model's --------------------------------------------------------------------------


def _weights(tree: Any) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    """The weights among what a file holds, what kind of file that is, and what is left out."""
    if isinstance(tree, Tensor):
        return {"tensor": tree}, "one tensor", {}
    if isinstance(tree, list | tuple):
        tree = {str(number): value for number, value in enumerate(tree)}
    if not isinstance(tree, Mapping):
        raise Refused("it holds no tensors")
    lightning = "pytorch-lightning_version" in tree
    if lightning or not any(isinstance(value, Tensor) for value in tree.values()):
        key = next((key for key in WEIGHTS if _flat(tree.get(key))), None)
        if key is not None:
            left = {str(name): _said(value) for name, value in tree.items() if name != key}
            holds = f"Lightning checkpoint ({key})" if lightning else f"training checkpoint ({key})"
            return _flat(tree[key]), holds, left
    wanted = {key: value for key, value in tree.items() if not any(word in str(key).lower() for word in OTHERS)}
    if any(isinstance(value, Tensor) for value in tree.values()):
        wanted = tree  # a plain state dict: its names are a model's, whatever they are
    found = _flat(wanted)
    if not found:
        names = ", ".join(str(key)[:SHOWN] for key in list(tree)[:8])
        raise Refused("it holds no tensors of a model ({names})", names=names)
    left = {str(key): _said(value) for key, value in tree.items() if key not in wanted or not _flat({key: value})}
    return found, "state dict", left


def _flat(values: Any, before: str = "", deep: int = DEEP) -> dict[str, Tensor]:
    """The tensors below a table under their joined names."""
    found: dict[str, Tensor] = {}
    if not isinstance(values, Mapping) or not deep:
        return found
    for key, value in values.items():
        if isinstance(value, Tensor) and isinstance(key, str | int):
            found[f"{before}{key}"] = value
        elif isinstance(value, Mapping) and isinstance(key, str):
            found |= _flat(value, f"{before}{key}.", deep - 1)
    return found


def _said(value: Any) -> str:
    """What something that is left out is: a number itself, of anything else only how much."""
    if isinstance(value, bool | int | float) or value is None:
        return str(value)[:SHOWN]
    tensors = {storage.key: storage for storage in _storages(value)}.values()
    if tensors:
        size = sum(storage.elements * BITS[storage.dtype] // 8 for storage in tensors)
        return f"{len(tensors)} tensors, {size} bytes"
    kind = (
        value.kind if isinstance(value, Held) else {str: "text", list: "list", dict: "table"}.get(type(value), "value")
    )
    return f"{kind}, {len(value)} entries" if isinstance(value, Mapping | list | tuple) else kind
