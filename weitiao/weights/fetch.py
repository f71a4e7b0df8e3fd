"""A model's name becomes a folder on this machine: a folder is itself, the embedded model is in the package, anything
else is a hub repository, fetched at one commit through huggingface_hub's cache and checked hash by hash.

    folder = resolve("weitiao-tiny-zh")
    folder = resolve("Qwen/Qwen2.5-0.5B", revision="main")

Only data files are fetched (no code, no pickles, nothing from subfolders). ``HF_ENDPOINT``, ``HF_HOME`` and
``HF_HUB_OFFLINE`` are the hub's own standard variables and are honoured.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from weitiao.errors import InputError, RunError, say, t
from weitiao.machine import disk
from weitiao.weights import inspect

EMBEDDED = "weitiao-tiny-zh"
ALLOWED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
IGNORED = ["*/*", "consolidated*"]  # other frameworks' copies: onnx/, original/, Mistral's own layout
REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Fetched:
    """What a fetch gave: where it lies, which commit it is, and how many bytes came over the network just now."""

    folder: Path
    commit: str
    downloaded_bytes: int


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: an existing folder, the embedded model, or a hub repository at ``revision`` (main).

    InputError for a name that is nothing of these or a repository that is not there, gated or without safetensors;
    RunError when the hub cannot be reached and the cache has no complete copy, when the disk is too small, or when
    the bytes that came are not those that the hub promised.
    """
    path = Path(name).expanduser()
    if str(name) and path.is_dir():
        return path
    if str(name) == EMBEDDED:
        return embedded()
    if not REPOSITORY.fullmatch(str(name)) or path.exists():
        raise InputError(t("{name}: no such folder, and no name of a hub repository", name=name))
    return fetch(str(name), revision or "main").folder


def embedded() -> Path:
    """The folder of the model inside the package."""
    folder = Path(str(files("weitiao"))) / "demo" / EMBEDDED
    if not folder.is_dir():
        raise InputError(t("{path}: the embedded model is missing from this installation", path=folder))
    return folder


def fetch(repository: str, revision: str = "main", to: Path | None = None, verify_all: bool = False) -> Fetched:
    """Fetch a repository's data files into the hub's cache, or into the folder ``to``; errors as for ``resolve``.

    What comes over the network is compared with the hashes that the hub lists for the commit; ``verify_all`` does so
    for what was there before, too. When the hub cannot be reached, a complete cached copy is used and that is said.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repository, revision=revision)
    except Exception as error:  # the http library's own errors have no common base with the hub's
        _refuse(repository, revision, error)
        if to is not None:  # what a folder already holds cannot be told from another model without the hub
            raise RunError(
                t("{name}: the hub cannot be reached ({reason})", name=repository, reason=_line(error))
            ) from error
        return _cached(repository, revision, error)
    commit = info.sha or ""
    _check_kinds(repository, [sibling.rfilename for sibling in info.siblings or []])
    options: dict[str, Any] = {"allow_patterns": ALLOWED, "ignore_patterns": IGNORED, "local_dir": to}
    try:
        planned = snapshot_download(repository, revision=revision, dry_run=True, **options)
        wanted = [file for file in planned if file.will_download]
        total = sum(file.file_size or 0 for file in wanted)
        _check_disk(repository, total, Path(to or planned[0].local_path).parent)
        if total:
            say("{name}: fetching {count} files, {size} MB", name=repository, count=len(wanted), size=total // 10**6)
        folder = Path(snapshot_download(repository, revision=revision, **options))
        verify(repository, commit, folder, None if verify_all else {file.filename for file in wanted})
    except (InputError, RunError):
        raise
    except Exception as error:
        _refuse(repository, revision, error)
        raise RunError(
            t("{name}: the download failed ({reason}); run again", name=repository, reason=_line(error))
        ) from error
    _check(folder)
    return Fetched(folder, commit, total)


def _check(folder: Path) -> None:
    """InputError unless the folder is a whole model or a whole adapter."""
    if (folder / inspect.ADAPTER_CONFIG).is_file():
        inspect.headers(folder)
    else:
        inspect.check_folder(folder)


def _line(error: Exception) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _refuse(repository: str, revision: str, error: Exception) -> None:
    """InputError where the hub has answered that it will not give this; other errors may be the network's."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        message = "{name}: access must be asked for on its page; then log in (hf auth login)"
    elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        message = "{name}: no such folder here, and no such repository on the hub (or it is private: hf auth login)"
    elif isinstance(error, errors.RevisionNotFoundError):
        raise InputError(t('{name}: no revision "{revision}"', name=repository, revision=revision)) from error
    else:
        return
    raise InputError(t(message, name=repository)) from error


def _cached(repository: str, revision: str, reason: Exception) -> Fetched:
    """A complete copy that is already here; RunError if there is none."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"allow_patterns": ALLOWED, "ignore_patterns": IGNORED}
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, **options))
        _check(folder)
    except (OSError, InputError) as error:
        message = "{name}: no such folder here, and the hub cannot be reached ({reason}) nor is a whole copy cached"
        raise RunError(t(message, name=repository, reason=_line(reason))) from error
    say("{name}: the hub cannot be reached; using the cached copy {folder}", name=repository, folder=folder)
    return Fetched(folder, folder.name, 0)


def _check_kinds(repository: str, names: list[str]) -> None:
    """InputError for a repository whose weights are pickles only."""
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        found = ", ".join(pickles[:3]) or "-"
        raise InputError(
            t("{name}: no safetensors weights in this revision (it has {found})", name=repository, found=found)
        )


def _check_disk(repository: str, needed: int, folder: Path) -> None:
    """RunError before the first byte if the disk cannot hold what would come."""
    free = disk(folder).free_bytes
    if needed > free:
        message = "{path}: {needed} bytes are needed for {name} and {free} are free"
        raise RunError(t(message, path=folder, needed=needed, name=repository, free=free))


def verify(repository: str, commit: str, folder: Path, names: set[str] | None = None) -> None:
    """Compare files with the hub's hashes for the commit (sha256 of large files, git's sha1 of small ones).

    A file that differs is removed, so that the next fetch brings it anew, and RunError names it. The hub's own client
    compares sizes only.
    """
    from huggingface_hub import HfApi

    if names is not None and not names:
        return
    bad: list[str] = []
    for entry in HfApi().list_repo_tree(repository, revision=commit, recursive=True):
        path = folder / entry.path
        if (names is not None and entry.path not in names) or not path.is_file():
            continue
        lfs = getattr(entry, "lfs", None)
        wanted = lfs.sha256 if lfs else entry.blob_id  # type: ignore[union-attr]
        if digest(path, git=not lfs) != wanted:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            bad.append(t("{path}: its bytes are not those of the hub; it was removed, run again", path=path))
    if bad:
        raise RunError(bad)


def digest(path: Path, git: bool = False) -> str:
    """sha256 of a file, or with ``git`` the sha1 that git gives it as a blob (it names content, it guards nothing)."""
    hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False) if git else hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def verb(
    repository: Annotated[str, typer.Argument(help="a hub repository, such as Qwen/Qwen2.5-0.5B")],
    revision: Annotated[str, typer.Option(help="commit, tag or branch")] = "main",
    to: Annotated[Path | None, typer.Option(help="a folder to put the files in, instead of the cache")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Get a model's files, compare every one with the hub's hashes, and print their folder."""
    if not REPOSITORY.fullmatch(repository) or repository == EMBEDDED:
        raise InputError(t("{name}: not a name of a hub repository", name=repository))
    got = fetch(repository, revision, to, verify_all=True)
    sizes = {path.name: path.stat().st_size for path in sorted(got.folder.iterdir()) if path.is_file()}
    if as_json:
        values = {"repository": repository, "commit": got.commit, "folder": str(got.folder), "files": sizes}
        print(json.dumps(values | {"bytes": sum(sizes.values()), "downloaded_bytes": got.downloaded_bytes}))
    else:
        print(got.folder)
