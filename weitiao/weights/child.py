"""A pickled file is described in a process of its own, with limits on memory and time, and without the environment.

    found = run(Path("pytorch_model.bin"))          # what pickled.describe says

The process may take one and a half times the file and 256 MiB of memory, and the processor for about a second, more
for a long pickle; then the system ends it. What it says is bounded and checked again here. Windows has no such limits:
there the time alone is limited.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOM_BYTES = 240 << 20
CPU_SECONDS, SECONDS_A_BYTE = 1.0, 0.6e-6
WALL_SECONDS = 600.0  # only so that nothing waits for ever: a busy machine makes no file bad
KEPT = ("PATH", "SYSTEMROOT", "LANG", "LC_ALL", "LC_MESSAGES")  # no secret of the environment goes in


def run(path: Path, wall_seconds: float = WALL_SECONDS) -> dict[str, Any]:
    """What ``pickled.describe`` says of ``path``; InputError with its reason, or where a limit was met."""
    from weitiao.errors import InputError, t

    size = path.stat().st_size
    answer_bytes = (8 << 20) + 2 * min(size, 64 << 20)
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    try:
        said, _ = _talk(process, json.dumps({"path": str(path.absolute()), "bytes": size}).encode(), wall_seconds)
        found = json.loads(said[:answer_bytes]) if len(said) <= answer_bytes else None
    except (subprocess.TimeoutExpired, ValueError, RecursionError):
        found = None
    finally:
        process.kill()
        process.wait()
    if not isinstance(found, dict):
        message = "{path}: to describe its pickle took more memory or time than such a file needs; it is refused"
        raise InputError(t(message, path=path))
    if "refused" in found:
        reason = _reason(str(found["refused"]), found.get("values"))
        raise InputError(t("{path}: refused: {reason}", path=path, reason=reason))
    return found


def _reason(english: str, values: Any) -> str:
    from weitiao.errors import chinese, t

    known = isinstance(values, dict) and (english in chinese() or not values)
    return t(english, **{name: str(value)[:120] for name, value in values.items()}) if known else english[:300]


def _talk(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> tuple[bytes, bytes]:
    return process.communicate(request, timeout=seconds)


def main() -> None:
    """In the child: limits first, then the file, then one JSON object on stdout."""
    request = json.load(sys.stdin)
    _limit(request["bytes"])
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from weitiao.weights import pickled
    from weitiao.weights.archive import Refused

    try:
        found = pickled.describe(Path(request["path"]), _more_time)
    except Refused as error:
        found = {"refused": error.english, "values": error.values}
    except OSError as error:
        found = {"refused": error.strerror or "it cannot be read"}
    json.dump(found, sys.stdout)


def _limit(file_bytes: int) -> None:
    """Memory for the file's size; no files written, no core left."""
    try:
        import resource
    except ImportError:  # Windows
        return
    most = ROOM_BYTES + file_bytes + file_bytes // 2
    for name, value in (("RLIMIT_AS", most), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (value, value))
    _more_time(0)


def _more_time(pickle_bytes: int) -> None:
    """The processor for a pickle of so many bytes; then SIGPROF ends the process."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS + SECONDS_A_BYTE * pickle_bytes)


if __name__ == "__main__":
    main()
