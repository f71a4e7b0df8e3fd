"""JSON from outside: what it would cost to read is known from its bytes before anything is read.

    values = json_object(path)                      # a config.json, an index, a tokenizer.json
    values = parse(path, text, limit)               # a header that is in memory already

A few megabytes of ``[],[],[],…`` become a gigabyte of Python objects, and a name given twice hides what a person saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weitiao.errors import InputError, t

FILE_BYTES = 16 << 20  # of a config.json or an index: the largest published are a tenth of it
ROOM_BYTES = 224 << 20  # of memory for what a file becomes: Gemma's tokenizer.json, 33 MB, takes 190 MiB
COSTS = {b":": 100, b"[": 64, b"{": 64, b",": 32, b'"': 28}  # bytes of memory that a sign stands for, at most


def json_object(path: str | Path, limit_bytes: int = FILE_BYTES) -> dict[str, Any]:
    """The JSON object in a file; InputError for one that is missing, too large, or something else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(t("no such file: {path}", path=path))
    if (size := path.stat().st_size) > limit_bytes:
        message = "{path}: {size} bytes are more than such a file has ({limit}); it is not read"
        raise InputError(t(message, path=path, size=size, limit=limit_bytes))
    return parse(path, path.read_bytes())


def parse(path: Path, data: bytes, strict: bool = False) -> dict[str, Any]:
    """The JSON object in ``data``, which ``path`` holds; InputError where it is none, or would take too much memory.

    ``strict`` refuses a name that is there twice, as a header of tensors never has it.
    """
    cost = len(data) + sum(bytes_ * data.count(sign) for sign, bytes_ in COSTS.items())
    if cost > ROOM_BYTES + len(data) // 2:
        message = "{path}: its JSON would take about {cost} MB of memory, more than any such file does; it is not read"
        raise InputError(t(message, path=path, cost=cost // 10**6))
    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once if strict else None)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(t("{path}: not JSON ({reason})", path=path, reason=reason[:200])) from error
    if not isinstance(values, dict):
        raise InputError(t("{path}: not a JSON object", path=path))
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """ValueError for a name that is there twice: readers differ in which one counts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(t("{name} is there twice", name=json.dumps(twice)[:80]))
    return values


def depth(values: Any, limit: int) -> bool:
    """Whether lists and objects in ``values`` lie at most ``limit`` deep."""
    level = [values]
    for _ in range(limit + 1):
        inner = (item for item in level if isinstance(item, list | Mapping))
        level = [one for item in inner for one in (item.values() if isinstance(item, Mapping) else item)]
        if not level:
            return True
    return False
