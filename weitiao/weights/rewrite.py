"""Tensors from one form of file into another: safetensors, .bin, .pt, .pth, Lightning's .ckpt; and out of GGUF.

    rewrite(Path("epoch=3.ckpt"), Path("model.safetensors"))

What a form holds, and what of a file does not come along (optimizer state, hyper-parameters, a tokenizer), is said. A
new file appears under its name when it is whole; safetensors are written tensor by tensor.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from weitiao.errors import InputError, first_of, say, t
from weitiao.runs import disk_error
from weitiao.weights import formats, gguf, tensors
from weitiao.weights.folders import flush, whole
from weitiao.weights.header import BITS, TensorInfo
from weitiao.weights.inspect import weight_files

if TYPE_CHECKING:
    from torch import Tensor

DATA = ("*.json", "*.jinja", "*.model", "*.txt")  # of a model folder, what comes along; never its code
LIGHTNING = "2.0.0"  # the layout of .ckpt, which Lightning brings up to date from here
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FLOATS = ("F64", "F32", "F16", "BF16", *gguf.BLOCKS)


def holds() -> dict[str, str]:
    """What a file of each form can hold, in a person's words."""
    pickled = t("a pickled table of tensors; a reader that trusts it could be made to run code")
    return {
        ".safetensors": t("tensors and a table of texts; no optimizer state, no hyper-parameters, no code"),
        **dict.fromkeys((".bin", ".pt", ".pth"), pickled),
        ".ckpt": t("a pickled Lightning checkpoint, here its weights (state_dict) alone, to start from, not to resume"),
    }


def rewrite(source: Path, target: Path, dtype: str | None = None) -> Path:
    """The tensors of a file or folder into a new file (by its suffix) or a new folder of safetensors; ``dtype`` is what
    every float becomes. InputError for a form that is not written, or a file that is there already."""
    files = [source] if source.is_file() else weight_files(source, [])
    if not files:
        raise InputError(t("{path}: no file with tensors here", path=source))
    opened = [formats.Tensors(file) for file in files]
    infos = {name: (one, _kept(info, dtype)) for one in opened for name, info in one.infos.items()}
    _explain(opened)
    size = sum(info.bytes for _, info in infos.values())
    if target.suffix == ".safetensors":
        with _new(target, size) as file:
            _write(file, infos)
    elif target.suffix in holds():
        state = {name: _as(one[name], info) for name, (one, info) in infos.items()}
        _save(target, state, size)
    elif target.suffix:
        raise InputError(t("{path}: {suffix} is not written; take one of {known}, or a folder",
                           path=target, suffix=target.suffix, known=", ".join(holds())))  # fmt: skip
    else:
        with whole(target, size) as temporary:
            for file in _beside(source):
                shutil.copy(file, temporary / file.name)
            tensors.write(temporary, ((name, _as(one[name], info)) for name, (one, info) in infos.items()))
        return target
    say("{suffix}: {holds}", suffix=target.suffix, holds=holds()[target.suffix])
    return target


def _kept(info: TensorInfo, dtype: str | None) -> TensorInfo:
    """The tensor as it will be stored: row after row, of its own type, blocks as float32, or floats as ``dtype``."""
    stored = DTYPES[dtype] if dtype and info.dtype in FLOATS else "F32" if info.dtype in gguf.BLOCKS else info.dtype
    if stored not in formats.TORCH:
        message = "{name} is {dtype}, which is not read here"
        raise InputError(t(message, name=info.name, dtype=info.dtype))
    return TensorInfo(info.name, info.shape, stored, info.parameters * BITS[stored] // 8, info.file, 0)


def _as(tensor: Tensor, info: TensorInfo) -> Tensor:
    import torch

    return tensor.to(getattr(torch, formats.TORCH[info.dtype])).contiguous()


def _explain(opened: list[formats.Tensors]) -> None:
    """What was found, and what of it does not come along."""
    for one in opened:
        found = one.found
        parameters = sum(tensor.parameters for tensor in found.tensors)
        say("{path}: {form}: {holds}; {tensors} tensors, {parameters} parameters", path=one.path, form=found.form,
            holds=found.holds, tensors=len(found.tensors), parameters=f"{parameters:,}")  # fmt: skip
        for line in first_of([f"{name[:60]} ({what})" for name, what in found.left_out.items()]):
            say("left out: {what}", what=line)


def _beside(source: Path) -> list[Path]:
    """The data files of a model folder; index files and links out of it are left where they are."""
    if not source.is_dir():
        return []
    files = [file for pattern in DATA for file in sorted(source.glob(pattern))]
    return [file for file in files if file.is_file() and not file.name.endswith(".index.json")]


# ---- writing -------------------------------------------------------------------------------------------------------


class _new:
    """A file that takes its name when it is whole; a context manager."""

    def __init__(self, path: Path, size: int):
        if path.exists():
            raise InputError(t("{path}: exists already; name a new file", path=path))
        self.path, self.size = path, size
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> BinaryIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.path.parent).free < self.size:
                raise OSError(28, os.strerror(28))
            self.file = self.temporary.open("wb")
        except OSError as error:
            raise disk_error(error, self.path, self.size) from error
        return self.file

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.file.close()
            if kind is None:
                flush(self.temporary)
                os.replace(self.temporary, self.path)
        except OSError as problem:
            raise disk_error(problem, self.path, self.size) from problem
        finally:
            self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_error(error, self.path, self.size) from error


def _write(file: BinaryIO, infos: Mapping[str, tuple[formats.Tensors, TensorInfo]]) -> None:
    """One safetensors file, tensor by tensor."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (_, info) in infos.items():
        place = [start, start + info.bytes]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": place}
        start += info.bytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, (one, info) in infos.items():
        file.write(_as(one[name], info).reshape(-1).view(torch.uint8).numpy().data)


def _save(target: Path, state: Mapping[str, Tensor], size: int) -> None:
    """A pickled file of torch."""
    import torch

    state = dict(state)
    whole_: Any = state
    if target.suffix == ".ckpt":
        whole_ = {"state_dict": state, "pytorch-lightning_version": LIGHTNING, "epoch": 0, "global_step": 0}
    with _new(target, size) as file:
        torch.save(whole_, file)
