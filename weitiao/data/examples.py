"""Rows to training examples, and everything that would make training on them a lie said before the first step.

train = examples(splits.train, renderer, options.data, "sft", max_positions=2048)
train[0].ids, train.truncated, train.trained_tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard, overload

import numpy as np

from weitiao.data.batch import Example
from weitiao.data.rows import Chat, Row, Text
from weitiao.data.spans import Rendered, encode_text
from weitiao.errors import InputError, first_of, t

if TYPE_CHECKING:
    from weitiao.data.render import Renderer
    from weitiao.data.sources import DataOptions

ROWS_AT_ONCE = 256
SHOWN = 5  # rows left out that a notice names


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """The examples, and what was counted: ``rows`` read, answers ``truncated``, examples left out because nothing in
    them is trained (``masked_out``), ``tokens`` and ``trained_tokens`` of what is here. ``said``: what a person should
    be told."""

    items: list[Example]
    rows: int = 0
    truncated: int = 0
    masked_out: int = 0
    said: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(map(len, self.items))

    @property
    def trained_tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(example.trained_tokens for example in self.items)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every example."""
        return [len(example) for example in self.items]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self.items[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass
class _Work:
    """What goes wrong on the way, by kind, and the examples so far."""

    items: list[Example] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    several: int = 0
    words_lost: int = 0


def examples(
    rows: Sequence[Row],
    renderer: Renderer,
    options: DataOptions,
    task: str = "sft",
    *,
    max_positions: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """Every row as one example or more.

    ``sft`` takes conversations and trains what ``options.train_on`` says; ``pretrain`` takes texts or conversations and
    trains all of them, and cuts a long one into several examples instead of losing its end. ``max_positions``: what the
    model can take; the tokenizer's own limit if it is not given. ``progress`` is called with (rows done, all rows).

    InputError, every problem at once: rows that the template refuses; rows in which nothing is trained (both are left
    out, and counted, under ``options.skip_bad``); more than ``options.allow_truncated`` of the answers cut.
    """
    work, limit = _Work(), _limit(renderer, options, max_positions)
    train_on = "all" if task == "pretrain" else options.train_on
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        for place, made in zip(range(start, start + len(some)), _rendered(some, renderer, train_on), strict=True):
            name = rows[place].id or t("row {number}", number=place + 1)
            if isinstance(made, InputError):
                work.refused += [f"{name}: {problem}" for problem in made.problems]
            else:
                _add(work, name, made, limit, task)
                work.words_lost += _mixed(row := rows[place]) and renderer.left_out(row)
        if progress:
            progress(start + len(some), len(rows))
    if renderer.folds_system and any(map(_has_system, rows)):
        system = [t("the chat template has no system turn; its text is put before the first question")]
    else:
        system = []
    _complain(work, options, limit)
    return Examples(work.items, len(rows), len(work.cut), len(work.empty), system + _said(work, limit))


def _rendered(rows: Sequence[Row], renderer: Renderer, train_on: str) -> list[list[Rendered] | InputError]:
    """Every row as tokens, in order."""
    chats = iter(renderer.renders([row for row in rows if isinstance(row, Chat)], train_on))
    found: list[list[Rendered] | InputError] = []
    for row in rows:
        if isinstance(row, Chat):
            found.append(next(chats))
        elif isinstance(row, Text) and train_on == "all":
            found.append([encode_text(renderer.tokenizer, row.text)])
        else:
            kind = type(row).__name__
            found.append(InputError(t("a row of type {kind} has no assistant turn to train on", kind=kind)))
    return found


@dataclass(frozen=True)
class _Limit:
    """``tokens`` that an example may have, or None for any number; ``reason`` and ``mend`` are messages: what sets the
    limit, and what to do where it is too low."""

    tokens: int | None
    reason: str = "the model's positions"
    mend: str = "take a base with more of them, shorten the rows, or allow it"

    @property
    def said(self) -> dict[str, object]:
        """The slots of a message about it."""
        return {"limit": self.tokens, "reason": t(self.reason)}


def _limit(renderer: Renderer, options: DataOptions, max_positions: int | None) -> _Limit:
    """What bounds an example; InputError for a ``max_length`` beyond the model."""
    if options.max_length == "auto":
        tokenizer_limit = renderer.tokenizer.model_max_length
        return _Limit(max_positions or (tokenizer_limit if tokenizer_limit < 1e9 else None))
    if max_positions is not None and options.max_length > max_positions:
        message = "data.max_length: {length} is more than the {most} positions of the model"
        raise InputError(t(message, length=options.max_length, most=max_positions))
    return _Limit(options.max_length, "data.max_length", "raise data.max_length, or allow it")


def _add(work: _Work, name: str, made: Sequence[Rendered], limit: _Limit, task: str) -> None:
    work.several += len(made) > 1
    if not made:
        work.empty.append(t("{row}: no token is trained (there is no assistant turn to train on)", row=name))
    for number, rendered in enumerate(made, 1):
        own = f"{name}#{number}" if len(made) > 1 else name
        ids, mask = np.array(rendered.ids, dtype=np.int32), np.array(rendered.mask, dtype=bool)
        if task == "pretrain" and limit.tokens is not None and len(ids) > limit.tokens:
            parts = -(-len(ids) // limit.tokens)
            pairs = zip(np.array_split(ids, parts), np.array_split(mask, parts), strict=True)
            work.items += [Example(*pair, f"{own}:{part}") for part, pair in enumerate(pairs, 1)]
            continue
        example = Example(ids[: limit.tokens], mask[: limit.tokens], own)
        lost = int(mask[len(example) :].sum())
        if example.trained_tokens:
            work.items.append(example)
            if lost:
                cut = "{row}: {tokens} tokens, of which {limit} fit ({reason}): {lost} of the answer are cut off"
                work.cut.append(t(cut, row=own, tokens=len(ids), lost=lost, **limit.said))
        elif lost:
            empty = "{row}: no token is trained: the prompt alone has {tokens} tokens, and {limit} fit ({reason})"
            work.empty.append(t(empty, row=own, tokens=int(mask.argmax()), **limit.said))
        else:
            work.empty.append(t("{row}: no token is trained", row=own))


def _complain(work: _Work, options: DataOptions, limit: _Limit) -> None:
    """Raise one InputError with everything that is wrong."""
    problems = []
    bad, total = len(work.refused) + len(work.empty), len(work.items) + len(work.empty)
    if bad and not options.skip_bad:
        if work.items:
            message = "{bad} of {rows} rows are bad; --skip-bad (data.skip_bad=true) goes on without them"
        else:
            message = "{bad} of {rows} rows are bad, and nothing would be left without them"
        last = t(message, bad=bad, rows=bad + len(work.items))
        problems += [*first_of(work.refused), *first_of(work.empty), last]
    if total and len(work.cut) / total > options.allow_truncated:
        message = (
            "{cut} of {total} examples lose a part of their answer: {limit} tokens fit ({reason}), and "
            "data.allow_truncated is {allowed}; {mend}"
        )
        slots = {**limit.said, "allowed": options.allow_truncated, "mend": t(limit.mend)}
        problems.append(t(message, cut=len(work.cut), total=total, **slots))
        problems += first_of(work.cut)
    if not problems and not any(example.trained_tokens for example in work.items):
        problems.append(t("there is nothing to train on: no row has a trained token"))
    if problems:
        raise InputError(problems)


def _said(work: _Work, limit: _Limit) -> list[str]:
    said = []
    if work.several:
        several = (
            "{rows} conversations became one example per assistant turn: this chat template or tokenizer writes "
            "earlier turns differently once a conversation goes on"
        )
        said.append(t(several, rows=work.several))
    if work.words_lost:
        lost = "in {rows} conversations the chat template leaves out the words of a turn that also calls a tool"
        said.append(t(lost, rows=work.words_lost))
    if work.cut:
        cut = "{limit} tokens fit ({reason}), which cuts the answers of {cut} examples"
        said.append(t(cut, cut=len(work.cut), **limit.said))
    if left_out := [*work.refused, *work.empty]:
        message = "{rows} rows left out (skip_bad): refused by the template or nothing to train"
        said.append(t(message, rows=len(left_out)))
        said += first_of([f"  {line}" for line in left_out], SHOWN)
    return said


def _has_system(row: Row) -> bool:
    return isinstance(row, Chat) and any(message.role == "system" for message in row.messages)


def _mixed(row: Row) -> TypeGuard[Chat]:
    return isinstance(row, Chat) and any(message.calls and message.content for message in row.messages)
