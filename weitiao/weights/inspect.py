"""What is in a model folder, from file headers alone: nothing is loaded and nothing is allocated on a file's word.

    for tensor in headers("models/qwen2-0.5b"): print(tensor.name, tensor.shape, tensor.dtype)
    check_folder("models/qwen2-0.5b")       # one InputError names every file that is missing or cut short

Files of every form that ``formats`` knows are described; what is odd about a file is said beside its tensors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from weitiao.errors import InputError, first_of, t
from weitiao.machine.terminal import show
from weitiao.weights import bounded, formats, gguf, tokenizer
from weitiao.weights.header import TensorInfo, is_pointer, pointer

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "ice_text.model"),
    *("vocab.json", "vocab.txt"),
)
UNFINISHED = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".download", ".tmp")
LARGEST_SHOWN, NAMED, BESIDE = 8, 5, 12


# ---- a folder ------------------------------------------------------------------------------------------------------


def headers(folder: str | Path) -> list[TensorInfo]:
    """Every tensor of a file, a model folder or an adapter folder, file by file.

    InputError names every file that is missing or unsound.
    """
    problems: list[str] = []
    tensors = _headers(Path(folder), problems)
    if problems:
        raise InputError(problems)
    return tensors


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(tensor.bytes for tensor in headers(folder))


def _headers(path: Path, problems: list[str]) -> list[TensorInfo]:
    """The tensors that can be read; what is wrong goes to ``problems``."""
    return [tensor for found in _described(path, problems).values() for tensor in found.tensors]


def _described(path: Path, problems: list[str]) -> dict[str, formats.Found]:
    """What each file of weights that can be read holds, by its name; what is wrong goes to ``problems``."""
    files = [path] if path.is_file() else weight_files(path, problems)
    found = {file.name: _gather(problems, formats.describe, file) for file in files if file.is_file()}
    found = {name: described for name, described in found.items() if described}
    if not problems and not any(described.tensors for described in found.values()):
        problems.append(t("{path}: no file with tensors here", path=path))
    return found


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
    others = [file for suffix in formats.SUFFIXES for file in sorted(folder.glob(f"*{suffix}"))]
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
    return bounded.json_object(path)


def check_tokenizer(folder: str | Path) -> None:
    """InputError unless the folder has a tokenizer file, and nothing in its files says what cannot be."""
    path = Path(folder)
    refuse_links(path)
    tokenizer.check(path)
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise InputError(t("{path}: no tokenizer ({names})", path=path, names=", ".join(TOKENIZERS[:2]) + ", …"))


def refuse_links(folder: Path) -> None:
    """InputError for a link that leads out of the folder, as a file that was unpacked may hold; the hub's cache links
    from snapshots/COMMIT to blobs beside it, which is inside."""
    whole = folder.resolve()
    roots = [whole, whole.parent.parent / "blobs"] if whole.parent.name == "snapshots" else [whole]
    links = [file for file in folder.iterdir() if file.is_symlink()] if folder.is_dir() else []
    outside = [file for file in links if not any(file.resolve().is_relative_to(root) for root in roots)]
    if outside:
        message = "{path}: a link out of its folder, to {target}; put the file itself there"
        raise InputError([t(message, path=file, target=file.resolve()) for file in outside])


def check_folder(folder: str | Path, with_tokenizer: bool = False) -> None:
    """InputError that names every file a model folder lacks, has in part, or has unsound; ``with_tokenizer``: those."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(t("no such folder: {path}", path=path))
    if (path / ADAPTER_CONFIG).is_file():
        base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise InputError(t("{path}: an adapter of {base}, not a whole model", path=path, base=base))
    refuse_links(path)
    problems: list[str] = []
    if not (path / "config.json").is_file():
        problems.append(t("{path}: missing", path=path / "config.json"))
    elif is_pointer(path / "config.json"):
        problems.append(pointer(path / "config.json"))
    if with_tokenizer:
        _gather(problems, check_tokenizer, path)
    for file in weight_files(path, problems):
        if file.is_file():
            _gather(problems, formats.describe, file)
    if problems:
        left = sorted(file.name for file in path.iterdir() if file.name.endswith(UNFINISHED))
        if left:
            problems.append(t("{path}: an unfinished download: {names}", path=path, names=", ".join(left)))
        raise InputError(problems)


# ---- weitiao inspect -----------------------------------------------------------------------------------------------


def report(path: str | Path) -> dict[str, Any]:
    """What ``weitiao inspect`` says of a file or folder: totals, dtypes, the largest, what is missing or doubled."""
    path = Path(path)
    place = path
    if path.is_dir() and not weight_files(path, []):  # a run's folder: what it trained
        place = next((path / name for name in ("model", "adapter") if (path / name).is_dir()), path)
    problems: list[str] = []
    found = _described(place, problems)
    tensors = [tensor for one in found.values() for tensor in one.tensors]
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
        "files": {name: (folder / name).stat().st_size for name in sorted(found)},
        "holds": sorted({f"{one.form}: {one.holds}" for one in found.values()}),
        "left_out": {name: what for one in found.values() for name, what in one.left_out.items()},
        "odd": _odd(tensors),
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


def _odd(tensors: list[TensorInfo]) -> list[str]:
    """What a person would want to know of tensors that are sound."""
    said = []
    places: dict[tuple[str, int, int], list[str]] = {}
    for tensor in tensors:
        if tensor.parameters:
            places.setdefault((tensor.file, tensor.start, tensor.bytes), []).append(tensor.name)
    shared = [names for names in places.values() if len(names) > 1]
    said += [t("the same bytes under several names: {names}", names=", ".join(names[:4])) for names in shared[:NAMED]]
    if views := [tensor.name for tensor in tensors if tensor.strides]:
        said.append(t("{count} tensors do not lie row after row ({name} first)", count=len(views), name=views[0]))
    if empty := [tensor.name for tensor in tensors if not tensor.parameters]:
        said.append(t("{count} tensors without elements ({name} first)", count=len(empty), name=empty[0]))
    if wide := [tensor.name for tensor in tensors if tensor.dtype == "F64"]:
        said.append(t("{count} tensors in float64, twice what is needed ({name} first)", count=len(wide), name=wide[0]))
    unread = sorted({tensor.dtype for tensor in tensors} - formats.TORCH.keys() - gguf.BLOCKS.keys())
    return said + ([t("types that are shown and not read: {names}", names=", ".join(unread))] if unread else [])


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
    path: Annotated[
        Path,
        typer.Argument(
            help="a model folder, an adapter folder, a run, the embedded model's name, or a file: "
            "safetensors, .bin, .pt, .pth, .ckpt, .gguf"
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Show the tensors of a model without loading it: sizes, dtypes, what is missing or doubled."""
    from weitiao.weights import fetch

    found = report(fetch.embedded() if str(path) == fetch.EMBEDDED and not path.exists() else path)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _print_table(found)


def _beside(left_out: Mapping[str, str]) -> str:
    """What a file holds beside weights, a line each; of many the first."""
    lines = [f"{name[:60]}: {what}" for name, what in left_out.items()]
    return "\n".join(first_of(lines, BESIDE))


def _print_table(found: dict[str, Any]) -> None:
    """Print the report for a person."""
    from rich.table import Table

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
    rows.append((t("holds"), "\n".join(found["holds"])))
    left = found["left_out"]
    rows += [(t("beside the weights"), _beside(left))] if left else []
    for key, label in (
        ("odd", t("odd")),
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
    show(about)
    table = Table(t("largest tensors"), t("shape"), "dtype", t("bytes"), t("file"), box=None, pad_edge=False)
    for tensor in found["largest"]:
        table.add_row(
            tensor["name"], "×".join(map(str, tensor["shape"])), tensor["dtype"], f"{tensor['bytes']:,}", tensor["file"]
        )
    show(table)
