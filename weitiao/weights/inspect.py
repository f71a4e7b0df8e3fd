"""What is in a model folder, from file headers alone: nothing is loaded and nothing is allocated on a file's word.

    for tensor in headers("models/qwen2-0.5b"): print(tensor.name, tensor.shape, tensor.dtype)
    check_folder("models/qwen2-0.5b")       # one InputError names every file that is missing or cut short

The safetensors layout is 8 bytes of header length, a JSON header, then the data
(https://github.com/huggingface/safetensors#format). Sizes are checked against each other and against the file.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from weitiao.errors import InputError, t

HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "ice_text.model"),
    *("vocab.json", "vocab.txt"),
)
UNFINISHED = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download", ".tmp")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
LARGEST_SHOWN = 8


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, from the file's header."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, F16, I8, …
    bytes: int
    file: str
    start: int  # first byte of its data in the file

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


# ---- one safetensors file ------------------------------------------------------------------------------------------


def read_header(path: str | Path) -> list[TensorInfo]:
    """The tensors of one safetensors file in the order of their data. InputError for a file that contradicts itself."""
    path = Path(path)
    if not path.is_file():
        raise InputError(t("no such file: {path}", path=path))
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start and LFS_POINTER.startswith(start):
            raise InputError(_pointer(path))
        if len(start) < 8 or length > HEADER_LIMIT_BYTES or 8 + length > size:
            raise InputError(
                _bad(path, t("its header is said to be {length} bytes of {size}", length=length, size=size))
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(_bad(path, t("its header is not JSON"))) from error
    if not isinstance(header, dict):
        raise InputError(_bad(path, t("its header is not JSON")))
    header.pop("__metadata__", None)
    tensors = [_tensor(path, str(name), entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.bytes))
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of a header, its sizes checked against each other."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(_bad(path, t("{name}: dtype, shape or data_offsets is missing", name=name))) from error
    if any(type(number) is not int or number < 0 for number in numbers) or dtype not in BITS:
        raise InputError(
            _bad(path, t("{name}: dtype {dtype}, shape {shape} cannot be", name=name, dtype=dtype, shape=shape))
        )
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        message = "{name}: {bytes} bytes are not {dtype} of shape {shape}"
        raise InputError(_bad(path, t(message, name=name, bytes=end - begin, dtype=dtype, shape=list(shape))))
    return TensorInfo(name, shape, dtype, end - begin, path.name, data_start + begin)


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """The data must follow each other without a gap or an overlap and end with the file."""
    for tensor in tensors:
        if tensor.start != start:
            raise InputError(
                _bad(path, t("{name}: its data overlap another tensor's or leave a gap", name=tensor.name))
            )
        start += tensor.bytes
    if start > size:
        message = "{path}: cut short, {size} of {whole} bytes"
        raise InputError(t(message, path=path, size=size, whole=start))
    if start < size:
        raise InputError(_bad(path, t("{count} bytes follow the last tensor", count=size - start)))


def _bad(path: Path, reason: str) -> str:
    return t("{path}: not a sound safetensors file: {reason}", path=path, reason=reason)


def _pointer(path: Path) -> str:
    return t("{path}: a git-lfs pointer, not the file itself; run git lfs pull in its folder", path=path)


# ---- a folder ------------------------------------------------------------------------------------------------------


def headers(folder: str | Path) -> list[TensorInfo]:
    """Every tensor of a safetensors file, a model folder or an adapter folder, file by file.

    InputError names every file that is missing or unsound; a folder with other formats only has no such table.
    """
    problems: list[str] = []
    tensors = _headers(Path(folder), problems)
    if problems:
        raise InputError(problems)
    return tensors


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weights; of .bin files, which have no table to be read, those of the files."""
    files = weight_files(folder, [])
    if any(file.suffix == ".bin" for file in files):
        return sum(file.stat().st_size for file in files)
    return sum(tensor.bytes for tensor in headers(folder))


def _headers(path: Path, problems: list[str]) -> list[TensorInfo]:
    """The tensors that can be read; what is wrong goes to ``problems``."""
    files = [path] if path.is_file() else weight_files(path, problems)
    tensors: list[TensorInfo] = []
    for file in files:
        if file.suffix == ".safetensors" and file.is_file():
            tensors += _gather(problems, read_header, file) or []
    if not problems and not tensors:
        problems.append(t("{path}: no safetensors file with tensors here", path=path))
    return tensors


def _gather(problems: list[str], work: Any, *values: Any) -> Any:
    """Call ``work``; an InputError goes to ``problems``."""
    try:
        return work(*values)
    except InputError as error:
        problems += error.problems
        return None


def weight_files(folder: Path, problems: list[str]) -> list[Path]:
    """The files that hold a folder's weights, in transformers' order; what is missing goes to ``problems``."""
    if not folder.is_dir():
        problems.append(t("no such folder: {path}", path=folder))
        return []
    for single, index in ((SAFETENSORS, INDEX), (BIN, BIN_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = _gather(problems, _index, folder / index) or {}
            files = [folder / name for name in sorted(set(names.values()))]
            problems += [
                t("{path}: missing (listed in {index})", path=file, index=index) for file in files if not file.is_file()
            ]
            return files
    if (folder / ADAPTER).is_file():
        return [folder / ADAPTER]
    others = sorted(folder.glob("*.safetensors"))
    if (folder / "config.json").is_file() or not others:
        problems.append(t("{path}: no weights ({single} or {index})", path=folder, single=SAFETENSORS, index=INDEX))
        return []
    return others


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> file of a shard index; a file must lie in the folder itself."""
    values = read_json(path)
    names = values.get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(t("{path}: no weight_map", path=path))
    outside = sorted({name for name in names.values() if Path(name).name != name})
    if outside:
        raise InputError(t("{path}: names files outside its folder: {names}", path=path, names=", ".join(outside)))
    return dict(names)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError if there is none."""
    if not path.is_file():
        raise InputError(t("no such file: {path}", path=path))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(t("{path}: not JSON ({reason})", path=path, reason=error)) from error
    if not isinstance(values, dict):
        raise InputError(t("{path}: not a JSON object", path=path))
    return values


def check_tokenizer(folder: str | Path) -> None:
    """InputError unless the folder has a tokenizer file."""
    path = Path(folder)
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise InputError(t("{path}: no tokenizer ({names})", path=path, names=", ".join(TOKENIZERS[:2]) + ", …"))


def check_folder(folder: str | Path, tokenizer: bool = False) -> None:
    """InputError that names every file a model folder lacks, has in part, or has unsound; ``tokenizer``: that too."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(t("no such folder: {path}", path=path))
    if (path / ADAPTER_CONFIG).is_file():
        base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise InputError(t("{path}: an adapter of {base}, not a whole model", path=path, base=base))
    problems: list[str] = []
    if not (path / "config.json").is_file():
        problems.append(t("{path}: missing", path=path / "config.json"))
    elif _is_pointer(path / "config.json"):
        problems.append(_pointer(path / "config.json"))
    if tokenizer:
        _gather(problems, check_tokenizer, path)
    for file in weight_files(path, problems):
        if file.is_file():
            _gather(problems, read_header if file.suffix == ".safetensors" else _check_bin, file)
    if problems:
        left = sorted(file.name for file in path.iterdir() if file.name.endswith(UNFINISHED))
        if left:
            problems.append(t("{path}: an unfinished download: {names}", path=path, names=", ".join(left)))
        raise InputError(problems)


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _check_bin(path: Path) -> None:
    """A torch file is a zip archive whose directory is at its end, so one that is cut short has none."""
    if _is_pointer(path):
        raise InputError(_pointer(path))
    if not zipfile.is_zipfile(path):
        raise InputError(t("{path}: cut short, or not a torch file of torch 1.6 or later", path=path))


# ---- weitiao inspect -----------------------------------------------------------------------------------------------


def report(path: str | Path) -> dict[str, Any]:
    """What ``weitiao inspect`` says of a file or folder: totals, dtypes, the largest, what is missing or doubled."""
    path = Path(path)
    place = path
    if path.is_dir() and not weight_files(path, []):  # a run's folder: what it trained
        place = next((path / name for name in ("model", "adapter") if (path / name).is_dir()), path)
    problems: list[str] = []
    tensors = _headers(place, problems)
    if not tensors:
        raise InputError(problems)
    by_dtype: Counter[str] = Counter()
    for tensor in tensors:
        by_dtype[tensor.dtype] += tensor.parameters
    counts = Counter(tensor.name for tensor in tensors)
    folder = place if place.is_dir() else place.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    adapter = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
    largest = sorted(tensors, key=lambda tensor: -tensor.bytes)[:LARGEST_SHOWN]
    return {
        "path": str(place),
        "kind": "adapter" if adapter else "model",
        "model_type": config.get("model_type"),
        "base": adapter.get("base_model_name_or_path"),
        "files": {name: (folder / name).stat().st_size for name in sorted({tensor.file for tensor in tensors})},
        "tensors": len(tensors),
        "parameters": sum(tensor.parameters for tensor in tensors),
        "bytes": sum(tensor.bytes for tensor in tensors),
        "parameters_by_dtype": dict(by_dtype.most_common()),
        "tied_embeddings": _tied(config, tensors),
        "duplicates": sorted(name for name, count in counts.items() if count > 1),
        "unlisted": _unlisted(folder, tensors),
        "missing": problems + ([] if adapter or place.is_file() else _missing(folder)),
        "largest": [_row(tensor) for tensor in largest],
        "all": [_row(tensor) for tensor in tensors],
    }


def _row(tensor: TensorInfo) -> dict[str, Any]:
    """A tensor as JSON."""
    sizes = {"shape": list(tensor.shape), "dtype": tensor.dtype, "bytes": tensor.bytes}
    return {"name": tensor.name, **sizes, "file": tensor.file}


def _tied(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> bool | None:
    """Whether the head shares the embedding's weights: as the configuration says, else if it has none of its own."""
    if not config:
        return None
    stored = any(tensor.name.endswith(("lm_head.weight", "output_layer.weight")) for tensor in tensors)
    return bool(config.get("tie_word_embeddings", not stored))


def _unlisted(folder: Path, tensors: Iterable[TensorInfo]) -> list[str]:
    """Tensors on which the shard index and the shards do not agree."""
    if (folder / SAFETENSORS).is_file() or not (folder / INDEX).is_file():
        return []
    listed, stored = _index(folder / INDEX), {tensor.name: tensor.file for tensor in tensors}
    return sorted(f"{name} ({file})" for name, file in listed.items() ^ stored.items())


def _missing(folder: Path) -> list[str]:
    """What a loadable model folder would need beside the weights that are there."""
    problems = [t("{path}: missing", path=folder / "config.json")] if not (folder / "config.json").is_file() else []
    _gather(problems, check_tokenizer, folder)
    return problems


def verb(
    path: Annotated[Path, typer.Argument(help="a model folder, an adapter folder, a run, or a safetensors file")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Show the tensors of a model without loading it: sizes, dtypes, what is missing or doubled."""
    found = report(path)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _print_table(found)


def _print_table(found: dict[str, Any]) -> None:
    """Print the report for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    what = t("an adapter of {base}", base=found["base"]) if found["kind"] == "adapter" else found["model_type"] or "-"
    dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in found["parameters_by_dtype"].items())
    rows = [
        (t("path"), found["path"]),
        (t("model"), what),
        (t("parameters"), f"{found['parameters']:,} ({dtypes})"),
        (
            t("tensors"),
            t(
                "{count} in {files} files, {size} bytes",
                count=found["tensors"],
                files=len(found["files"]),
                size=f"{found['bytes']:,}",
            ),
        ),
    ]
    if found["tied_embeddings"] is not None:
        rows.append((t("head"), t("tied to the embedding") if found["tied_embeddings"] else t("its own weights")))
    for key, label in (
        ("missing", t("missing")),
        ("duplicates", t("stored twice")),
        ("unlisted", t("index and shards differ")),
    ):
        if found[key]:
            rows.append((label, "\n".join(map(str, found[key]))))
    about = Table(show_header=False, box=None, pad_edge=False)
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    for row in rows:
        about.add_row(*row)
    console.print(about)
    table = Table(t("largest tensors"), t("shape"), "dtype", t("bytes"), t("file"), box=None, pad_edge=False)
    for tensor in found["largest"]:
        table.add_row(
            tensor["name"], "×".join(map(str, tensor["shape"])), tensor["dtype"], f"{tensor['bytes']:,}", tensor["file"]
        )
    console.print(table)
