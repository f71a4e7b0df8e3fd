"""``weitiao data show``: rows as the model gets them, token by token, and which tokens are trained.

    weitiao data show rows.jsonl --model weitiao-tiny-zh --rows 3 --html rows.html --check

Trained tokens are green, the others dim; special tokens and white space are made visible. Where there are no colours
(a pipe, a file), trained text stands in ⟦brackets⟧. The page written by ``--html`` needs nothing else to be read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from weitiao.data.rows import Chat, Row, Text
from weitiao.data.spans import Marker, Rendered, encode_text
from weitiao.errors import InputError, first_of, language, t
from weitiao.runs import write_atomic

if TYPE_CHECKING:
    from weitiao.data.render import Renderer

TrainOn = Literal["assistant", "last", "all"]
VISIBLE = {" ": "·", "\n": "⏎\n", "\t": "⇥\t", "\r": "␍", "\u3000": "□"}

STYLE = """\
body { font: 15px/1.9 ui-monospace, Menlo, Consolas, monospace; margin: 2em auto; max-width: 70em; padding: 0 1em;
  background: #fff; color: #999 }
h1, h2, p { font-family: system-ui, sans-serif; color: #333; line-height: 1.4 } h1 { font-size: 1.4em }
h2 { font-size: 1em; margin: 2em 0 .4em } .bad { color: #b00 }
pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
i { font-style: normal; border-bottom: 1px solid #eee } i.y { color: #064; background: #d4f5df; border-color: #8c8 }
i.s { outline: 1px solid #bbb; border-radius: 3px } b { font-weight: normal; opacity: .45 }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #777 } h1, h2, p { color: #ccc }
  i { border-color: #2a2a2a } i.y { color: #9f9; background: #163a24; border-color: #363 } .bad { color: #f77 } }
"""


@dataclass(frozen=True)
class Token:
    """One token, or the few that make up one character: its text, ids, whether it is trained and whether special."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One example: its name, its tokens and how many there are."""

    name: str
    tokens: list[Token]
    count: int
    trained: int

    @property
    def title(self) -> str:
        """Its name and counts."""
        share = 100 * self.trained / self.count if self.count else 0.0
        message = "{name}: {tokens} tokens, {trained} trained ({share} %)"
        return t(message, name=self.name, tokens=self.count, trained=self.trained, share=f"{share:.1f}")


def tokens_of(rendered: Rendered, marker: Marker) -> Iterator[Token]:
    """The tokens of an example with the text of each; tokens that make up one character together come as one."""
    ids, mask = rendered.ids, rendered.mask
    special = set(marker.tokenizer.all_special_ids) | marker.end_ids
    start = read = 0  # ids[start:read] go along as context: decoders treat a first token differently
    for end in range(1, len(ids) + 1):
        before, after = marker.decode(ids[start:read]), marker.decode(ids[start:end])
        unfinished = after.endswith("\ufffd") or len(after) < len(before)
        if unfinished and end < len(ids) and mask[end] == mask[end - 1] and end - read < 8:
            continue
        yield Token(after[len(before) :], tuple(ids[read:end]), mask[end - 1], ids[end - 1] in special)
        start, read = read, end


def shown_rows(rows: Sequence[Row], renderer: Renderer, train_on: TrainOn) -> tuple[list[Shown], list[str]]:
    """Every example of ``rows``, and the problems of the rows that cannot be rendered or have nothing to train on."""
    found, problems = [], []
    chats = iter(renderer.renders([row for row in rows if isinstance(row, Chat)], train_on))
    for number, row in enumerate(rows, 1):
        name = row.id or t("row {number}", number=number)
        made: list[Rendered] | InputError
        if isinstance(row, Chat):
            made = next(chats)
        elif isinstance(row, Text):
            made = [encode_text(renderer.tokenizer, row.text)]
        else:
            made = InputError(t("a row of type {kind} has no assistant turn to train on", kind=type(row).__name__))
        if isinstance(made, InputError):
            problems += [f"{name}: {problem}" for problem in made.problems]
            continue
        for part, rendered in enumerate(made, 1):
            own = f"{name}#{part}" if len(made) > 1 else name
            trained = sum(rendered.mask[1:])
            found.append(Shown(own, list(tokens_of(rendered, renderer.marker)), len(rendered.ids), trained))
            if not trained:
                problems.append(t("{row}: no token is trained", row=own))
        if not made:
            problems.append(t("{row}: no token is trained (there is no assistant turn to train on)", row=name))
    return found, problems


def visible(text: str) -> str:
    """White space as signs; a line break stays one."""
    return "".join(VISIBLE.get(character, character) for character in text)


def print_rows(shown: Sequence[Shown]) -> None:
    """The examples on stdout, in colours where there are any."""
    from rich.console import Console
    from rich.text import Text as Line

    console = Console(soft_wrap=True, highlight=False)
    coloured = console.color_system is not None
    for row in shown:
        console.print(Line(row.title, style="bold"))
        line, inside = Line(), False
        for token in row.tokens:
            if not coloured and token.trained != inside:
                line.append("⟦" if token.trained else "⟧")
                inside = token.trained
            style = ("green" if token.trained else "dim") + (" reverse" if token.special else "")
            line.append(visible(token.text), style=style)
        line.append("⟧" if inside else "")
        console.print(line)
        console.print()


def html_page(title: str, shown: Sequence[Shown], said: Sequence[str]) -> str:
    """The examples as one page without any other file; a token's ids are its tooltip."""
    parts = [
        f'<!doctype html><html lang="{language()}"><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style><h1>{escape(title)}</h1>",
        f'<p><i class="y">{escape(t("trained"))}</i> <i>{escape(t("not trained"))}</i> ',
        f'<i class="s">{escape(t("special token"))}</i> · {escape(t("point at a token for its id"))}</p>',
        *(f"<p>{escape(line)}</p>" for line in said),
    ]
    for row in shown:
        bad = "" if row.trained else ' class="bad"'
        parts += [f"<h2{bad}>{escape(row.title)}</h2><pre>", *map(_html_token, row.tokens), "</pre>"]
    return "".join(parts) + "</html>\n"


def _html_token(token: Token) -> str:
    kinds = " ".join(name for name, true in (("y", token.trained), ("s", token.special)) if true)
    text = "".join(
        f"<b>{VISIBLE[character]}</b>" if character in VISIBLE else escape(character) for character in token.text
    )
    return f'<i class="{kinds}" title="{" ".join(map(str, token.ids))}">{text}</i>'


def verb(
    file: Annotated[Path, typer.Argument(help="rows: jsonl, json, csv, tsv, parquet or txt")],
    model: Annotated[str, typer.Option(help="whose tokenizer and chat template")] = "weitiao-tiny-zh",
    rows: Annotated[int, typer.Option(min=1, help="how many rows from the beginning")] = 5,
    train_on: Annotated[TrainOn, typer.Option(help="whose tokens are trained")] = "assistant",
    layout: Annotated[str, typer.Option("--format", help="as data.format in a recipe")] = "auto",
    chat_template: Annotated[str | None, typer.Option(help="a Jinja file or a named template")] = None,
    tools: Annotated[str | None, typer.Option(help="a JSON file of tool schemas")] = None,
    html: Annotated[Path | None, typer.Option(help="also write a page to this file")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="compare every row's training with its serving, token by token")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Show rows as the model gets them, and which tokens are trained."""
    from weitiao.config import build
    from weitiao.data.check import Checked
    from weitiao.data.check import check as compared
    from weitiao.data.sources import DataOptions, read

    options = {"train": str(file), "format": layout, "tools": tools, "skip_bad": skip_bad, "train_on": train_on}
    source = read(file, build(DataOptions, options))
    renderer = renderer_of(model, source.rows, chat_template)
    shown, problems = shown_rows(source.rows[:rows], renderer, train_on)
    checked = compared(source.rows, renderer, train_on) if check else Checked()
    problems += first_of(checked.problems)
    said = [*source.said, *renderer.said]
    for line in said:
        print(line, file=sys.stderr)
    if html is not None:
        write_atomic(html, html_page(file.name, shown, said))
        print(html, file=sys.stderr)
    if as_json:
        report = _report(file, len(source.rows), renderer, shown, said, problems)
        print(json.dumps(report | ({"check": vars(checked)} if check else {}), ensure_ascii=False))
    else:
        print_rows(shown)
        message = "{shown} of {rows} rows, {tokens} tokens, {trained} trained"
        counts = {"tokens": sum(row.count for row in shown), "trained": sum(row.trained for row in shown)}
        print(t(message, shown=min(rows, len(source.rows)), rows=len(source.rows), **counts))
        if check:
            message = "{turns} turns of {rows} rows, {tokens} tokens: {different} differ between training and serving"
            counts = {"turns": checked.turns, "tokens": checked.tokens, "different": len(checked.problems)}
            print(t(message, rows=len(source.rows), **counts))
    if problems:
        raise InputError(problems)


def renderer_of(model: str, rows: Sequence[Row], template: str | None = None) -> Renderer:
    """The renderer of a run, or of a model by name or folder, for ``rows`` with their tools."""
    from weitiao.data.render import Renderer
    from weitiao.models.load import load_tokenizer
    from weitiao.runs import Run, is_run
    from weitiao.weights import fetch

    folder = Run.open(model).final if is_run(model) else fetch.resolve(model)
    chats = [row for row in rows if isinstance(row, Chat)]
    tools = any(chat.tools or any(message.calls for message in chat.messages) for chat in chats)
    return Renderer.of(load_tokenizer(folder), tools=tools, override=template)


def _report(
    file: Path, rows: int, renderer: Renderer, shown: Sequence[Shown], said: Sequence[str], problems: Sequence[str]
) -> dict[str, Any]:
    return {
        "file": str(file),
        "rows": rows,
        "template": renderer.template_name,
        "said": list(said),
        "problems": list(problems),
        "examples": [
            {
                "id": row.name,
                "tokens": row.count,
                "trained_tokens": row.trained,
                "pieces": [
                    {"text": token.text, "ids": token.ids, "trained": token.trained, "special": token.special}
                    for token in row.tokens
                ],
            }
            for row in shown
        ],
    }
