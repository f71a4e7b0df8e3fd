"""safetensors and GGUF whose headers lie."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

from tests.hostile import raw
from tests.hostile.case import Case
from weitiao.weights import gguf


def headers(draw: random.Random) -> Iterator[Case]:
    """safetensors whose header lies."""

    def one(**values: Any) -> dict[str, Any]:
        return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | values

    wrong: dict[str, Any] = {
        "too long": one(data_offsets=[0, 1 << 40], shape=[1 << 38]),
        "backwards": one(data_offsets=[8, 0]),
        "negative": one(data_offsets=[-8, 0]),
        "negative shape": one(shape=[-2]),
        "a shape of floats": one(shape=[2.0]),
        "a shape of texts": one(shape=["2"]),
        "a shape of lists": one(shape=[[2]]),
        "a null shape": one(shape=None),
        "a huge shape": one(shape=[1 << 62, 4]),
        "a hundred sides": one(shape=[1] * 100 + [2]),
        "an unknown type": one(dtype="Q9"),
        "a list as type": one(dtype=["F32"]),
        "three offsets": one(data_offsets=[0, 4, 8]),
        "no offsets": {"dtype": "F32", "shape": [2]},
        "a true offset": one(data_offsets=[False, 8]),
        "an infinite shape": one(shape=[float("inf")]),
        "a number": 7,
        "null": None,
        "another size": one(shape=[3]),
        "a gap": one(data_offsets=[8, 16]),
        "an offset of 10^4000": one(data_offsets=[0, 10**4000]),
    }
    made = {name: raw.safetensors({"a": entry}, bytes(8)) for name, entry in wrong.items()}
    both = {"a": one(), "b": one(data_offsets=[4, 12])}
    made["overlapping"] = raw.safetensors(both, bytes(12))
    made["the same bytes twice"] = raw.safetensors({"a": one(), "b": one()}, bytes(8))
    made["a name twice"] = raw.safetensors(
        b'{"a":' + json.dumps(one()).encode() + b',"a":' + json.dumps(one()).encode() + b"}", bytes(8)
    )
    made["more behind"] = raw.safetensors({"a": one()}, bytes(9))
    made["metadata that is a list"] = raw.safetensors({"__metadata__": [1], "a": one()}, bytes(8))
    made["metadata of numbers"] = raw.safetensors({"__metadata__": {"a": 1}, "a": one()}, bytes(8))
    for length in (0, 1, 7, 1 << 20, 99_999_999, 100_000_001, 1 << 31, 1 << 62, (1 << 64) - 1):
        made[f"a header said to be {length} long"] = raw.safetensors({"a": one()}, bytes(8), length=length)
    texts = {
        "no JSON": b"not json",
        "brackets": b"[" * 100_000,
        "objects": b'{"a":' * 50_000,
        "a list": b"[1]",
        "UTF-16": '{"a":1}'.encode("utf-16"),
        "bad UTF-8": b'{"\xff\xfe": 1}',
        "NaN": b"NaN",
        "lists without number": b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
        "names without number": b"{" + b",".join(b'"%d":0' % n for n in range(1_500_000)) + b"}",
    }
    empty = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    texts["600,000 empty tensors"] = b"{" + b",".join(b'"%d":%s' % (n, empty) for n in range(600_000)) + b"}"
    made |= {name: raw.safetensors(text) for name, text in texts.items()}
    good = raw.safetensors({"a": one()}, bytes(8))
    made |= {f"cut at {place}": good[:place] for place in draw.sample(range(1, len(good)), 8)}
    made["a git-lfs pointer"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name, content in made.items():
        yield Case(f"safetensors, {name}", {"x.safetensors": content}, "inspect", opened="x.safetensors")


def ggufs(draw: random.Random) -> Iterator[Case]:
    """GGUF whose counts and lengths lie (after CVE-2025-53630 and CVE-2026-27940, and what a reader would allocate)."""
    tensor = {"w": ("F32", (2, 4), bytes(32))}
    values = {"general.architecture": "llama", "tokens": ["a", "b"]}
    build = raw.gguf_file
    array = lambda kind, count: struct.pack("<IIQ", gguf.ARRAY, kind, count)  # noqa: E731
    made: dict[str, bytes] = {}
    for count in (1 << 17, 1 << 31, 1 << 40, 1 << 62, (1 << 64) - 1):
        made[f"{count} tensors"] = build(values, tensor, count=count)
        made[f"{count} keys"] = build(values, tensor, keys=count)
        made[f"an array of {count} numbers"] = build({"a": array(4, count)}, tensor)
        made[f"an array of {count} texts"] = build({"a": array(gguf.TEXT, count)}, tensor)
        made[f"a text of {count} bytes"] = build({"a": struct.pack("<I", gguf.TEXT) + raw.text("a", count)}, tensor)
        made[f"a side of {count}"] = build(values, tensor, dimensions={"w": (count, 4)})
        made[f"data at {count}"] = build(values, tensor, offsets={"w": count // 32 * 32})
    deep = b"".join(struct.pack("<IQ", gguf.ARRAY, 1) for _ in range(50_000))
    made["arrays in arrays"] = build({"a": struct.pack("<I", gguf.ARRAY) + deep}, tensor)
    made |= {f"version {number}": build(values, tensor, version=number) for number in (0, 1, 4, 0x03000000)}
    made |= {f"type {number}": build(values, tensor, kinds={"w": number}) for number in (4, 5, 31, 99, 1 << 31)}
    made |= {f"{count} sides": build(values, tensor, dimensions={"w": (1,) * count}) for count in (5, 64, 1000)}
    made |= {
        f"a value of type {kind}": build({"a": struct.pack("<I", kind) + bytes(8)}, tensor)
        for kind in (13, 99, 1 << 31)
    }
    made |= {f"alignment {number}": build({"general.alignment": number}, tensor) for number in (0, 1, 7, 1 << 20)}
    made["alignment of words"] = build({"general.alignment": "a"}, tensor)
    made["data askew"] = build(values, tensor, offsets={"w": 1})
    made["data on data"] = build(values, tensor | {"v": ("F32", (2, 4), bytes(32))}, offsets={"v": 0})
    made["half a block"] = build(values, {"w": ("Q4_K", (2, 128), bytes(144))})
    made["a key twice"] = build(values, tensor, keys=3)[:24] + b"".join(raw.text("k") + raw.value(1) for _ in range(3))
    whole = build(values, tensor)
    made |= {f"cut at {place}": whole[:place] for place in draw.sample(range(4, len(whole)), 10)}
    for name, content in made.items():
        yield Case(f"GGUF, {name}", {"x.gguf": content}, draw.choice(("inspect", "convert")), opened="x.gguf")
