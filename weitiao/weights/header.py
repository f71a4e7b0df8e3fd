"""One tensor as a file's header describes it, and the header of a safetensors file, bounded before it is read.

    for tensor in read_header("model.safetensors"): print(tensor.name, tensor.shape, tensor.dtype)

The layout is 8 bytes of header length, a JSON header, then the data (https://github.com/huggingface/safetensors#format).
Sizes are checked against each other and against the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weitiao.errors import InputError, t
from weitiao.weights import bounded

HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
ELEMENTS = 1 << 63  # so many elements, and so large a side, no file describes
DIMENSIONS = 64
BITS = {
    "C128": 128,
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, from the file's header."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it (F32, BF16, I8, …), or GGUF's name of a block (Q4_K, …)
    bytes: int
    file: str
    start: int  # first byte of its data in the file
    strides: tuple[int, ...] | None = None  # in elements, of a pickled tensor that is a view; else row after row

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: str | Path) -> list[TensorInfo]:
    """The tensors of one safetensors file in the order of their data. InputError for a file that contradicts itself."""
    return read_whole(path)[0]


def read_whole(path: str | Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file, and the metadata beside them."""
    path = Path(path)
    if not path.is_file():
        raise InputError(t("no such file: {path}", path=path))
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start and LFS_POINTER.startswith(start):
            raise InputError(pointer(path))
        if len(start) < 8 or length > HEADER_LIMIT_BYTES or 8 + length > size:
            raise InputError(
                _bad(path, t("its header is said to be {length} bytes of {size}", length=length, size=size))
            )
        header = _object(path, file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(_bad(path, t("its __metadata__ is not a table of texts")))
    tensors = [_tensor(path, str(name), entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.bytes))
    _check_layout(path, tensors, 8 + length, size)
    return tensors, metadata


def _object(path: Path, text: bytes) -> dict[str, Any]:
    """The header as JSON."""
    try:
        return bounded.parse(path, text, strict=True)
    except InputError as error:
        reason = error.problems[0].removeprefix(f"{path}: ")
        raise InputError(_bad(path, t("its header: {reason}", reason=reason))) from error


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of a header, its sizes checked against each other."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(_bad(path, t("{name}: dtype, shape or data_offsets is missing", name=name[:200]))) from error
    sound = all(type(number) is int and 0 <= number < ELEMENTS for number in numbers) and len(shape) <= DIMENSIONS
    if not sound or not isinstance(dtype, str) or dtype not in BITS:
        shown = {"name": name[:200], "dtype": str(dtype)[:40], "shape": str(list(shape[:8]))[:80]}
        raise InputError(_bad(path, t("{name}: dtype {dtype}, shape {shape} cannot be", **shown)))
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        message = "{name}: {bytes} bytes are not {dtype} of shape {shape}"
        raise InputError(_bad(path, t(message, name=name[:200], bytes=end - begin, dtype=dtype, shape=list(shape))))
    return TensorInfo(name, shape, dtype, end - begin, path.name, data_start + begin)


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """The data must follow each other without a gap or an overlap and end with the file."""
    for tensor in tensors:
        if tensor.start != start:
            raise InputError(
                _bad(path, t("{name}: its data overlap another tensor's or leave a gap", name=tensor.name[:200]))
            )
        start += tensor.bytes
    if start > size:
        message = "{path}: cut short, {size} of {whole} bytes"
        raise InputError(t(message, path=path, size=size, whole=start))
    if start < size:
        raise InputError(_bad(path, t("{count} bytes follow the last tensor", count=size - start)))


def _bad(path: Path, reason: str) -> str:
    return t("{path}: not a sound safetensors file: {reason}", path=path, reason=reason)


def is_pointer(path: Path) -> bool:
    """Whether a file is what git-lfs leaves in the place of one."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def pointer(path: Path) -> str:
    """What is said of such a file."""
    return t("{path}: a git-lfs pointer, not the file itself; run git lfs pull in its folder", path=path)
