"""What other commands will need once a run is done: merging its adapter, and answering with it.

phases = later(shape, method, "bfloat16", facts, file_bytes=0, answers=Answers(clients=4, context=2048))
"""

from __future__ import annotations

from dataclasses import dataclass

from weitiao.methods.base import Method
from weitiao.models.shape import Shape
from weitiao.plan.need import ITEM_BYTES, Facts, Phase, placed

FLOAT_BYTES = 4
ANSWER_TOKENS = 512  # chat's own limit


@dataclass(frozen=True)
class Answers:
    """How a model is to answer: so many ``clients`` at once, each with ``context`` tokens of prompt and answer (0: the
    longest row and an answer)."""

    clients: int = 1
    context: int = 0


ONE = Answers()


def later(
    shape: Shape, method: Method, dtype: str, facts: Facts, weights: int, file_bytes: int, answers: Answers
) -> list[Phase]:
    """The phases behind the run, each in a process of its own; ``weights`` are those that a run holds."""
    found = []
    if method.saves == "adapter":
        stored = merged_size(shape, file_bytes)
        found.append(placed("merge", merge_bytes(shape, method, stored), stored, facts, 0))
    rounded = weights if method.saves == "adapter" else shape.parameters * ITEM_BYTES[dtype]
    needed = rounded + cache_bytes(shape, dtype, answers) + answers.clients * shape.vocab * FLOAT_BYTES
    return [*found, placed("generate", needed, 0, facts, 0)]


def merge_bytes(shape: Shape, method: Method, stored: int) -> int:
    """The tuned model in float32 and, once it is written in ``stored`` bytes, that again, to be compared. Pages of
    a file that is not float32 stay mapped until all of it is converted."""
    whole = FLOAT_BYTES * shape.parameters
    added = FLOAT_BYTES * method.count(shape)
    converted = 0 if stored >= whole * 3 // 4 else stored
    return 2 * whole + added + converted


def merged_size(shape: Shape, file_bytes: int) -> int:
    """What the merged model takes on disk: as much as its base."""
    return file_bytes or FLOAT_BYTES * shape.parameters


def cache_bytes(shape: Shape, dtype: str, answers: Answers) -> int:
    """Keys and values of every client's tokens; a recurrence keeps a state instead, which is small."""
    if shape.attention == "recurrent":
        return answers.clients * shape.layers * 5 * shape.hidden * FLOAT_BYTES
    each = 2 * shape.layers * shape.kv_heads * shape.head_dim * ITEM_BYTES[dtype]
    return answers.clients * answers.context * each
