"""Patches: what a person decided about rows, kept beside the files and never in them.

    patch = Patch.read("rows.patch.jsonl")
    for line, record in patch.applied(records(path, "jsonl")): ...
    patch.problems                                      # decisions that met no row

A line of a patch is ``{"file", "line", "sha256", "action": accept | edit | reject, "row"}``. A decision belongs to what
a row says (the hash of its record), wherever the row stands; one whose row has changed since is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from weitiao.data.formats import Numbered, Unreadable, records
from weitiao.errors import InputError, first_of, t

ACTIONS = ("accept", "edit", "reject")


@dataclass(frozen=True)
class Decision:
    """What is to become of the row of hash ``sha256``; ``row`` is the edited record, ``where`` the row's FILE:LINE."""

    sha256: str
    action: str
    row: Any = None
    file: str = ""
    line: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The decision as a line of a patch."""
        found = {"file": self.file, "line": self.line, "sha256": self.sha256, "action": self.action}
        return found | ({"row": self.row} if self.action == "edit" else {})


@dataclass
class Patch:
    """Decisions by the hash of the record they are about, and how often each has been met."""

    name: str = ""
    decisions: dict[str, Decision] = field(default_factory=dict)
    met: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path | None) -> Patch:
        """The patch of a file; an empty one for none. InputError lists every line that is no decision."""
        if path is None:
            return cls()
        if not Path(path).is_file():
            raise InputError(t("{path}: no such file", path=path))
        found, problems = cls(str(path)), []
        record: Any
        for line, record in records(Path(path), "jsonl") if Path(path).stat().st_size else ():
            if problem := _problem(record):
                problems.append(f"{path}:{line}: {problem}")
            else:
                place = str(record.get("file", "")), record.get("line", 0)
                decision = Decision(record["sha256"], record["action"], record.get("row"), *place)
                found.decisions[decision.sha256] = decision  # the last one counts
        if problems:
            raise InputError(first_of(problems))
        return found

    def applied(self, stream: Numbered) -> Iterator[tuple[int, Any]]:
        """The records of ``stream`` without those that were rejected, and as they were edited."""
        for line, record in stream:
            key = hash_of(record) if self.decisions and not isinstance(record, Unreadable) else ""
            if (decision := self.decisions.get(key)) is None:
                yield line, record
                continue
            self.met[key] = self.met.get(key, 0) + 1
            if decision.action != "reject":
                yield line, decision.row if decision.action == "edit" else record

    @property
    def said(self) -> list[str]:
        """What the patch did so far."""
        done: dict[str, int] = dict.fromkeys(ACTIONS, 0)
        for key, count in self.met.items():
            done[self.decisions[key].action] += count
        message = "{patch}: {edit} rows edited, {reject} rejected, {accept} accepted"
        return [t(message, patch=self.name, **done)] if self.decisions else []

    @property
    def problems(self) -> list[str]:
        """Decisions that no row was met for."""
        lost = [one for key, one in self.decisions.items() if key not in self.met]
        message = "{patch}: the row of {file}:{line} is not there any more, or was changed since it was reviewed"
        return first_of([t(message, patch=self.name, file=one.file, line=one.line) for one in lost])


def hash_of(record: Any) -> str:
    """The hash of what a record says, whatever the order of its keys."""
    text = json.dumps(record, ensure_ascii=False, sort_keys=True, default=str)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _problem(record: Any) -> str | None:
    """What keeps a line from being a decision."""
    if isinstance(record, Unreadable):
        return record.reason
    if not isinstance(record, Mapping) or not isinstance(record.get("sha256"), str):
        return t("not a decision about a row: no sha256")
    if record.get("action") not in ACTIONS:
        names = ", ".join(ACTIONS)
        return t("action: {found} is not one of {names}", found=json.dumps(record.get("action")), names=names)
    if record["action"] == "edit" and not isinstance(record.get("row"), Mapping):
        return t("an edit without the edited row")
    return None
