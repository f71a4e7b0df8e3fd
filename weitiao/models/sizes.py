"""Sizes: what a configuration may say of them, and whether the tensors of a folder have those that it says.

check({"hidden_size": 0}, {}, "config.json")       # InputError: hidden_size: 0 is not a positive whole number
check_tensors(folder, shape.read(folder))          # InputError: … is [6144, 256], by config.json [6144, 320]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.errors import InputError, first_of, t
from weitiao.weights import inspect

if TYPE_CHECKING:
    from weitiao.models.shape import Shape

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
LAYERS_LIMIT = 2000  # a file from outside must not make this program build a million layers
SHOWN = 6


def check(values: Mapping[str, Any], other_names: Mapping[str, str], where: str) -> None:
    """InputError that names every given size which is not a positive number, under the family's own name for it."""
    problems = []
    for size in SIZES:
        name = _named(size, values, other_names)
        value = values.get(name, 1)
        if type(value) is not int or value < 1:
            message = "{file}: {name}: {value} is not a positive whole number"
            problems.append(t(message, file=where, name=name, value=json.dumps(value, default=str)))
        elif size == "num_hidden_layers" and value > LAYERS_LIMIT:
            message = "{file}: {name}: {value} layers are more than any model has"
            problems.append(t(message, file=where, name=name, value=value))
    if problems:
        raise InputError(problems)


def refusal(error: Exception, values: Mapping[str, Any], other_names: Mapping[str, str]) -> str:
    """Why a configuration's class refused these ``values``, its defaults among them: without the words of the library
    that called it, which stand in front of the reason."""
    names = [_named(size, values, other_names) for size in ("hidden_size", "num_attention_heads")]
    hidden, heads = (values.get(name) for name in names)
    if isinstance(hidden, int) and isinstance(heads, int) and hidden % heads:
        message = "{name}: {hidden} cannot be shared out evenly among {heads} heads ({other})"
        return t(message, name=names[0], hidden=hidden, heads=heads, other=names[1])
    return " ".join(str(error.__cause__ or error).split())


def _named(size: str, values: Mapping[str, Any], other_names: Mapping[str, str]) -> str:
    return size if size in values else other_names.get(size, size)


def check_tensors(folder: Path, shape: Shape) -> None:
    """InputError for tensors in a folder's safetensors files that have other sizes than its configuration gives them,
    from the files' headers alone. A file may leave out what stands before a name (GPT-2's do); experts, which may be
    stored one by one or turned, are compared when they are loaded."""
    if not any(file.suffix == ".safetensors" for file in inspect.weight_files(folder, [])):
        return
    before = dict.fromkeys(["", *(name.partition(".")[0] + "." for name in shape.tensors)])
    wanted = {name: size for name, size in shape.tensors.items() if name not in {one.name for one in shape.experts}}
    other = []
    for tensor in inspect.headers(folder):
        name = next((part + tensor.name for part in before if part + tensor.name in wanted), "")
        if name and tuple(tensor.shape) != wanted[name]:
            other.append((tensor.name, tensor.shape, wanted[name]))
    if other:
        raise unfit(folder, other)


def unfit(folder: Path, tensors: list[tuple[str, Any, Any]]) -> InputError:
    """The refusal of ``tensors``: name, sizes in the file, sizes by the configuration."""
    message = "{path}: {name} is {found} in the file of weights; by config.json it would be {wanted}"
    said = [t(message, path=folder, name=name, found=list(old), wanted=list(new)) for name, old, new in tensors]
    return InputError(
        [*first_of(said, SHOWN), t("config.json and weights are not of one model: take both from one place")]
    )
