"""Forgetting: the loss on text and instructions that tuning never saw, before it and after it.

    parts = general(["heldout.jsonl"], {}, seed=0)          # the project's own text, zh and en, and a file
    before = {name: kept(base, rows) for name, rows in parts.items()}
    Kept(before["text, en"], kept(tuned, parts["text, en"])).change(resampling)

Measured in bits per byte, which does not depend on the tokenizer, with a paired interval over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from typing import Any

from weitiao.config import build
from weitiao.data.rows import Chat, Message, Row, Text
from weitiao.data.sources import GENERATE, DataOptions, read
from weitiao.errors import InputError, say, t
from weitiao.evaluate.bootstrap import Figure, Measure, Resampling
from weitiao.evaluate.perplexity import measured, measures

THRESHOLD = 0.05  # of the bits per byte that it had: a rise that is worth a warning
MOST_ROWS = 200  # of a file or a generator
OTHER_SEED = 7919  # a generator's rows for this are not those that the base was made from


@dataclass(frozen=True)
class Kept:
    """Bits per byte of the same rows before and after, a row a case."""

    before: Measure
    after: Measure

    def change(self, samples: int = 1000, seed: int = 0) -> Figure:
        """After less before: above 0 something was forgotten."""
        names = [str(row) for row in range(len(self.before.counts))]
        return Resampling(names, samples, seed).difference(self.after, self.before)

    def forgotten(self, samples: int = 1000, seed: int = 0) -> bool:
        """Whether the rise is beyond ``THRESHOLD`` and beyond chance."""
        change = self.change(samples, seed)
        return change.low > 0 and change.value > THRESHOLD * self.before.value


def general(
    texts: Sequence[str], generators: Mapping[str, Callable[[int], Iterable[Row]]], seed: int
) -> dict[str, list[Row]]:
    """Rows by the name of their part: the project's own, and those of files and generators. InputError names every
    file that cannot be used."""
    parts, problems = dict(_own()), []
    for name in texts:
        try:
            parts[name] = _rows(name, generators, seed)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return parts


def _rows(name: str, generators: Mapping[str, Callable[[int], Iterable[Row]]], seed: int) -> list[Row]:
    if not name.startswith(GENERATE):
        source = read(name, build(DataOptions, {}))
        if len(source.rows) > MOST_ROWS:
            say(
                "{path}: the first {count} of {rows} rows are measured",
                path=name,
                count=MOST_ROWS,
                rows=len(source.rows),
            )
        return source.rows[:MOST_ROWS]
    generator = generators.get(name.removeprefix(GENERATE))
    if generator is None:
        known = ", ".join(f"{GENERATE}{known}" for known in generators) or t("none")
        raise InputError(t("{name}: no such generator; known: {known}", name=name, known=known))
    return list(islice(generator(seed + OTHER_SEED), MOST_ROWS))


@cache
def _own() -> dict[str, list[Row]]:
    """The project's own text and instructions, ``general.yaml`` beside this file."""
    import yaml

    found = yaml.safe_load((files("weitiao.evaluate") / "general.yaml").read_text(encoding="utf-8"))
    parts: dict[str, list[Row]] = {}
    for language in ("zh", "en"):
        texts, pairs = found["text"][language], found["instructions"][language]
        parts[f"text, {language}"] = [Text(text, id=f"{language}-{n}") for n, text in enumerate(texts)]
        parts[f"instructions, {language}"] = [
            Chat((Message("user", asked), Message("assistant", said)), id=f"{language}-{n}")
            for n, (asked, said) in enumerate(pairs)
        ]
    return parts


def kept(tuned: Any, rows: Sequence[Row]) -> Measure:
    """Bits per byte of ``rows`` under a model, a row an example."""
    examples, losses = measured(tuned, rows)
    return measures(losses, examples, tuned.tokenizer)["bits_per_byte"]
