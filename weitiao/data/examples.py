"""Rows to training examples, and everything that would make training on them a lie said before the first step.

train = examples(splits.train, renderer, options.data, "sft", max_positions=2048)
train[0].ids, train.truncated, train.trained_tokens
"""

from __future__ import annotations

from collections import Counter
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
SHOWN = 20  # messages of a kind
SHOWN_LEFT_OUT = 5  # rows left out that a notice names
KINDS = ("refused", "empty", "cut", "several", "words_lost", "system")


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
class Work:
    """What became of rows: their examples, how often each of KINDS happened, and the first messages about it."""

    items: list[Example] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    messages: dict[str, list[str]] = field(default_factory=dict)
    trained: bool = False

    def note(self, kind: str, message: str = "", count: int = 1) -> None:
        """That something happened; the first messages are kept."""
        self.counts[kind] += count
        if message and len(kept := self.messages.setdefault(kind, [])) < SHOWN:
            kept.append(message)

    def first(self, kind: str) -> list[str]:
        """The first messages, and how many more there are."""
        return first_of(self.messages.get(kind, []), SHOWN, self.counts[kind])

    def add(self, other: Work) -> None:
        """What became of the next rows."""
        self.items += other.items
        self.trained = self.trained or any(example.trained_tokens for example in other.items)
        self.counts.update(other.counts)
        for kind, messages in other.messages.items():
            kept = self.messages.setdefault(kind, [])
            kept += messages[: SHOWN - len(kept)]


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
    work, limit = Work(), limit_of(renderer, options, max_positions)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        for made in worked(some, renderer, options, task, limit, start):
            work.add(made)
        if progress:
            progress(start + len(some), len(rows))
    complain(work, options, limit, len(work.items))
    said = told(work, options, limit)
    return Examples(work.items, len(rows), work.counts["cut"], work.counts["empty"], said)


def worked(
    rows: Sequence[Row], renderer: Renderer, options: DataOptions, task: str, limit: int | None, start: int = 0
) -> Iterator[Work]:
    """What becomes of each of some rows, the first of which is number ``start``."""
    train_on = "all" if task == "pretrain" else options.train_on
    for number, (row, made) in enumerate(zip(rows, _rendered(rows, renderer, train_on), strict=True), start + 1):
        work, name = Work(), row.id or t("row {number}", number=number)
        if isinstance(made, InputError):
            for problem in made.problems:
                work.note("refused", f"{name}: {problem}")
        else:
            _add(work, name, made, limit, reason_of(options), task)
            if _mixed(row) and renderer.left_out(row):
                work.note("words_lost")
        if renderer.folds_system and _has_system(row):
            work.note("system")
        yield work


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


def limit_of(renderer: Renderer, options: DataOptions, max_positions: int | None) -> int | None:
    """Tokens that an example may have; None: any number."""
    tokenizer_limit = renderer.tokenizer.model_max_length
    most = max_positions or (tokenizer_limit if tokenizer_limit < 1e9 else None)
    if options.max_length == "auto":
        return most
    if max_positions is not None and options.max_length > max_positions:
        message = "data.max_length: {length} is more than the {most} positions of the model"
        raise InputError(t(message, length=options.max_length, most=max_positions))
    return options.max_length


def _add(work: Work, name: str, made: Sequence[Rendered], limit: int | None, reason: str, task: str) -> None:
    if len(made) > 1:
        work.note("several")
    if not made:
        work.note("empty", t("{row}: no token is trained (there is no assistant turn to train on)", row=name))
    for number, rendered in enumerate(made, 1):
        own = f"{name}#{number}" if len(made) > 1 else name
        ids, mask = np.array(rendered.ids, dtype=np.int32), np.array(rendered.mask, dtype=bool)
        if task == "pretrain" and limit is not None and len(ids) > limit:
            parts = -(-len(ids) // limit)
            pairs = zip(np.array_split(ids, parts), np.array_split(mask, parts), strict=True)
            work.items += [Example(*pair, f"{own}:{part}") for part, pair in enumerate(pairs, 1)]
            continue
        example = Example(ids[:limit], mask[:limit], own)
        lost = int(mask[len(example) :].sum())
        if example.trained_tokens:
            work.items.append(example)
            if lost:
                cut = "{row}: {tokens} tokens, of which {limit} fit ({reason}): {lost} of the answer are cut off"
                work.note("cut", t(cut, row=own, tokens=len(ids), limit=limit, lost=lost, reason=reason))
        elif lost:
            empty = "{row}: no token is trained: the prompt alone has {tokens} tokens, and {limit} fit ({reason})"
            work.note("empty", t(empty, row=own, tokens=int(mask.argmax()), limit=limit, reason=reason))
        else:
            work.note("empty", t("{row}: no token is trained", row=own))


def reason_of(options: DataOptions) -> str:
    """What sets the limit of an example's tokens."""
    return t("the model's positions") if options.max_length == "auto" else t("data.max_length")


def complain(work: Work, options: DataOptions, limit: int | None, examples: int) -> None:
    """Raise one InputError with everything that is wrong with the rows of so many ``examples``."""
    problems, counts = [], work.counts
    bad, total = counts["refused"] + counts["empty"], examples + counts["empty"]
    if bad and not options.skip_bad:
        if examples:
            message = "{bad} of {rows} rows are bad; --skip-bad (data.skip_bad=true) goes on without them"
        else:
            message = "{bad} of {rows} rows are bad, and nothing would be left without them"
        problems += [*work.first("refused"), *work.first("empty"), t(message, bad=bad, rows=bad + examples)]
    if total and counts["cut"] / total > options.allow_truncated:
        message = (
            "the answer is cut in {cut} of {total} examples: {limit} tokens fit ({reason}), and data.allow_truncated "
            "is {allowed}; {mend}"
        )
        if options.max_length == "auto":
            mend = t("take a base with more of them, shorten the rows, or allow it")
        else:
            mend = t("raise data.max_length, or allow it")
        slots = {"limit": limit, "reason": reason_of(options), "allowed": options.allow_truncated, "mend": mend}
        problems += [t(message, cut=counts["cut"], total=total, **slots), *work.first("cut")]
    if not problems and not work.trained:
        problems.append(t("there is nothing to train on: no row has a trained token"))
    if problems:
        raise InputError(problems)


def told(work: Work, options: DataOptions, limit: int | None) -> list[str]:
    """What a person should be told about the rows."""
    said, counts = [], work.counts
    if counts["system"]:
        said.append(t("the chat template has no system turn; its text is put before the first question"))
    if counts["several"]:
        several = (
            "{rows} conversations became one example per assistant turn: this chat template or tokenizer writes "
            "earlier turns differently once a conversation goes on"
        )
        said.append(t(several, rows=counts["several"]))
    if counts["words_lost"]:
        lost = "in {rows} conversations the chat template leaves out the words of a turn that also calls a tool"
        said.append(t(lost, rows=counts["words_lost"]))
    if counts["cut"]:
        cut = "{limit} tokens fit ({reason}), which cuts the answers of {cut} examples"
        said.append(t(cut, cut=counts["cut"], limit=limit, reason=reason_of(options)))
    if left_out := counts["refused"] + counts["empty"]:
        message = "{rows} rows left out (skip_bad): refused by the template or nothing to train"
        lines = [*work.messages.get("refused", []), *work.messages.get("empty", [])]
        said += [t(message, rows=left_out), *first_of([f"  {line}" for line in lines], SHOWN_LEFT_OUT, left_out)]
    return said


def _has_system(row: Row) -> bool:
    return isinstance(row, Chat) and any(message.role == "system" for message in row.messages)


def _mixed(row: Row) -> TypeGuard[Chat]:
    return isinstance(row, Chat) and any(message.calls and message.content for message in row.messages)
