"""One case: a few files, how a person opens them, and what must come of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CANARY = "CANARY"
REFUSED, OPENED, EITHER = "refused", "opened", "either"  # EITHER: whatever is said, nothing may run


@dataclass(frozen=True)
class Case:
    """Files of one folder by name (bytes, or where a link leads), how they are opened, what must come of it."""

    name: str
    files: dict[str, bytes | Path]
    how: str  # a key of soak.OPENERS
    wanted: str = REFUSED
    opened: str = ""  # the file that is opened; "" is the folder

    def write(self, folder: Path) -> Path:
        """The files in ``folder``; what is to be opened."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                path.symlink_to(content)
            else:
                path.write_bytes(content)
        return folder / self.opened if self.opened else folder
