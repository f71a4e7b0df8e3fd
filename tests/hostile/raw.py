"""Files written byte by byte, so that a test can make each byte lie: zip archives, torch's forms, GGUF, safetensors."""

from __future__ import annotations

import io
import json
import pickletools
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from weitiao.weights import gguf

SCALARS = {name: number for number, name in gguf.SCALARS.items()}
NUMBERS = {name: number for number, (name, _, _) in gguf.TYPES.items()}


def saved(tree: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(tree, file, **options)
    return file.getvalue()


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, as it is or as JSON; ``length`` is what it is said to be long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def zipped(entries: Sequence[tuple[str, bytes]], **lies: Any) -> bytes:
    """An archive of stored entries. ``lies`` change what the directory says: ``size`` (added to each), ``count``,
    ``offset`` and ``length`` of the directory, ``method``, ``flags``, ``local`` (names in the local headers),
    ``before`` and ``after`` (bytes around), ``packed`` (the bytes of an entry instead of its own)."""
    body, directory = bytearray(lies.get("before", b"")), bytearray()
    for name, data in entries:
        start, raw = len(body), name.encode("utf-8", "surrogateescape")
        packed, method = lies.get("packed", {}).get(name, data), lies.get("method", 0)
        size, flags = len(data) + lies.get("size", 0), lies.get("flags", 0)
        local = lies.get("local", {}).get(name, name).encode()
        told = struct.pack("<4H3L", flags, method, 0, 0, 0, len(packed) + lies.get("size", 0), size)
        body += b"PK\3\4" + struct.pack("<H", 20) + told + struct.pack("<2H", len(local), 0) + local + packed
        place = lies.get("places", {}).get(name, start)
        directory += (
            b"PK\1\2" + struct.pack("<2H", 20, 20) + told + struct.pack("<5H2L", len(raw), 0, 0, 0, 0, 0, place)
        )
        directory += raw
    count, offset = lies.get("count", len(entries)), lies.get("offset", len(body))
    length = lies.get("length", len(directory))
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, count & 0xFFFF, count & 0xFFFF, length, offset, 0)
    return bytes(body + directory + end) + lies.get("after", b"")


def torch_zip(pickle: bytes, storages: Mapping[str, bytes] | None = None, **lies: Any) -> bytes:
    """torch's archive around any pickle."""
    data = [(f"archive/data/{key}", content) for key, content in (storages or {}).items()]
    return zipped([("archive/data.pkl", pickle), ("archive/byteorder", b"little"), *data], **lies)


def torch_stream(pickle: bytes, keys: bytes = b"\x80\x02]q\x00.") -> bytes:
    """torch's stream of old around any pickle: its first three pickles are the same in every file."""
    file = io.BytesIO(saved({}, _use_new_zipfile_serialization=False))
    for _ in range(3):
        for _ in pickletools.genops(file):
            pass
    return file.getvalue()[: file.tell()] + pickle + keys


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A text of GGUF; ``length`` is what it is said to be long."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value(given: Any) -> bytes:
    """A value of GGUF with its type."""
    if isinstance(given, bytes):
        return given
    if isinstance(given, str):
        return struct.pack("<I", gguf.TEXT) + text(given)
    if isinstance(given, list):
        first = given[0] if given else 0
        kind, form = (
            (gguf.TEXT, "") if isinstance(first, str) else (SCALARS["f"], "f") if isinstance(first, float) else (5, "i")
        )
        items = b"".join(text(item) if kind == gguf.TEXT else struct.pack("<" + form, item) for item in given)
        return struct.pack("<IIQ", gguf.ARRAY, kind, len(given)) + items
    form = "?" if isinstance(given, bool) else "f" if isinstance(given, float) else "I"
    return struct.pack("<I", SCALARS[form]) + struct.pack("<" + form, given)


def gguf_file(values: Mapping[str, Any], tensors: Mapping[str, tuple[str, Sequence[int], bytes]], **lies: Any) -> bytes:
    """A GGUF file; of each tensor its type, its shape (as torch has it) and its bytes. ``lies``: ``version``,
    ``count`` (of tensors), ``keys``, ``offsets`` (by name), ``kinds`` (by name), ``dimensions`` (by name)."""
    head = b"GGUF" + struct.pack(
        "<IQQ", lies.get("version", 3), lies.get("count", len(tensors)), lies.get("keys", len(values))
    )
    head += b"".join(text(name) + value(given) for name, given in values.items())
    data, table = b"", b""
    for name, (dtype, shape, content) in tensors.items():
        sides = lies.get("dimensions", {}).get(name, tuple(reversed(shape)))
        kind = lies.get("kinds", {}).get(name, NUMBERS[dtype])
        table += text(name) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides)
        table += struct.pack("<IQ", kind, lies.get("offsets", {}).get(name, len(data)))
        data += content + bytes(-len(content) % 32)
    head += table
    return head + bytes(-len(head) % 32) + data


def blocks(dtype: str, count: int, seed: int) -> np.ndarray:
    """Random blocks [count, bytes of one] whose scales are ordinary numbers."""
    made = np.random.default_rng(seed).integers(0, 256, (count, gguf.SIZES[dtype]), dtype=np.uint8)
    scale = np.random.default_rng(seed + 1).normal(size=(count, 2)).astype(np.float16).view(np.uint8)
    places = {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}.get(dtype, (0, 2))
    for number, place in enumerate(places):
        made[:, place : place + 2] = scale[:, 2 * number : 2 * number + 2]
    return made
