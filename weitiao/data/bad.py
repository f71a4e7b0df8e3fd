"""Bad rows: what cannot be used of a file, and how it is told without drowning the reader.

listed(bad)             # lines of an error: every row, or of many the first few of each reason
counted(bad)            # lines of a notice: how many of each reason, and where the first of them stand
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weitiao.errors import first_of

SHOWN_ROWS = 20
SHOWN_ALIKE = 3
SHOWN_REASONS = 8


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: ``where`` is FILE:LINE, ``record`` what stands there (text, where it is no record)."""

    where: str
    reason: str
    record: Any = None

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def listed(bad: Sequence[BadRow]) -> list[str]:
    """A line for each of the rows; of more than SHOWN_ROWS the first of every reason, and how many more there are."""
    if len(bad) <= SHOWN_ROWS:
        return [str(row) for row in bad]
    lines = [line for rows in _by_reason(bad) for line in first_of([str(row) for row in rows], SHOWN_ALIKE)]
    return first_of(lines, SHOWN_ROWS)


def counted(bad: Sequence[BadRow]) -> list[str]:
    """A line for each reason: how many rows have it, and the places of the first."""
    lines = []
    for rows in _by_reason(bad):
        places = [row.where for row in rows[:SHOWN_ALIKE]] + ["…"] * (len(rows) > SHOWN_ALIKE)
        lines.append(f"  {len(rows)} × {rows[0].reason} ({', '.join(places)})")
    return first_of(lines, SHOWN_REASONS)


def _by_reason(bad: Sequence[BadRow]) -> list[list[BadRow]]:
    """The rows of every reason, in the order in which reasons come first."""
    found: dict[str, list[BadRow]] = {}
    for row in bad:
        found.setdefault(row.reason, []).append(row)
    return list(found.values())
