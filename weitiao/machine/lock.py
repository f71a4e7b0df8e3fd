"""A folder that one process at a time may write, however that process ends.

with Lock(Path("runs/a")):
    ...                                 # RunError at once where another, named by host and pid, is at it

The operating system holds the lock (flock; on Windows a locked byte), so a process that was killed holds none. On a
file system without such locks, and on those that grant one to everybody, what the file says counts: it is held while
the process it names lives; where there is no lock at all and that is on another host, until a person removes the file.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from weitiao.errors import RunError, t

NAME = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
BYTE = 1 << 30  # the one that Windows locks: far behind what is written, which others may read


class Lock:
    """The lock of ``folder``, which exists. Whoever holds it may enter again; it opens when the last block is left."""

    def __init__(self, folder: Path):
        self.path, self.handle, self.depth = folder / NAME, -1, 0

    def __enter__(self) -> Lock:
        if not self.depth:
            self._take()
        self.depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.depth -= 1
        if not self.depth:
            self._drop()

    def _take(self) -> None:
        while self.handle < 0:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                message = "{path}: cannot be written: {reason}"
                raise RunError(t(message, path=self.path, reason=error.strerror)) from error
            try:
                locked, holder = _lock(handle), _read(handle)
                if locked is False or (holder and _lives(holder, trusted=locked is True)):
                    raise _taken(self.path.parent, holder)
                if _is(handle, self.path):  # its last holder may have removed it meanwhile
                    os.ftruncate(handle, 0)
                    os.lseek(handle, 0, os.SEEK_SET)
                    os.write(handle, json.dumps(_this()).encode())
                    self.handle = handle
            finally:
                if self.handle != handle:
                    os.close(handle)

    def _drop(self) -> None:
        """Remove the file before the lock opens, so that nobody takes a lock on a file that is gone unseen."""
        with suppress(OSError):  # Windows removes no open file
            self.path.unlink()
        os.close(self.handle)
        if os.name == "nt":
            self.path.unlink(missing_ok=True)
        self.handle = -1


def _lock(handle: int) -> bool | None:
    """Whether the lock was free and is ours now; None where the file system has none."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in NO_LOCKS else False
    return True


def _this() -> dict[str, Any]:
    """This process, as the file names it."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid()), "since": time.ctime()}


def _started(pid: int) -> float | None:
    """When the process ``pid`` of this host was started, which tells it from a later one of that number; None if it
    is not there."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _read(handle: int) -> dict[str, Any]:
    """What the file says of its holder; nothing if it was never written whole."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        found = json.loads(os.read(handle, 4096))
        return found if {"pid", "host", "started", "since"} <= found.keys() else {}
    except (ValueError, AttributeError):
        return {}


def _lives(holder: dict[str, Any], trusted: bool) -> bool:
    """Whether the holder is there still; of another host that cannot be known, and the lock is believed if there is
    one (``trusted``)."""
    if holder["host"] != socket.gethostname():
        return not trusted
    started = _started(int(holder["pid"]))
    return started is not None and abs(started - float(holder["started"] or 0)) < 1.0


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _taken(folder: Path, holder: dict[str, Any]) -> RunError:
    """The refusal."""
    if not holder:
        return RunError(t("{path}: another process is writing this run", path=folder))
    message = "{path}: process {pid} on {host} has been writing this run since {since}; wait for it or stop it"
    said = t(message, path=folder, pid=holder["pid"], host=holder["host"], since=holder["since"])
    if holder["host"] == socket.gethostname():
        return RunError(said)
    gone = t("if that process is gone, remove {file}", file=folder / NAME)
    return RunError([said, gone])
