"""GGUF read: the header, bounded before anything is allocated, and the blocks of quantised tensors made numbers again.

    values, tensors = read_header(Path("model.gguf"))
    numbers = dequantize("Q4_K", blocks)                    # uint8 [N, 144] -> float32 [N, 256]

The layout is that of ggml's specification (github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian);
the blocks are those of its ggml-common.h. A file's counts and lengths are compared with what is left of the file first:
in a reader that believes them, one lying length is a gigabyte or a heap overflow (CVE-2025-53630, CVE-2026-27940).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from weitiao.weights.archive import Refused
from weitiao.weights.header import TensorInfo

MAGIC = b"GGUF"
TENSORS, KEYS, ITEMS = 1 << 18, 1 << 16, 1 << 22  # of a file; the largest published have 2,000, 60 and 1,400,000
TEXT_BYTES = 1 << 20  # of one text: chat templates are a fiftieth of it
NAME_BYTES, DIMENSIONS, NESTED = 256, 4, 2
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
TYPES: dict[int, tuple[str, int, int]] = {  # number -> name, elements of a block, bytes of a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip


class _Header:
    """A file's bytes and the place read next; no length is believed beyond the file's end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place, self.items = data, 4, 0

    def take(self, form: str) -> Any:
        size = struct.calcsize("<" + form)
        if self.place + size > len(self.data):
            raise Refused("cut short within its header")
        (value,) = struct.unpack_from("<" + form, self.data, self.place)
        self.place += size
        return value

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.place:
            raise Refused("cut short, or a length in its header lies")
        self.place += size

    def text(self, limit: int = TEXT_BYTES) -> str:
        size = self.take("Q")
        if size > limit:
            raise Refused(
                "a text in its header is said to be {size} bytes, {limit} at most are read", size=size, limit=limit
            )
        start = self.place
        self.skip(size)
        return self.data[start : self.place].decode("utf-8", errors="replace")

    def value(self, kind: int, deep: int = 0) -> Any:
        """A value; of an array only how many entries it has."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.take(_scalar(kind))
        kind, count = self.take("I"), self.take("Q")
        self.items += count
        if deep >= NESTED or self.items > ITEMS:
            raise Refused("an array in its header is said to have {count} entries", count=count)
        if kind in (TEXT, ARRAY):
            self._each(kind, count, deep)
        else:
            self.skip(count * struct.calcsize("<" + _scalar(kind)))
        return f"[{count}]"

    def _each(self, kind: int, count: int, deep: int) -> None:
        if count * 8 > len(self.data) - self.place:
            raise Refused("cut short, or a length in its header lies")
        for _ in range(count):
            if kind == TEXT:
                self.skip(self.take("Q"))
            else:
                self.value(kind, deep + 1)


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise Refused("a value in its header has the unknown type {kind}", kind=kind)
    return SCALARS[kind]


def read_header(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    """The values and the tensors of a file, of arrays only their lengths. Refused for one that contradicts itself."""
    if path.stat().st_size < 24:
        raise Refused("cut short within its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data)
        version, tensors, keys = header.take("I"), header.take("Q"), header.take("Q")
        if version not in (2, 3):
            raise Refused("version {version} of the format; 2 and 3 are read", version=version)
        if tensors > TENSORS or keys > KEYS or 24 + 24 * tensors + 12 * keys > len(data):
            raise Refused("its header is said to list {tensors} tensors and {keys} keys", tensors=tensors, keys=keys)
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = header.text(NAME_BYTES)
            if name in values:
                raise Refused("{name} is there twice", name=name)
            values[name] = header.value(header.take("I"))
        found = [_tensor(header, path) for _ in range(tensors)]
        return values, _placed(found, header.place, values.get("general.alignment", 32), len(data))


def _tensor(header: _Header, path: Path) -> TensorInfo:
    """One entry of the table; ``start`` still counts from where the data begin."""
    name, count = header.text(NAME_BYTES), header.take("I")
    if count > DIMENSIONS:
        raise Refused("{name} is said to have {count} dimensions", name=name, count=count)
    sides = [header.take("Q") for _ in range(count)]
    kind, start = header.take("I"), header.take("Q")
    if kind not in TYPES:
        raise Refused("{name} has the unknown type {kind}", name=name, kind=kind)
    dtype, elements, size = TYPES[kind]
    if math.prod(side or 1 for side in sides) > 1 << 48 or (sides[0] if sides else 1) % elements:
        raise Refused("{name}: shape {shape} cannot be {dtype}", name=name, shape=sides, dtype=dtype)
    return TensorInfo(name, tuple(reversed(sides)), dtype, math.prod(sides) // elements * size, path.name, start)


def _placed(tensors: list[TensorInfo], end: int, alignment: Any, size: int) -> list[TensorInfo]:
    """The tensors with their places in the file; they must lie in it and apart from each other."""
    if type(alignment) is not int or alignment not in (1 << power for power in range(3, 17)):
        raise Refused("general.alignment: {alignment} is no power of two", alignment=alignment)
    base = -(-end // alignment) * alignment
    found: list[TensorInfo] = []
    free, names = base, set()
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.bytes)):
        start = base + tensor.start
        if tensor.name in names:
            raise Refused("{name} is there twice", name=tensor.name)
        if tensor.start % alignment or start < free:
            raise Refused("{name}: its data overlap another tensor's or lie askew", name=tensor.name)
        free = start + tensor.bytes
        if free > size:
            raise Refused("cut short: {name} ends at byte {end} of {size}", name=tensor.name, end=free, size=size)
        names.add(tensor.name)
        found.append(TensorInfo(tensor.name, tensor.shape, tensor.dtype, tensor.bytes, tensor.file, start))
    return found


# ---- blocks to numbers ---------------------------------------------------------------------------------------------


def _halves(blocks: np.ndarray, *places: int) -> list[np.ndarray]:
    """The float16 numbers at these bytes of each block, as float32 [N, 1]."""
    return [blocks[:, place : place + 2].copy().view(np.float16).astype(np.float32) for place in places]


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """[N, B] bytes -> [N, 2 B] of their lower halves, then of their upper ones."""
    return np.concatenate([codes & 15, codes >> 4], axis=-1)


def _fifth(bits: np.ndarray) -> np.ndarray:
    """Bits [N, 4 bytes] -> [N, 32] of 16 or 0."""
    return np.unpackbits(bits, axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    (scale,) = _halves(blocks, 0)
    return scale * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    scale, least = _halves(blocks, 0, 2)
    return scale * _nibbles(blocks[:, 4:]) + least


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    (scale,) = _halves(blocks, 0)
    return scale * ((_nibbles(blocks[:, 6:]) | _fifth(blocks[:, 2:6])).astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    scale, least = _halves(blocks, 0, 2)
    return scale * (_nibbles(blocks[:, 8:]) | _fifth(blocks[:, 4:8])) + least


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    (scale,) = _halves(blocks, 0)
    return scale * blocks[:, 2:].view(np.int8)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scales and the minima [N, 8, 1] of 6 bits each that a K block packs into 12 bytes."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    return scales.astype(np.float32)[..., None], minima.astype(np.float32)[..., None]


def _k(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Codes [N, 8, 32] of a K block times scales, less minima."""
    scale, least = (half[..., None] for half in _halves(blocks, 0, 2))
    scales, minima = _six_bits(blocks[:, 4:16])
    return (scale * scales * codes - least * minima).reshape(len(blocks), 256)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _k(blocks, low | fifth << 4)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    (scale,) = _halves(blocks, 208)
    scales = blocks[:, 192:208].copy().view(np.int8).astype(np.float32)
    return ((scale * scales)[..., None] * codes).reshape(len(blocks), 256)


BLOCKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
SIZES = {name: size for name, _, size in TYPES.values()}


def dequantize(dtype: str, blocks: np.ndarray) -> np.ndarray:
    """Blocks, uint8 [N, bytes of a block], as float32 [N, elements of a block]."""
    with np.errstate(all="ignore"):  # a scale may be Inf or NaN; so are its numbers then
        return BLOCKS[dtype](blocks).astype(np.float32, copy=False)
