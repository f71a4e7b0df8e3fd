"""Whether training sees what serving sends: every turn of the assistant, token by token.

    checked = check(rows, renderer)             # Checked(turns=12, tokens=3401, problems=[])

Serving is done here the way servers do it, by the tokenizer's own ``apply_chat_template``, tokens included, and not by
the renderer. For each turn its prompt has to be the first tokens of an example, the token behind it has to be trained,
and what is trained has to read back as the row's own message, calls and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weitiao.data.rows import Chat, Message, Row
from weitiao.data.spans import Rendered
from weitiao.data.tools import wrapped
from weitiao.errors import InputError, t

if TYPE_CHECKING:
    from weitiao.data.render import Renderer

AROUND = 3  # tokens shown on either side of a difference


@dataclass
class Checked:
    """Turns compared, tokens of their prompts and answers, and every difference."""

    turns: int = 0
    tokens: int = 0
    problems: list[str] = field(default_factory=list)


def check(rows: Sequence[Row], renderer: Renderer, train_on: str = "assistant") -> Checked:
    """Every trained turn of the conversations among ``rows``; a row that the template refuses is a problem, too."""
    found = Checked()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Chat):
            continue
        name = row.id or t("row {number}", number=number)
        (made,) = renderer.renders([row], train_on)
        try:
            if isinstance(made, InputError):
                raise made
            places = [place for place, message in enumerate(row.messages) if message.role == "assistant" and place]
            for place in places[-1:] if train_on == "last" else places:
                _turn(found, name, row, place, made, renderer)
        except InputError as error:
            found.problems += [f"{name}: {problem}" for problem in error.problems]
    return found


def served(renderer: Renderer, chat: Chat, place: int) -> list[int]:
    """The prompt tokens that a server makes of the conversation before message ``place``."""
    return list(
        renderer.tokenizer.apply_chat_template(
            renderer.conversation(chat.messages[:place]),
            tools=[wrapped(tool) for tool in chat.tools] or None,  # type: ignore[arg-type]
            chat_template=renderer.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    )


def _turn(found: Checked, name: str, chat: Chat, place: int, made: Sequence[Rendered], renderer: Renderer) -> None:
    """Compare one turn of the assistant with the examples made of its row."""
    prompt = served(renderer, chat, place)
    where = t("{row}, message {number}", row=name, number=place + 1)
    best = max(made, key=lambda one: (_common(one.ids, prompt), -len(one.ids)), default=None)
    if best is None:
        found.problems.append(t("{where}: no example has this turn", where=where))
        return
    common = _common(best.ids, prompt)
    found.turns += 1
    if common < len(prompt):
        message = "{where}: token {place} of {count}: training has {ours}, serving {theirs}"
        shown = {"ours": _around(best.ids, common, renderer), "theirs": _around(prompt, common, renderer)}
        found.problems.append(t(message, where=where, place=common, count=len(prompt), **shown))
        return
    stop = next((n for n in range(common, len(best.ids)) if not best.mask[n]), len(best.ids))
    found.tokens += stop
    if stop == common:
        found.problems.append(t("{where}: the first token of the answer is not trained", where=where))
        return
    ends = (n for n in range(common, stop) if best.ids[n] in renderer.stop_ids)
    answer = renderer.parse(renderer.decode(best.ids[common : next(ends, stop)]))
    if not _same(answer, chat.messages[place]):
        shown = {"ours": _said(answer), "theirs": _said(chat.messages[place])}
        found.problems.append(t("{where}: the trained tokens read {ours}, the row says {theirs}", where=where, **shown))


def _common(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """How many first tokens are the same."""
    pairs = zip(ids, prompt, strict=False)
    return next((n for n, (one, two) in enumerate(pairs) if one != two), min(len(ids), len(prompt)))


def _around(ids: Sequence[int], place: int, renderer: Renderer) -> str:
    some = [int(token) for token in ids[max(0, place - AROUND) : place + AROUND]]
    return f"{renderer.marker.decode(some)!r} {some}"


def _same(answer: Message, message: Message) -> bool:
    calls = [(call.name, dict(call.arguments)) for call in message.calls]
    return answer.content.split() == message.content.split() and calls == [
        (call.name, dict(call.arguments)) for call in answer.calls
    ]


def _said(message: Message) -> str:
    return " ".join([repr(message.content), *(f"{call.name}({dict(call.arguments)})" for call in message.calls)])
