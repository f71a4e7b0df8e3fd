"""Going on from a checkpoint: a run that was stopped, and one that went bad.

start(trainer, resume=True)          # the newest checkpoint that verifies, or from the beginning
recover(trainer, step=840)           # steps stay bad: back to it, on without the rows at fault
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.data.batch import Example
from weitiao.errors import InputError, RunError, say, t
from weitiao.methods.base import result_bytes
from weitiao.train import checkpoint, room
from weitiao.train.guard import NOT_A_NUMBER, Guard
from weitiao.train.modes import machine_facts
from weitiao.train.room import Room

if TYPE_CHECKING:
    from weitiao.train.loop import Trainer

BAD_ROWS = "bad_rows.jsonl"
SHOWN_ROWS = 20


def start(trainer: Trainer, resume: bool, allow_changes: bool = False) -> None:
    """Seed everything, or go on from the newest checkpoint that verifies."""
    path, skipped = newest(trainer) if resume else (None, [])
    for line in skipped:
        say("skipped a damaged checkpoint: {line}", line=line)
    if skipped and path is None:
        raise RunError([t("no checkpoint of {path} is whole", path=trainer.run.path), *skipped])
    if path is None:
        trainer.method.begin(trainer.model, trainer.course.total_steps)
        trainer.many.seed(trainer.options.seed)
        if resume:
            trainer.run.rewind(0)
        return
    state = trainer.parts.load(path)
    machine = machine_facts(trainer.course.processes)
    agree(path, state.facts, trainer.course.fingerprint(), machine, allow_changes)
    put(trainer, path, state)
    trainer.course.left_out = {row["id"] for row in trainer.guard.rows}
    say("going on from {path}", path=path)


def newest(trainer: Trainer) -> tuple[Path | None, list[str]]:
    """What ``checkpoint.newest`` finds in the first process."""
    return trainer.many.ranks.told(lambda: checkpoint.newest(trainer.run.checkpoints))


def check_room(trainer: Trainer) -> int:
    """The bytes that the run's checkpoints and its result will take beside what is there already; RunError if the disk
    has fewer."""
    parts, tested = trainer.parts.saved_bytes(trainer.options.optimizer), bool(trainer.validation or trainer.evaluators)
    needed = Room.of(trainer.course, trainer.options, tested, *parts, result_bytes(trainer.model, trainer.method))
    return trainer.many.ranks.told(lambda: room.check(trainer.run, needed))


def put(trainer: Trainer, path: Path, state: checkpoint.State) -> None:
    """Make everything as it was in ``state``, which is used up."""
    facts = state.facts
    same = facts["started_with"]["optimizer"] == trainer.options.optimizer
    trainer.method.begin(trainer.model, trainer.course.total_steps)
    trainer.parts.put(state, str(path), moments=same, seed=trainer.options.seed)
    trainer.step, trainer.best, trainer.pending = state.step, facts["best"], facts["pending_evaluation"]
    trainer.guard = Guard.of(facts["guard"])
    trainer.weights_norm = trainer.parts.norm()
    trainer.run.rewind(trainer.step)


def agree(
    path: Path, facts: Mapping[str, Any], fingerprint: Mapping[str, Any], here: Mapping[str, Any], allow_changes: bool
) -> None:
    """InputError naming everything that is not as it was, or words if that is allowed; a word if bits may differ."""
    then, now = facts["started_with"], json.loads(json.dumps(fingerprint))
    message = "{path}: was made with {key}={then}, and now it is {now}"
    changed = [
        t(message, path=path, key=key, then=then.get(key), now=now[key]) for key in now if now[key] != then.get(key)
    ]
    if changed and not allow_changes:
        raise InputError(
            [*changed, t("--allow-changes goes on all the same; the result is then that of neither recipe")]
        )
    for line in changed:
        say("changed: {line}", line=line)
    before = {"processes": 1} | facts["machine"]
    if other := [f"{name} {before.get(name)} → {here[name]}" for name in here if before.get(name) != here[name]]:
        say("not as before: {differences}; the last bits may differ", differences=", ".join(other))


def recover(trainer: Trainer, step: int, poisoned: bool = False) -> bool:
    """Go back to the newest checkpoint and on without the rows at fault; whether the run is where it was, because there
    is no checkpoint yet and nothing has changed since the last good step.

    ``poisoned``: the weights or the optimiser's state after ``step`` hold what is no number. Once that may be the
    machine's memory; rows that are sound by themselves are left out only where the same step does it again, and none
    where only the state is bad: that is seen when it is saved, whichever step it came from. RunError where there is
    nothing to go back to, where going back has not helped, and where the options say stop.
    """
    trainer.optimizer.zero_grad(set_to_none=True)
    former, hidden = replace(trainer.guard), poisoned and not _broken(trainer)
    suspects = {} if hidden else _suspects(trainer, step, poisoned)
    path, _ = newest(trainer)
    hopeless = path is None and (poisoned or _broken(trainer))
    if path is not None:
        put(trainer, path, trainer.parts.load(path))
    guilty = {} if hopeless else {key: found for key, found in suspects.items() if _faulty(trainer, found[0])}
    again = trainer.guard.went_back(step, trainer.step if path else 0, former, 0 < len(guilty) < len(suspects))
    bad = [entry for entry in former.skipped if path is None or entry["step"] > trainer.step]
    trainer.run.log({"step": trainer.step, "returned_from": step, "skipped": bad})
    message = "{count} steps in a row (the last is {step}) had a loss, gradient or weights not finite, or leaping"
    why = t(message, count=max(former.streak, 1), step=step)
    innocent = poisoned and not guilty and former.returned_from != step
    _leave_out(trainer, {} if innocent and not hopeless else guilty or suspects, why, ends=hopeless or not again)
    say("after step {step}: going on from step {to}", step=step, to=trainer.step)
    return path is None


def lost(trainer: Trainer) -> bool:
    """Whether the weights hold what is no number and there is a checkpoint that has better ones."""
    there = trainer.many.ranks.told(lambda: checkpoint.listed(trainer.run.checkpoints))
    return bool(there) and _broken(trainer)


def _broken(trainer: Trainer) -> bool:
    """Whether the weights hold what is no number, in any process."""
    return trainer.many.ranks.any(not math.isfinite(trainer.parts.norm().item()))


def drop(trainer: Trainer, rows: Sequence[Example]) -> bool:
    """Leave out those of the ``rows`` of a bad step that are bad by themselves; whether there are any, and others that
    are not. Where the options say stop, none is left out before steps stay bad."""
    if trainer.options.bad_rows == "stop":
        return False
    entry = trainer.guard.skipped[-1]
    guilty = {trainer.course.key(row): (row, entry) for row in rows if _faulty(trainer, row)}
    if not 0 < len(guilty) < len(rows):
        return False
    _leave_out(trainer, guilty)
    return True


def _leave_out(
    trainer: Trainer, rows: Mapping[str, tuple[Example, Mapping[str, Any]]], why: str = "", ends: bool = False
) -> None:
    """Go on without ``rows``, which are written to ``bad_rows.jsonl``; RunError if the run ``ends`` here, if no row is
    left, or if the options say so."""
    if not rows and not ends:
        return
    if not rows:
        raise RunError(t("{why}. A lower train.learning_rate, or model.dtype=float32, may help", why=why))
    for key, (example, entry) in rows.items():
        text = {"text": trainer.words(example)} if trainer.words else {}
        trainer.guard.rows.append({"id": key, **entry, **text})
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in trainer.guard.rows)
    values = {"file": trainer.run.write(BAD_ROWS, "".join(lines)), "rows": _listed(rows)}
    trainer.course.left_out = {row["id"] for row in trainer.guard.rows}
    stops = trainer.options.bad_rows == "stop"
    if not (ends or stops) and trainer.course.rows_left():
        say("left out from here on: {count} rows ({file} has their text): {rows}", count=len(rows), **values)
        return
    message = (
        "{why}; rows: {rows} ({file} has their text). A lower train.learning_rate, or model.dtype=float32, may help"
    )
    go_on = [t("train.bad_rows=skip goes on without these rows")] if stops else []
    raise RunError([t(message, why=why, **values), *go_on])


def _suspects(trainer: Trainer, step: int, poisoned: bool) -> dict[str, tuple[Example, dict[str, Any]]]:
    """The rows of the last bad steps, and what was bad about each of those."""
    skipped = trainer.guard.skipped
    bad = skipped[len(skipped) - trainer.guard.streak :]
    if poisoned:
        bad = [*bad, {"step": step, "fault": NOT_A_NUMBER}]
    course = trainer.course
    return {
        course.key(example): (example, entry)
        for entry in bad
        for batch in course.micro_batches(entry["step"])
        for example in batch
    }


def _faulty(trainer: Trainer, example: Example) -> bool:
    """Whether a row by itself has a loss or a gradient that the guard would not let pass; draws no random number."""
    before = checkpoint.random_state()
    loss, norm, _ = trainer.gradient([[example]])
    trainer.optimizer.zero_grad(set_to_none=True)
    checkpoint.set_random_state(before)
    most, longest = trainer.guard.limits()
    return not (math.isfinite(loss) and math.isfinite(norm)) or loss > most or norm > longest


def _listed(rows: Iterable[str]) -> str:
    names = list(rows)
    return ", ".join(names[:SHOWN_ROWS]) + (" …" if len(names) > SHOWN_ROWS else "")
