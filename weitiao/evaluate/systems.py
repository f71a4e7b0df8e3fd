"""What is compared, and each measured: the base as it is, with examples, told to think first; runs; models elsewhere.

    comparison = compare(["runs/first"], EvaluateOptions(task="generate", data="test.jsonl", shot_data="train.jsonl"))
    comparison.systems["base_few_shot"].figures["exact_match"]

How many examples are given is chosen on rows of ``shot_data`` that are no examples, and fixed before any test row is
answered. One model is held at a time.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weitiao.data.endpoint import Endpoint
from weitiao.data.formats import Unreadable, format_of, records
from weitiao.data.rows import Row
from weitiao.errors import InputError, say, t
from weitiao.evaluate.ask import conversations
from weitiao.evaluate.bootstrap import Resampling
from weitiao.evaluate.endpoint import open_system
from weitiao.evaluate.forgetting import Kept, general, kept
from weitiao.evaluate.tasks import TASKS, EvaluateOptions, Evaluation, evaluate
from weitiao.runs import write_atomic

ZERO, FEW, THOUGHTS = "base_zero_shot", "base_few_shot", "base_thoughts"
TRIED_ROWS = 40  # on which the number of examples is chosen
TAKES_SHOTS = ("generate", "dialogue", "judge", "choice")
HEADED = ("classify",)  # tasks that a base without a head cannot be measured by


@dataclass(frozen=True)
class Comparison:
    """Every system's evaluation by its key (``base_…`` or the model's name), what there is to know about each
    (``notes``), the measure that matters most, and what each model kept of general text."""

    options: EvaluateOptions
    base: str
    first: str
    systems: dict[str, Evaluation]
    notes: dict[str, str] = field(default_factory=dict)
    forgetting: dict[str, dict[str, Kept]] = field(default_factory=dict)

    @property
    def resampling(self) -> Resampling:
        """The draws that all systems share."""
        return Resampling(next(iter(self.systems.values())).groups, self.options.samples, self.options.seed)


def compare(
    models: Sequence[str],
    options: EvaluateOptions,
    base: str | None = None,
    *,
    shots: Sequence[int] = (1, 2, 4),
    thoughts: bool = True,
    forgetting: bool = True,
    texts: Sequence[str] = (),
    generators: Mapping[str, Callable[[int], Iterable[Row]]] | None = None,
    cache: Path | None = None,
) -> Comparison:
    """Measure ``models`` (runs, folders, names, URL#MODEL) and the base that the first was tuned from (or ``base``) on
    the same rows. ``texts`` are further files, or generate:NAME, on which it is measured what was forgotten.

    InputError: no base to compare with, or data that cannot be used.
    """
    _check(models, options, shots)
    parts = general(texts, generators or {}, options.seed) if forgetting else {}
    systems, after, before = {}, dict[str, Any](), dict[str, Any]()
    for name in models:
        say("measuring {name}", name=name)
        opened = open_system(name, cache)
        systems[name] = evaluate(opened, options)
        if not isinstance(opened, Endpoint):
            after[name] = {part: kept(opened, rows) for part, rows in parts.items()}
            base = base or (opened.base if opened.base not in ("", name) else None)
        del opened
    if base is None and options.task not in HEADED:
        raise InputError(
            t("--base: name the model to compare with; {model} does not tell what it was tuned from", model=models[0])
        )
    notes: dict[str, str] = {}
    if base is not None and options.task not in HEADED:
        opened = open_system(base, cache)
        before = {part: kept(opened, rows) for part, rows in parts.items()} if after else {}
        own = {}
        for key, evaluation, note in _prompted(opened, options, shots, thoughts):
            own[key], notes[key] = evaluation, note
        systems = own | systems
    forgotten = {name: {part: Kept(before[part], found[part]) for part in before} for name, found in after.items()}
    first = next(iter(next(iter(systems.values())).measures))
    return Comparison(options, base or "", first, systems, notes, forgotten if before else {})


def _check(models: Sequence[str], options: EvaluateOptions, shots: Sequence[int]) -> None:
    """Everything that is wrong with what was asked for, before any model is opened."""
    problems = [t("{name}: named twice", name=name) for name in dict.fromkeys(models) if models.count(name) > 1]
    problems += [t("{name}: is the key of one of the base's own rows; write ./{name}", name=name)
                 for name in models if name in (ZERO, FEW, THOUGHTS)]  # fmt: skip
    problems += [t("{path}: no such file", path=path) for path in (options.data, options.shot_data)
                 if path is not None and options.task != "lm-eval" and not Path(path).exists()]  # fmt: skip
    if not problems and options.shot_data and Path(options.shot_data).resolve() == Path(options.data).resolve():
        problems.append(t("shot_data: {path} is what is measured on; examples must be others", path=options.data))
    if min(shots, default=1) < 1:
        problems.append(t("--shots: numbers of at least 1, found {found}", found=", ".join(map(str, shots))))
    if options.shot_data and options.task in TASKS and options.task not in TAKES_SHOTS:
        problems.append(t("--shot-data: task {task} takes no examples", task=options.task))
    if problems:
        raise InputError(problems)


def _prompted(
    base: Any, options: EvaluateOptions, shots: Sequence[int], thoughts: bool
) -> Iterator[tuple[str, Evaluation, str]]:
    """The base's evaluations one by one: key, evaluation, what there is to know about it."""
    say("measuring {name}", name=t(LABELS[ZERO]))
    yield ZERO, evaluate(base, options.model_copy(update={"shots": 0, "shot_data": None})), ""
    custom = options.task not in TASKS
    if options.shot_data and shots and (custom or options.task in TAKES_SHOTS):
        say("measuring {name}", name=t(LABELS[FEW]))
        with tempfile.TemporaryDirectory(prefix="weitiao-") as scratch:
            count, note, pool = choose_shots(base, options, shots, Path(scratch))
            yield FEW, evaluate(base, options.model_copy(update={"shots": count, "shot_data": pool})), note
    if thoughts and (custom or options.task in ("generate", "dialogue", "judge")):
        say("measuring {name}", name=t(LABELS[THOUGHTS]))
        yield THOUGHTS, evaluate(base, options.model_copy(update={"thoughts": True, "shots": 0})), ""


def choose_shots(base: Any, options: EvaluateOptions, candidates: Sequence[int], folder: Path) -> tuple[int, str, str]:
    """The number of examples that does best on rows of ``shot_data`` that are none, the fewest of equals; a sentence
    that says so; and a file in ``folder`` of the rows that examples come from."""
    source = Path(options.shot_data or "")
    found = [record for _, record in records(source, format_of(source)) if not isinstance(record, Unreadable)]
    if options.task != "choice":
        conversations(str(source))  # what is wrong with them is said with their own lines
    random.Random(options.seed).shuffle(found)
    tried = min(TRIED_ROWS, len(found) // 2)
    candidates = sorted({min(count, len(found) - tried) for count in candidates})
    pool, trial = folder / "examples.jsonl", folder / "trial.jsonl"
    for path, part in ((trial, found[:tried]), (pool, found[tried:])):
        write_atomic(path, "".join(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in part))
    if len(candidates) == 1 or not tried:
        count = candidates[0]
        return count, t("{count} examples from {path}", count=count, path=source), str(pool)
    scores = {}
    for count in candidates:
        update = {"data": str(trial), "shots": count, "shot_data": str(pool), "samples": 1}
        measure = next(iter(evaluate(base, options.model_copy(update=update)).measures.values()))
        scores[count] = measure.value if measure.higher else -measure.value
    best = max(scores, key=lambda count: (scores[count], -count))
    shown = ", ".join(f"{count}: {abs(score):.3f}" for count, score in scores.items())
    message = "{count} examples from {path}, chosen on {rows} other rows of it ({scores})"
    return best, t(message, count=best, path=source, rows=tried, scores=shown), str(pool)


LABELS = {ZERO: "base, zero-shot", FEW: "base, with examples", THOUGHTS: "base, thinking first"}
