"""Files of tensors, whatever program wrote them: described without being loaded, and read tensor by tensor.

    found = describe("epoch=3.ckpt")                # its form, names, shapes, what is beside the weights
    tensors = Tensors("epoch=3.ckpt")               # a tensor is mapped, or dequantised, when it is asked for

safetensors; pickled files (.bin, .pt, .pth, .ckpt: ``pickled.py`` and ``pickles.py``, in a process with limits); GGUF.
A file is known by its first bytes, not by its name. Nothing in it is run, and no size in it is believed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.errors import InputError, t
from weitiao.weights import archive, child, gguf, header
from weitiao.weights.archive import Refused
from weitiao.weights.header import BITS, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
FOREIGN = {  # first bytes of what is sometimes found under a model's name
    b"\x89HDF": "HDF5 (Keras)", b"7z\xbc\xaf": "a 7z archive", b"\x1f\x8b": "gzip", b"\x93NUM": "a NumPy array",
    b"Rar!": "a RAR archive", b"\x7fELF": "a program", b"MZ": "a program", b"#!": "a program", b"<": "a web page",
    b"ggml": "GGML, the form before GGUF", b"ggjt": "GGML, the form before GGUF", b"BZh": "bzip2",
}  # fmt: skip
TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "C128": "complex128",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32",
    "U64": "uint64", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What a file says of itself: its form, what it holds, its tensors, and what is beside them."""

    form: str
    holds: str
    tensors: list[TensorInfo]
    left_out: Mapping[str, str] = field(default_factory=dict)  # no weights: name -> what it is
    values: Mapping[str, Any] = field(default_factory=dict)  # of safetensors' and GGUF's own tables


def describe(path: str | Path) -> Found:
    """What is in one file. InputError, with the reason, for one that is missing, cut or unknown, or that lies."""
    path = Path(path)
    if not path.is_file():
        raise InputError(t("no such file: {path}", path=path))
    status = path.stat()
    return _describe(path.absolute(), path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _describe(absolute: Path, path: Path, size: int, changed: int) -> Found:
    with path.open("rb") as file:
        start = file.read(16)
    if header.is_pointer(path):
        raise InputError(header.pointer(path))
    if start[:4] == gguf.MAGIC:
        return _gguf(path)
    if start[:4] == archive.LOCAL or start[:1] == b"\x80":
        return _pickled(path, size)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        tensors, values = header.read_whole(path)
        return Found("safetensors", "tensors", tensors, values=values)
    known = next((name for first, name in FOREIGN.items() if start.startswith(first)), t("an unknown form"))
    message = "{path}: {known}, not safetensors, a file of torch.save or GGUF; or cut short"
    raise InputError(t(message, path=path, known=known))


def _gguf(path: Path) -> Found:
    try:
        values, tensors = gguf.read_header(path)
    except Refused as error:
        raise InputError(t("{path}: refused: {reason}", path=path, reason=error.said())) from error
    left = {name: str(value)[:60] for name, value in values.items() if name.startswith("tokenizer.")}
    return Found("GGUF", str(values.get("general.architecture", "-"))[:60], tensors, left, values)


def _pickled(path: Path, size: int) -> Found:
    """The child's answer, checked once more: only sizes that fit the file are believed."""
    said = child.run(path)
    try:
        tensors = [_row(path, size, *row) for row in said["tensors"]]
        left = {str(name): str(what) for name, what in said["left_out"].items()}
        return Found(str(said["form"]), str(said["holds"]), tensors, left)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(t("{path}: refused: {reason}", path=path, reason=error)) from error


def _row(path: Path, size: int, name: str, dtype: str, shape: Any, strides: Any, start: int, count: int) -> TensorInfo:
    found = TensorInfo(name, tuple(shape), dtype, count, path.name, start, tuple(strides) if strides else None)
    numbers = (*found.shape, *(found.strides or ()), start, count)
    if any(type(number) is not int or number < 0 for number in numbers) or count * 8 != found.parameters * BITS[dtype]:
        raise ValueError(name)
    if start + _extent(found) > size:
        raise ValueError(name)
    return found


def _extent(tensor: TensorInfo) -> int:
    """Bytes of the file from a tensor's first element to behind its last."""
    if tensor.strides is None or not tensor.parameters:
        return tensor.bytes
    last = sum((side - 1) * stride for side, stride in zip(tensor.shape, tensor.strides, strict=True))
    return (last + 1) * BITS[tensor.dtype] // 8


class Tensors(Mapping[str, "Tensor"]):
    """The tensors of one file by name: mapped, so that a change made to one stays in memory; GGUF's blocks as float32.

    InputError as for ``describe``, and for a tensor of a type that torch lacks or whose blocks are not read.
    """

    def __init__(self, path: str | Path):
        import numpy as np

        self.path, self.found = Path(path), describe(path)
        self.infos = {tensor.name: tensor for tensor in self.found.tensors}
        empty = not self.path.stat().st_size
        self._bytes = np.zeros(0, np.uint8) if empty else np.memmap(self.path, dtype=np.uint8, mode="c")

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __getitem__(self, name: str) -> Tensor:
        import torch

        info = self.infos[name]
        data = self._bytes[info.start : info.start + _extent(info)]
        if info.dtype in gguf.BLOCKS:
            numbers = gguf.dequantize(info.dtype, data.reshape(-1, gguf.SIZES[info.dtype]))
            return torch.from_numpy(numbers).view(info.shape)
        dtype = getattr(torch, TORCH.get(info.dtype, ""), None)
        if dtype is None:
            message = "{path}: {name} is {dtype}, which is not read here"
            raise InputError(t(message, path=self.path, name=name, dtype=info.dtype))
        flat = _flat(data, dtype)
        return flat.view(info.shape) if info.strides is None else flat.as_strided(info.shape, info.strides)


def _flat(data: np.ndarray, dtype: Any) -> Tensor:
    """Bytes as a tensor of one dimension; copied where they do not lie as the type's elements must."""
    import torch

    if not len(data):
        return torch.zeros(0, dtype=dtype)
    raw = torch.from_numpy(data)
    if dtype == torch.bool:
        return raw.ne(0)
    return (raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()).view(dtype)
