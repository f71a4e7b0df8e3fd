"""A model's name becomes a folder on this machine: a folder is itself, the embedded model is in the package, anything
else is fetched: a repository of the hub or of ModelScope at one commit, a share folder, a link.

    folder = resolve("weitiao-tiny-zh")
    folder = resolve("Qwen/Qwen2.5-0.5B", revision="main")
    got = fetch("Qwen/Qwen2.5-0.5B", mirrors=("https://hf-mirror.com", "https://www.modelscope.cn"))

The first place that answers lists the files with their hashes, and that list is locked; then any mirror may serve the
bytes. What is unfinished is kept, run after run. Only data files are taken (no code; nothing from subfolders of a
model), and weights that are pickles only become safetensors. ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE`` and
``HF_TOKEN`` are the hub's own variables, ``MODELSCOPE_DOMAIN`` and ``MODELSCOPE_API_TOKEN`` ModelScope's.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from weitiao.errors import InputError, RunError, say, t
from weitiao.weights import inspect, sources
from weitiao.weights.arrivals import PICKLES, get, to_safetensors
from weitiao.weights.cache import Place
from weitiao.weights.cache import digest as digest
from weitiao.weights.sources import Entry, Listing, Target, parse
from weitiao.weights.transfer import Limits
from weitiao.weights.web import Fault, Refused, Web, shown

EMBEDDED = "weitiao-tiny-zh"
ALLOWED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
IGNORED = ("*/*", "consolidated*")  # other frameworks' copies: onnx/, original/, Mistral's own layout
CODE = ("*.py", "*.pyc", "*.so", "*.sh")


@dataclass(frozen=True)
class Fetched:
    """What a fetch gave: where it lies, its commit, the bytes that came over the network just now, the files' names."""

    folder: Path
    commit: str
    downloaded_bytes: int
    names: tuple[str, ...] = ()


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: an existing folder, the embedded model, or a repository or link, fetched.

    InputError for a name that is nothing of these, or a repository that is not there, gated or without weights, or out
    of reach and in no cache; RunError for a link out of reach, when the disk is too small, or when no place gives the
    right bytes.
    """
    path = Path(name).expanduser()
    if str(name) and path.is_dir():
        return path
    if str(name) == EMBEDDED:
        return embedded()
    link = str(name).startswith(("https://", "http://", "modelscope:"))
    if not link and (not sources.REPOSITORY.fullmatch(str(name)) or path.exists()):
        raise InputError(
            t(
                "{name}: no such folder, and no name on a hub; without model.path it is weitiao-tiny-zh",
                name=name,
            )
        )
    try:
        return fetch(str(name), revision).folder
    except _Nowhere as error:
        raise (error if link else InputError(error.problems)) from None


class _Nowhere(RunError):
    """No place can be asked, and no whole copy is here; bad input where the name may as well be meant for a folder."""


def embedded() -> Path:
    """The folder of the model inside the package."""
    folder = Path(str(files("weitiao"))) / "demo" / EMBEDDED
    if not folder.is_dir():
        raise InputError(t("{path}: the embedded model is missing from this installation", path=folder))
    return folder


def fetch(
    name: str,
    revision: str | None = None,
    to: Path | None = None,
    verify_all: bool = False,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mirrors: Sequence[str] = (),
    dataset: bool = False,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    web: Web | None = None,
) -> Fetched:
    """Fetch a repository's or a link's files into the hub's cache or the folder ``to``; errors as for ``resolve``.

    What comes over the network is compared with the hashes of the lock; ``verify_all`` does so for what was there
    before, too, and fetches anew what differs. ``mirrors`` are asked, in order, for what the first place does not give.
    """
    target = parse(name, revision, dataset)
    place, bases = Place.of(target, to), (target.base, *map(_mirror, mirrors))
    web = web or Web(sources.keys(bases))
    listing, reached = _listing(web, target, bases, place)
    if listing is None:
        return _cached(target, reached, to)
    entries = _chosen(target, listing, include, exclude)
    missing = [entry for entry in entries if not place.holds(listing.commit, entry, verify_all)]
    folder, moved = place.folder(listing.commit), 0
    if missing:
        if reached is not None:
            limits = replace(limits, tries=1)  # nobody answers: no long patience
        if _offline() or (reached is not None and not target.repository):
            raise _unreachable(target, reached)
        place.pin(target.revision, listing)
        moved = get(web, target, listing, missing, bases, place, limits)
    elif reached is not None:
        say("{name}: the hub cannot be reached; using the cached copy {folder}", name=listing.name, folder=folder)
    elif verify_all:
        say("{name}: all {count} files are here and right; nothing to fetch", name=listing.name, count=len(entries))
    if (hashed := _hashed(place, listing, entries)) != listing:
        place.pin(target.revision, hashed)
    if not include and target.repository and not target.dataset and not target.path:
        to_safetensors(place, listing.commit, [entry.path for entry in entries if _any(entry.path, PICKLES)])
        _check(folder)
    place.point(target.revision, listing.commit)
    place.tidy(listing)
    return Fetched(folder, listing.commit, moved, tuple(entry.path for entry in entries))


# ---- which files ---------------------------------------------------------------------------------------------------


def _mirror(url: str) -> str:
    """A mirror's address as it is asked; InputError for what is none."""
    if url.startswith(("https://", "http://")) and urlsplit(url).hostname:
        return url.rstrip("/")
    raise InputError(t("--mirror {url}: not an address; it begins with https://", url=url))


def _offline() -> bool:
    """Whether the person has forbidden the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _listing(web: Web, target: Target, bases: Sequence[str], place: Place) -> tuple[Listing | None, str | None]:
    """The files of a revision from the first place that lists them, and None; or what was locked, and why no place did.

    What was locked for a commit stands, whoever lists it later.
    """
    known = place.pinned(shown(target.name), target.revision)
    if _offline():
        return known, t("HF_HUB_OFFLINE is set")
    if known is not None and target.repository and target.revision == known.commit:
        return known, None  # a commit does not change
    refusals, faults = [], []
    for base in bases if target.repository else bases[:1]:
        try:
            listing = sources.listed(web, target, base)
        except Refused as refused:
            refusals.append(refused)
        except Fault as fault:
            faults.append(f"{shown(base)}: {fault}")
        else:
            if base != bases[0]:
                say("{name}: the list of files is from {place}", name=listing.name, place=shown(base))
            return _as_locked(listing, place.pinned(listing.name, listing.commit)), None
    if refusals:
        raise InputError(_refusal(target, refusals[0]))
    return known, "; ".join(faults)


def _as_locked(listing: Listing, known: Listing | None) -> Listing:
    """A listing with the hashes that were locked for its commit."""
    if known is None:
        return listing
    digests = {(entry.path, entry.size): entry.digest for entry in known.entries}
    locked = (digests.get((entry.path, entry.size)) or entry.digest for entry in listing.entries)
    entries = tuple(replace(entry, digest=one) for entry, one in zip(listing.entries, locked, strict=True))
    return replace(listing, entries=entries)


def _hashed(place: Place, listing: Listing, entries: Sequence[Entry]) -> Listing:
    """The listing with the hashes of files that came from a place which gives none, for the next time."""
    folder, fetched = place.folder(listing.commit), {entry.path for entry in entries if not entry.digest}
    found = {name: f"sha256:{digest(folder / name)}" for name in fetched if (folder / name).is_file()}
    return replace(
        listing,
        entries=tuple(replace(entry, digest=found.get(entry.path, entry.digest)) for entry in listing.entries),
    )


def _any(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _chosen(target: Target, listing: Listing, include: Sequence[str], exclude: Sequence[str]) -> list[Entry]:
    """The files to fetch; InputError if there is none, or none with weights."""
    ours = [entry.path for entry in listing.entries if not _any(entry.path, IGNORED)]
    if target.path:
        include = (*include, target.path if target.path.endswith("/*") else glob.escape(target.path))
    if include:
        wanted = {entry.path for entry in listing.entries if _any(entry.path, include)}
    elif target.dataset or not target.repository:
        wanted = {entry.path for entry in listing.entries if not _any(entry.path, CODE)}
    else:
        safe = any(name.endswith(".safetensors") for name in ours)
        if not safe and not any(_any(name, PICKLES[:2]) for name in ours):
            found = [name for name in ours if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf"))]
            message = "{name}: no safetensors or pytorch_model.bin weights in this revision (it has {found})"
            raise InputError(t(message, name=listing.name, found=", ".join(found[:3]) or "-"))
        wanted = {name for name in ours if _any(name, ALLOWED if safe else (*ALLOWED, *PICKLES))}
    entries = [entry for entry in listing.entries if entry.path in wanted and not _any(entry.path, exclude)]
    if not entries:
        some = ", ".join(entry.path for entry in listing.entries[:8]) or "-"
        raise InputError(t("{name}: no file is called so (it has {found})", name=listing.name, found=some))
    return entries


def _refusal(target: Target, refused: Refused) -> str:
    """What a place's no means."""
    name = shown(target.name)
    if refused.code == "GatedRepo" or refused.status == 403:
        return t("{name}: access must be asked for on its page; then log in (hf auth login)", name=name)
    if refused.code == "RevisionNotFound":
        return t('{name}: no revision "{revision}"', name=name, revision=target.revision)
    if target.repository:
        message = "{name}: no such folder here, and no such repository on the hub (or it is private: hf auth login)"
        return t(message, name=name)
    return t("{name}: {reason}", name=name, reason=refused)


def _unreachable(target: Target, reason: str | None) -> _Nowhere:
    message = (
        "{name}: no such folder here, and the hub cannot be reached ({reason}) nor is a whole copy cached"
        if target.repository
        else "{name}: cannot be reached ({reason}), and no whole copy of it is here"
    )
    return _Nowhere(t(message, name=shown(target.name), reason=reason))


def _cached(target: Target, reason: str | None, to: Path | None) -> Fetched:
    """A complete copy that another tool put into the hub's cache; RunError if there is none, or for a folder ``to``,
    which cannot be told from another model's."""
    from huggingface_hub import snapshot_download

    nowhere = _unreachable(target, reason)
    if target.kind != "hub" or to is not None:
        raise nowhere
    kind = "dataset" if target.dataset else "model"
    try:
        folder = Path(snapshot_download(target.name, revision=target.revision, repo_type=kind, local_files_only=True))
        if not target.dataset:
            _check(folder)
    except (OSError, InputError) as error:
        raise nowhere from error
    say("{name}: the hub cannot be reached; using the cached copy {folder}", name=target.name, folder=folder)
    return Fetched(folder, folder.name, 0)


def _check(folder: Path) -> None:
    """InputError unless the folder is a whole model or a whole adapter."""
    if (folder / inspect.ADAPTER_CONFIG).is_file():
        inspect.headers(folder)
    else:
        inspect.check_folder(folder)


# ---- weitiao fetch -------------------------------------------------------------------------------------------------


def verb(
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Qwen/Qwen2.5-0.5B, modelscope:NAME or a link")],
    revision: Annotated[str | None, typer.Option(help="commit, tag or branch")] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="only these files")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="not these files")] = None,
    mirror: Annotated[list[str] | None, typer.Option(metavar="URL", help="asked next, in this order")] = None,
    dataset: Annotated[bool, typer.Option("--dataset", help="a data set, not a model")] = False,
    to: Annotated[Path | None, typer.Option(help="a folder to put the files in, instead of the cache")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Get a model's or a data set's files, compare every one with its hash, and print their folder.

    What a cut or a kill left is kept: the same command goes on from there.
    """
    if repository == EMBEDDED:
        raise InputError(t("{name}: not a name of a hub repository", name=repository))
    got = fetch(
        repository, revision, to, verify_all=True, include=include or (), exclude=exclude or (), mirrors=mirror or (),
        dataset=dataset,
    )  # fmt: skip
    if as_json:
        sizes = dict(_sizes(got))
        values: dict[str, Any] = {"repository": shown(repository), "commit": got.commit, "folder": str(got.folder)}
        values |= {"files": sizes, "bytes": sum(sizes.values()), "downloaded_bytes": got.downloaded_bytes}
        print(json.dumps(values, ensure_ascii=False))
    else:
        print(got.folder)


def _sizes(got: Fetched) -> Iterator[tuple[str, int]]:
    """Name and bytes of every file, those made on arrival included."""
    made = {path.name for path in got.folder.glob("*.safetensors*")}
    for name in sorted({*got.names, *made} or {path.name for path in got.folder.iterdir()}):
        if (path := got.folder / name).is_file():
            yield name, path.stat().st_size
