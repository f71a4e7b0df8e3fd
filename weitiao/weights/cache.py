"""Where fetched files lie: in the hub cache's own layout, so that other tools find them, or in a folder of one's own.

    place = Place.of(target, None)             # …/hub/models--Qwen--Qwen2.5-0.5B
    pinned = place.pinned("main")              # the listing that was locked, without a network
    if not place.holds(listing.commit, entry): ...

The hub's layout: ``blobs/HASH``, ``snapshots/COMMIT/NAME`` as a link to its blob, ``refs/REVISION`` with the commit.
Ours beside it, in ``.weitiao``: ``COMMIT.json``, the lock with every name, size and hash, and what is on its way,
``HASH.HOST-PROCESS.part``. The owner stands in that name because file locks say yes to everybody on some network
disks: two processes never write one file, and what a dead one left is taken over by renaming it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weitiao.machine.speed import cache_folder
from weitiao.runs import disk_error, write_atomic
from weitiao.weights.partial import hasher
from weitiao.weights.sources import OWN, Entry, Listing, Target
from weitiao.weights.web import shown

CHUNK_BYTES = 1 << 20
ABANDONED_SECONDS = 600.0  # without a byte, whatever its owner is said to be


@dataclass(frozen=True)
class Place:
    """The folder ``root`` of a repository in the cache (``hub``) or of a person."""

    root: Path
    hub: bool

    @classmethod
    def of(cls, target: Target, to: Path | None) -> Place:
        """The place of a target: ``to`` if it is given, else in the cache."""
        if to is not None:
            return cls(to, hub=False)
        if not target.repository:
            name = shown(target.name)
            slug = re.sub(r"[^A-Za-z0-9.]+", "-", name.partition("//")[2]).strip("-.")[:80]
            return cls(cache_folder() / "links" / f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:8]}", hub=False)
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        kind = "dataset" if target.dataset else "model"
        return cls(Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=target.name, repo_type=kind), hub=True)

    def folder(self, commit: str) -> Path:
        """The folder in which the files of a commit are seen."""
        return self.root / "snapshots" / commit if self.hub else self.root

    # ---- the lock --------------------------------------------------------------------------------------------------

    def pinned(self, name: str, revision: str) -> Listing | None:
        """The listing that was locked for a revision, or None."""
        commit = revision
        if self.hub:
            with contextlib.suppress(OSError, ValueError):
                commit = (self.root / "refs" / revision).read_text(encoding="utf-8").strip()
        found = self._read(self.root / OWN / (f"{commit}.json" if self.hub else "lock.json"))
        try:
            listing = Listing(
                found["name"], found["commit"], found["source"], tuple(Entry(**entry) for entry in found["entries"])
            )
            right = listing.name == name and revision in (found["revision"], listing.commit)
        except (KeyError, TypeError):
            return None
        return listing if right or (self.hub and listing.commit == commit) else None

    def pin(self, revision: str, listing: Listing) -> None:
        """Lock a listing; addresses are left out, as they may hold a key."""
        entries = [{name: value for name, value in asdict(entry).items() if name != "url"} for entry in listing.entries]
        values = asdict(listing) | {"revision": revision, "entries": entries}
        name = f"{listing.commit}.json" if self.hub else "lock.json"
        write_atomic(self.root / OWN / name, json.dumps(values, ensure_ascii=False, indent=1))

    def point(self, revision: str, commit: str) -> None:
        """Let a branch or a tag name its commit, as the hub's client does."""
        if self.hub and revision != commit:
            write_atomic(self.root / "refs" / revision, commit)

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}

    # ---- files -----------------------------------------------------------------------------------------------------

    def holds(self, commit: str, entry: Entry, verify: bool = False) -> bool:
        """Whether a file is there, with its size, and with its hash if ``verify``; one rewritten counts, too."""
        path = self.folder(commit) / entry.path
        blob = self._blob(entry)
        if blob is not None and not path.is_file() and same(blob, entry, verify=True):
            link(blob, path)  # another commit brought it
        return same(path, entry, verify) or self._rewritten(commit, entry.path, verify)

    def arrive(self, commit: str, entries: Sequence[Entry], data: Path) -> None:
        """A whole and checked file takes its name, or its several names, at once."""
        first = self.folder(commit) / entries[0].path
        try:
            blob = self._blob(entries[0])
            target = blob or first
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(data, target)
            for entry in entries if blob else entries[1:]:
                link(target, self.folder(commit) / entry.path)
        except OSError as error:
            raise disk_error(error, first, entries[0].size) from error

    def _blob(self, entry: Entry) -> Path | None:
        return self.root / "blobs" / entry.digest.partition(":")[2] if self.hub and entry.digest else None

    # ---- what was rewritten on arrival -----------------------------------------------------------------------------

    def rewritten(self, commit: str, names: Sequence[str], files: Sequence[Path]) -> None:
        """Record that ``files`` stand for what came as ``names``, and remove those."""
        folder = self.folder(commit)
        found = {path.name: [path.stat().st_size, digest(path)] for path in files}
        write_atomic(self.root / OWN / f"{commit}.rewritten.json", json.dumps({"from": list(names), "files": found}))
        for name in names:
            path = folder / name
            if path.is_symlink():
                path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def _rewritten(self, commit: str, name: str, verify: bool) -> bool:
        found = self._read(self.root / OWN / f"{commit}.rewritten.json")
        if name not in found.get("from", ()):
            return False
        entries = [Entry(path, size, f"sha256:{sha256}") for path, (size, sha256) in found["files"].items()]
        return all(same(self.folder(commit) / entry.path, entry, verify) for entry in entries)

    # ---- what is on its way ----------------------------------------------------------------------------------------

    def claim(self, entry: Entry) -> Path | None:
        """A folder of this process for an unfinished file, with what a dead process left of it; None while a live one
        fetches it."""
        own = self.root / OWN / f"{_key(entry)}.{_owner()}.part"
        if own.is_dir():
            return own
        for found in self._parts(f"{_key(entry)}.*.part"):
            if not _dead(found):
                return None
            with contextlib.suppress(OSError):  # another process was quicker
                found.rename(own)
                return own
        own.mkdir(parents=True, exist_ok=True)
        return own

    def scratch(self) -> Path:
        """An empty folder of this process, on the same disk."""
        path = self.root / OWN / f"scratch.{_owner()}.part"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def kept_bytes(self, entry: Entry) -> int:
        """Bytes that the disk already holds of an unfinished file."""
        data = [part / "data" for part in self._parts(f"{_key(entry)}.*.part")]
        return max((min(path.stat().st_blocks * 512, entry.size) for path in data if path.is_file()), default=0)

    def tidy(self, listing: Listing) -> None:
        """Remove what dead processes left, but for files of this listing that are still missing."""
        wanted = {_key(entry) for entry in listing.entries if not self.holds(listing.commit, entry)}
        for found in self._parts("*.part"):
            mine = found.name.endswith(f".{_owner()}.part")
            if (mine or _dead(found)) and found.name.partition(".")[0] not in wanted:
                shutil.rmtree(found, ignore_errors=True)

    def _parts(self, pattern: str) -> Iterator[Path]:
        return iter(sorted((self.root / OWN).glob(pattern)))


def _key(entry: Entry) -> str:
    """What an unfinished file is called: by its content, or by its name and size where no hash is known."""
    known = entry.digest.partition(":")[2]
    return known or hashlib.sha256(f"{entry.path} {entry.size}".encode()).hexdigest()[:40]


def _owner() -> str:
    """This machine and this process."""
    return f"{re.sub(r'[^A-Za-z0-9-]', '-', platform.node())}-{os.getpid()}"


def _dead(part: Path) -> bool:
    """Whether nobody works on an unfinished file any more."""
    import psutil

    host, _, process = part.name.removesuffix(".part").rpartition(".")[2].rpartition("-")
    mine = _owner().rpartition("-")[0]
    if host == mine and process.isdigit() and not psutil.pid_exists(int(process)):
        return True
    try:
        return time.time() - max(path.stat().st_mtime for path in (part, *part.iterdir())) > ABANDONED_SECONDS
    except OSError:
        return False


def same(path: Path, entry: Entry, verify: bool = False) -> bool:
    """Whether a file has the entry's size, and with ``verify`` its hash where one is known."""
    try:
        if not path.is_file() or path.stat().st_size != entry.size:
            return False
        return not (verify and entry.digest) or digest(path, entry.digest.startswith("sha1:")) == _hex(entry)
    except OSError:
        return False


def _hex(entry: Entry) -> str:
    return entry.digest.partition(":")[2]


def digest(path: Path, git: bool = False) -> str:
    """sha256 of a file, or with ``git`` the sha1 that git gives it as a blob (it names content, it guards nothing)."""
    found = hasher("sha1" if git else "sha256", path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def link(blob: Path, path: Path) -> None:
    """``path`` shows ``blob``: a relative symbolic link as in the hub's cache, or a copy where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        shutil.copyfile(blob, path)
