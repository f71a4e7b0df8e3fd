"""Systems side by side: tables of figures with their intervals, and whole dialogues, as Markdown.

table({"base": {"slot_f1": figure}, "tuned": {"slot_f1": figure}})          # systems down, measures across
dialogues(chats, turns, count=3)                                            # what was said, what was expected
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weitiao.data.rows import Call, Chat
from weitiao.errors import t
from weitiao.evaluate.bootstrap import Figure
from weitiao.evaluate.dialogue import Turn, calls_equal

ON_HUNDRED = ("bleu4", "bleu", "chrf", "perplexity")  # measures that are no share: shown with one digit after the point
Value = Figure | Mapping[str, Any] | float | int | None


def shown(name: str, value: Value) -> str:
    """A figure as text: ``0.973 [0.961, 0.984]``; a dash for none."""
    digits = 1 if name in ON_HUNDRED else 3
    figure = value.as_dict() if isinstance(value, Figure) else value
    if figure is None or (isinstance(figure, Mapping) and not figure.get("count", 1)):
        return "–"
    if not isinstance(figure, Mapping):
        return str(figure) if isinstance(figure, int) else f"{figure:.{digits}f}"
    text = f"{figure['value']:.{digits}f}"
    return f"{text} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]" if "low" in figure else text


def table(systems: Mapping[str, Mapping[str, Value]], measures: Sequence[str] | None = None) -> str:
    """A Markdown table, a row a system and a column a measure (by default every measure any system has)."""
    names = (
        list(dict.fromkeys(name for figures in systems.values() for name in figures)) if measures is None else measures
    )
    rows = [[system, *(shown(name, figures.get(name)) for name in names)] for system, figures in systems.items()]
    return markdown([t("system"), *names], rows)


def listing(figures: Mapping[str, Value]) -> str:
    """One system's figures as a Markdown table, a row a measure, with the number of cases each rests on."""
    rows = []
    for name, value in figures.items():
        figure = value.as_dict() if isinstance(value, Figure) else value
        cases = str(figure.get("count", "")) if isinstance(figure, Mapping) else ""
        rows.append([name, shown(name, value), cases])
    return markdown([t("measure"), t("value [95 % interval]"), t("cases")], rows)


def detailed(details: Mapping[str, Any]) -> str:
    """The tables behind the figures: each slot's scores, and the kinds of errors with an example."""
    text = ""
    if slots := details.get("slots"):
        rows = [[name, *(f"{one[key]:.3f}" for key in ("precision", "recall", "f1")), str(one["count"])]
                for name, one in slots.items()]  # fmt: skip
        text += "\n" + markdown([t("slot"), t("precision"), t("recall"), "F1", t("cases")], rows)
    if errors := details.get("errors"):
        rows = []
        for kind, one in errors.items():
            sides = [_calls_text(one["examples"][0][side]) for side in ("gold", "predicted")]
            rows.append([kind, str(one["count"]), one["examples"][0]["id"], *sides])
        text += "\n" + markdown([t("error"), t("turns"), t("for example"), t("expected"), t("model")], rows)
    return text


def _calls_text(side: Mapping[str, Any]) -> str:
    calls = [call_text(Call(call["name"], call["arguments"])) for call in side["calls"]]
    return " ".join(calls) or _short(_cell(side["text"]), 60) or "–"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    cells = [[_cell(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell + " " * (w - _width(cell)) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def dialogues(chats: Sequence[Chat], turns: Sequence[Turn], count: int = 3) -> str:
    """The first ``count`` whole dialogues as Markdown: each message, and under each of the assistant's what the model
    said in its place (teacher-forced), ✓ or ✗ for its calls."""
    answers = {(turn.id, turn.turn): turn for turn in turns}
    return "\n".join(_dialogue(chat, answers) for chat in chats[:count])


def _dialogue(chat: Chat, answers: Mapping[tuple[str, int], Turn]) -> str:
    lines = [f"### {chat.id}", ""]
    for place, message in enumerate(chat.messages):
        turn = answers.get((chat.id, place))
        said = " ".join(filter(None, [_cell(message.content), *map(call_text, message.calls)]))
        if turn is None:
            lines.append(f"- **{message.role}** {_short(said) if message.role == 'tool' else said}")
            continue
        lines.append(f"- **{t('expected')}** {said}")
        answer = " ".join(filter(None, [_cell(turn.text), *map(call_text, turn.predicted_calls)]))
        called = bool(turn.gold_calls or turn.predicted_calls)
        mark = "" if not called else " ✓" if calls_equal(turn.gold_calls, turn.predicted_calls) else " ✗"
        lines.append(f"  - **{t('model')}**{mark} {answer if answer != said else t('the same')}")
    return "\n".join([*lines, ""])


def call_text(call: Call) -> str:
    """A call as code: ``search_hotels({"type": "经济型"})``."""
    return f"`{call.name}({json.dumps(dict(call.arguments), ensure_ascii=False)})`"


def _short(text: str, characters: int = 200) -> str:
    return text if len(text) <= characters else text[:characters] + " …"


def _cell(text: str) -> str:
    """Text on one line that does not break a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _width(text: str) -> int:
    """Columns in a terminal: a CJK character takes two."""
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)
