"""Labelled texts to training examples: which labels there are, and a text's tokens with its class, classes or number.

head = head_of(rows, (), "auto", None)                     # Head(labels=("差", "好"), kind="single")
examples = labelled(rows, tokenizer, head, data, max_positions=512)
examples[0].labels                                         # int64 [], float32 [labels], or float32 []
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weitiao.data.batch import Example
from weitiao.data.examples import Examples
from weitiao.data.rows import Labelled
from weitiao.errors import InputError, first_of, t
from weitiao.models.heads import Head, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from weitiao.data.sources import DataOptions

NUMBER = "value"  # the one label of a regression


def head_of(rows: Sequence[Any], labels: Sequence[str], kind: Literal["auto"] | Kind, base: Head | None = None) -> Head:
    """The head that ``rows`` need: ``labels`` in their order, or the base's own, or those of the rows, sorted. ``auto``
    takes lists for several classes, numbers with a point for a regression, and anything else for one class.

    InputError for rows that are no labelled texts, or of different kinds, and for a single class.
    """
    _check_rows(rows)
    kinds: set[Kind] = {_kind(row.label) for row in rows}
    if kind == "auto" and len(kinds) > 1:
        message = "labels of different kinds ({kinds}); say which is meant with task.kind"
        raise InputError(t(message, kinds=", ".join(sorted(kinds))))
    found: Kind = next(iter(kinds)) if kind == "auto" else kind
    if found == "regression":
        return Head((NUMBER,), found)
    if base is not None and not labels and base.kind == found:
        return base
    seen = {label for row in rows for label in _names(row.label)}
    names = tuple(labels) or tuple(
        sorted(seen, key=lambda name: (not name.isdigit(), len(name) * name.isdigit(), name))
    )
    if found == "single" and len(names) < 2:
        message = "every row has the same label ({labels}); there is nothing to tell apart"
        raise InputError(t(message, labels=", ".join(names)))
    return Head(names, found)


def labelled(
    rows: Sequence[Any],
    tokenizer: PreTrainedTokenizerFast,
    head: Head,
    options: DataOptions,
    max_positions: int | None,
) -> Examples:
    """Every row as its tokens, with the tokenizer's own special ones, and its label; what is longer than the model or
    ``data.max_length`` takes loses its end.

    InputError, every problem at once: labels that the head does not have, and more than ``options.allow_truncated`` of
    the texts cut.
    """
    _check_rows(rows)
    limit = max_positions if options.max_length == "auto" else options.max_length
    if limit is not None and max_positions is not None and limit > max_positions:
        message = "data.max_length: {length} is more than the {most} positions of the model"
        raise InputError(t(message, length=limit, most=max_positions))
    items, problems, cut = [], [], []
    for row in rows:
        ids: Any = tokenizer(row.text, verbose=False)["input_ids"]
        if limit is not None and len(ids) > limit:
            cut.append(t("{row}: {tokens} tokens, and max_length is {limit}", row=row.id, tokens=len(ids), limit=limit))
            ids = tokenizer(row.text, truncation=True, max_length=limit, verbose=False)["input_ids"]
        try:
            target = _target(row.label, head)
        except ValueError as error:
            problems.append(f"{row.id}: {error}")
            continue
        if ids:
            items.append(Example(np.array(ids, dtype=np.int32), _last(len(ids)), row.id, target))
        else:
            problems.append(t("{row}: the tokenizer makes no token of it", row=row.id))
    refused, problems = len(problems), [] if options.skip_bad and items else first_of(problems)
    if len(cut) > options.allow_truncated * len(rows):
        message = (
            "the end is cut in {cut} of {total} texts: {limit} tokens fit (max_length), and data.allow_truncated is "
            "{allowed}; raise data.max_length, or allow it"
        )
        problems.append(t(message, cut=len(cut), total=len(rows), limit=limit, allowed=options.allow_truncated))
        problems += first_of(cut)
    if problems:
        raise InputError(problems)
    said = [t("max_length {limit} cuts the end of {cut} texts", cut=len(cut), limit=limit)] if cut else []
    if refused:
        said.append(t("{rows} rows left out (skip_bad): their labels cannot be used", rows=refused))
    return Examples(items, len(rows), len(cut), refused, said)


def _check_rows(rows: Sequence[Any]) -> None:
    if wrong := next((row for row in rows if not isinstance(row, Labelled)), None):
        message = "{where}: has no label; task classify needs a text and a label (data.columns names their columns)"
        raise InputError(t(message, where=wrong.id))


def _kind(label: str | float | tuple[str, ...]) -> Kind:
    if isinstance(label, tuple):
        return "multi"
    return "regression" if isinstance(label, float) else "single"


def _names(label: str | float | tuple[str, ...]) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (str(label),)


def _last(length: int) -> np.ndarray:
    """The mask of a labelled text: what is learnt is learnt at its last token."""
    mask = np.zeros(length, dtype=bool)
    mask[-1] = True
    return mask


def _target(label: str | float | tuple[str, ...], head: Head) -> np.ndarray:
    """The class's number, a mark for each class, or the number; ValueError says why there is none."""
    if head.kind == "regression":
        try:
            return np.array(float(label), dtype=np.float32)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(t("the label {label} is no number", label=label)) from None
    names = _names(label)
    numbers = [_number(name, head) for name in names]
    if head.kind == "multi":
        marks = np.zeros(len(head.labels), dtype=np.float32)
        marks[numbers] = 1
        return marks
    if len(numbers) != 1:
        raise ValueError(t("{count} labels; exactly one is right (task.kind=multi takes any number)", count=len(names)))
    return np.array(numbers[0], dtype=np.int64)


def _number(name: str, head: Head) -> int:
    """The place of a label; where the rows have numbers and ``task.labels`` names, the number itself."""
    if name in head.labels:
        return head.labels.index(name)
    if name.isdigit() and int(name) < len(head.labels) and not any(label.isdigit() for label in head.labels):
        return int(name)
    raise ValueError(t('no label "{name}" ({labels})', name=name, labels=", ".join(head.labels)))
