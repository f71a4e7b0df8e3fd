"""A run that goes on with another recipe than it was begun with: what differs, and what of that does no harm.

agree(run, recipe.model_dump(mode="json"), allowed=False)      # words for each difference; InputError if one does harm
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weitiao.errors import InputError, say, t
from weitiao.runs import Run

# What says how a step is computed, what is kept of it or what is measured afterwards, and not what is learnt in it.
HARMLESS = ("evaluate", "data.test", "train.keep", "train.save_every", "train.evaluate_every",
            "train.paged_optimizer", "train.trunk", "train.memory", "train.bad_rows",
            "train.distributed", "train.process_timeout")  # fmt: skip


def agree(run: Run, now: Mapping[str, Any], allowed: bool) -> None:
    """Say where ``now`` differs from the recipe that ``run`` was begun with: that of its newest checkpoint or, before
    the first, of its folder. InputError names what would change what is learnt, unless that is ``allowed``."""
    from weitiao.train import checkpoint

    path, _ = checkpoint.newest(run.checkpoints)
    then = (checkpoint.facts(path).get("recipe") if path else None) or run.recipe()
    differences = list(changes(_moved(then, now), now, without="output"))
    message = "{key}: was {then}, is now {now}"
    lines = [t(message, key=key, then=_shown(old), now=_shown(new)) for key, old, new in differences]
    harm = [line for line, (key, _, _) in zip(lines, differences, strict=True) if not harmless(key)]
    if harm and path is not None and not allowed:
        again = t("--allow-changes goes on all the same; the result is then that of neither recipe")
        raise InputError([*harm, again])
    for line in lines:
        say("changed: {line}", line=line)


def changes(then: Mapping[str, Any], now: Mapping[str, Any], without: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Options that differ between two recipes as plain JSON, but the section ``without``: ``(key, then, now)``. An
    option that one of them does not know is none: another version of this program wrote it, or another method has it,
    whose name differs."""
    for section in (name for name in then if name in now and name != without):
        old, new = then[section], now[section]
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            old, new, prefix = {section: old}, {section: new}, ""
        else:
            prefix = f"{section}."
        yield from ((prefix + name, old[name], new[name]) for name in new if name in old and old[name] != new[name])


def harmless(key: str) -> bool:
    """Whether a run may go on with another value of the option ``key``."""
    return any(key == name or key.startswith(f"{name}.") for name in HARMLESS)


def _moved(then: Any, now: Mapping[str, Any]) -> Any:
    """``then`` with paths below its run folder put below that of ``now``: a folder may be moved, and be named from
    elsewhere."""
    old, new = then.get("output"), now["output"]

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: moved(inner) for name, inner in value.items()}
        below = isinstance(value, str) and isinstance(old, str) and value.startswith(f"{old}/")
        return f"{new}{value[len(old) :]}" if below else value

    return moved(then)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
