"""Folders that appear whole or not at all, and a manifest that notices a changed byte.

with whole(path, needed_bytes) as temporary:
    ...                                # write files into it; they are flushed, and it becomes ``path``
problems(path)                         # [] if every byte is as it was written
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from weitiao.errors import redact, t
from weitiao.runs import disk_error

MANIFEST = "manifest.json"
TEXTS, VOCABULARIES = (".json", ".md", ".yaml", ".txt"), ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
SCRUBBED_BYTES = 4 << 20
ROOM_BYTES = 1 << 20  # headers and JSON beside the tensors


@contextmanager
def whole(path: Path, tensor_bytes: int) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well; what was there goes then.

    RunError names the bytes needed if the disk is, or becomes, too full; nothing is left behind.
    """
    path = Path(path)
    needed_bytes = tensor_bytes + ROOM_BYTES
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    former = temporary.with_suffix(".former.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary.mkdir()
        yield temporary
        if not (temporary / MANIFEST).exists():
            _scrub(temporary)
        for file in (*temporary.rglob("*"), temporary):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes files that only their owner may read
            flush(file)
        if path.exists():
            os.replace(path, former)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or (errno.ENOSPC if "os error 28" in str(error) else errno.EIO)
        raise disk_error(OSError(number, str(error)), path, needed_bytes) from error
    finally:
        for rest in (temporary, former):
            shutil.rmtree(rest, ignore_errors=True)


def _scrub(folder: Path) -> None:
    """No secret leaves in what is saved: a base's own config.json may hold its owner's token."""
    for file in folder.rglob("*"):
        if file.suffix in TEXTS and file.name not in VOCABULARIES and file.stat().st_size <= SCRUBBED_BYTES:
            text = file.read_text(encoding="utf-8", errors="surrogateescape")
            if (clean := redact(text)) != text:
                file.write_text(clean, encoding="utf-8", errors="surrogateescape")


def flush(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on the disk; folders cannot be flushed on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path) -> None:
    """Write the manifest of ``folder``: size and sha256 of every file, and a hash of the manifest itself."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    (folder / MANIFEST).write_bytes(_canonical(files))


def _canonical(files: Mapping[str, Any]) -> bytes:
    """``files`` beside their own hash; any other byte in the file is a changed one."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, sort_keys=True).encode()


def problems(folder: Path) -> list[str]:
    """What is wrong with a sealed folder: a file that is missing, cut or changed."""
    try:
        written = (folder / MANIFEST).read_bytes()
        files = json.loads(written)["files"]
        if _canonical(files) != written:
            return [t("{file}: its own hash does not match", file=MANIFEST)]
    except FileNotFoundError:
        return [t("{file}: missing", file=MANIFEST)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [t("{file}: not readable: {reason}", file=MANIFEST, reason=error)]
    found = []
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            found.append(t("{file}: missing", file=name))
        elif (size := file.stat().st_size) != entry["bytes"]:
            found.append(t("{file}: {found} bytes, not {right}", file=name, found=size, right=entry["bytes"]))
        elif sha256(file) != entry["sha256"]:
            found.append(t("{file}: its bytes have changed (sha256)", file=name))
    return found


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
