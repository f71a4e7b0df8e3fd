"""A measure of your own: a function in a Python file, called with each answer.

    # mine.py
    def polite(case):                           # weitiao eval runs/first --task mine.py:polite --data test.jsonl
        return "您" in case["predicted"]         # a number or a bool, or several by name: {"polite": 1, "length": 9}

``case`` holds ``id``, ``turn``, ``messages`` (as in OpenAI's API), ``gold`` and ``predicted`` (texts), ``gold_calls``
and ``predicted_calls``. NaN or None: the case does not count. The file is yours, named by you on the command
line; no recipe and no run folder can name one.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.data.endpoint import Endpoint
from weitiao.data.messages import as_dicts
from weitiao.errors import InputError, RunError, t
from weitiao.evaluate.ask import ask, conversations, draw_shots, questions
from weitiao.evaluate.bootstrap import mean
from weitiao.evaluate.generative import without_thought
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation, figures_of

if TYPE_CHECKING:
    from weitiao.methods.io import Tuned


def task(tuned: Tuned | Endpoint, options: EvaluateOptions) -> Evaluation:
    """The mean of what the function says of each answer to a file of conversations."""
    file, _, name = options.task.rpartition(":")
    function = load(Path(file), name)
    asked = questions(conversations(options.data))
    replies, cost = ask(tuned, asked, options, draw_shots(options))
    lines, values = [], list[dict[str, float]]()
    for one, reply in zip(asked, replies, strict=True):
        case = {
            "id": one.id,
            "turn": one.turn,
            "messages": as_dicts(one.messages),
            "gold": one.gold.content,
            "predicted": without_thought(reply.content),
            "gold_calls": [{"name": call.name, "arguments": dict(call.arguments)} for call in one.gold.calls],
            "predicted_calls": [{"name": call.name, "arguments": dict(call.arguments)} for call in reply.calls],
        }
        values.append(_numbers(function, case, f"{options.task}: {one.id}"))
        lines.append({key: case[key] for key in ("id", "turn", "gold", "predicted")} | {"values": values[-1]})
    names = dict.fromkeys(name for found in values for name in found)
    made = {name: mean([found.get(name, math.nan) for found in values]) for name in names}
    groups = [one.id for one in asked]
    return Evaluation(figures_of(made, groups, options), lines, made, groups, [one.asked for one in asked], cost=cost)


def load(file: Path, name: str) -> Callable[[Mapping[str, Any]], Any]:
    """The function ``name`` of a Python file; InputError where there is none, or the file cannot be run."""
    if not file.is_file():
        raise InputError(t("{path}: no such file", path=file))
    spec = importlib.util.spec_from_file_location(f"weitiao_custom_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(t("{path}: cannot be read as Python", path=file))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the person's file raises is theirs to hear
        kind = type(error).__name__
        raise InputError(t("{path}: {kind}: {problem}", path=file, kind=kind, problem=error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(t("{path}: has no function {name}", path=file, name=name))
    return function


def _numbers(function: Callable[[Mapping[str, Any]], Any], case: Mapping[str, Any], where: str) -> dict[str, float]:
    """What the function says of one case, as numbers by name."""
    try:
        found = function(case)
    except Exception as error:
        kind = type(error).__name__
        raise RunError(t("{path}: {kind}: {problem}", path=where, kind=kind, problem=error)) from error
    found = found if isinstance(found, Mapping) else {getattr(function, "__name__", "value"): found}
    numbers = {}
    for name, value in found.items():
        if value is not None and not isinstance(value, bool | int | float):
            message = "{where}: expected a number, or numbers by name, found {found}"
            raise InputError(t(message, where=where, found=repr(value)[:80]))
        numbers[str(name)] = math.nan if value is None else float(value)
    return numbers
