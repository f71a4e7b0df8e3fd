"""More rows out of those there are: by rules, by a model behind an endpoint, or out of documents.

    weitiao data augment rows.jsonl --tools hotel --output more.jsonl
    weitiao data augment rows.jsonl --by rewrite --endpoint http://127.0.0.1:8000/v1 --rewriter qwen --output more.jsonl
    weitiao data augment manual.md --by questions --output questions.jsonl

A new row keeps the group of the one it was made from, so that no split tears them apart. What did not come out true is
kept beside the output in ``….rejects.jsonl``, with the reasons; replies of an endpoint in ``….replies.jsonl``.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from weitiao.config import build
from weitiao.data import documents, rewrite
from weitiao.data.augment_rules import RULES, Talk
from weitiao.data.endpoint import Endpoint, EndpointOptions
from weitiao.data.messages import record_of
from weitiao.data.rows import Chat
from weitiao.data.split import content_of, place_of
from weitiao.data.truth import Functions, differences
from weitiao.errors import InputError, say, t
from weitiao.runs import write_atomic

ASKED_AT_ONCE = 256
By = Literal["rules", "rewrite", "questions"]


@dataclass
class Made:
    """New rows as records, what was not believed and why, and how often each rule was used."""

    records: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)


def grouped(chat: Chat) -> Chat:
    """With a group, so that what is made of it stays on its side of every split."""
    return chat if chat.group is not None else replace(chat, group=f"row-{place_of(content_of(chat), 0):.12f}"[:18])


def by_rules(
    chats: Sequence[Chat],
    variants: int = 1,
    seed: int = 0,
    functions: Functions | None = None,
    chances: Mapping[str, float] | None = None,
) -> Made:
    """``variants`` of every conversation by the rules of ``augment_rules.py``, each used with its chance. A short form
    of a name needs ``functions`` to see what it finds; without them it is left alone."""
    made = Made()
    chances = {name: chance for name, (chance, _) in RULES.items()} | dict(chances or {})
    for chat in map(grouped, chats):
        seen = {content_of(chat)}
        for number in range(variants):
            talk = Talk(chat, random.Random(f"augment {seed} {content_of(chat)} {number}"))
            rules = [name for name in RULES if talk.chance.random() < chances[name]]
            used = [name for name in rules if (name != "names" or functions) and RULES[name][1](talk)]
            name = f"{chat.id}~{number + 1}:{'+'.join(used)}"
            new = replace(talk.chat, id=name)
            if not used or content_of(new) in seen:
                continue
            if problems := differences(chat, new, functions, talk.said):
                made.rejects.append({"where": chat.id, "why": "; ".join(problems), "row": record_of(new)})
                continue
            seen.add(content_of(new))
            made.records.append(record_of(new))
            made.used.update(used)
    return made


def by_rewriting(
    chats: Sequence[Chat],
    endpoint: Endpoint,
    language: rewrite.Language = "zh",
    variants: int = 1,
    functions: Functions | None = None,
    own: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Made:
    """``variants`` of every conversation in the words of the endpoint's model."""
    made = Made()
    chats = [grouped(chat) for chat in chats]
    seen = {content_of(chat) for chat in chats}
    for turn in range(variants):
        for start in range(0, len(chats), ASKED_AT_ONCE):
            some = chats[start : start + ASKED_AT_ONCE]
            prompts = [{"messages": rewrite.rewrite_prompt(chat, language, own)} for chat in some]
            for chat, reply in zip(some, endpoint.ask(prompts, turn, progress), strict=True):
                new, problems = None, list(reply.problems)
                if not problems:
                    new, problems = rewrite.rewritten(chat, reply.content, functions)
                if new is not None and content_of(new) in seen:
                    new, problems = None, [t("a copy of another row")]
                if new is None:
                    made.rejects.append({"where": chat.id, "why": "; ".join(problems), "reply": reply.content})
                else:
                    seen.add(content_of(new))
                    made.records.append(record_of(replace(new, id=f"{chat.id}~{turn + 1}:rewrite")))
    made.used["rewrite"] = len(made.records)
    return made


def by_questions(
    files: Sequence[str],
    endpoint: Endpoint | None,
    language: rewrite.Language = "zh",
    count: int = 3,
    own: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Made:
    """Questions and answers that documents write as such, and ``count`` for each piece from the endpoint's model."""
    made = Made()
    found = [piece for file in files for piece in documents.pieces(Path(file))]
    for piece in found:
        _add(made, piece, documents.asked(piece), "written")
    if endpoint is None:
        return made
    asked = (rewrite.prompt("questions", language, own, text=piece.text, count=count) for piece in found)
    prompts = [{"messages": messages} for messages in asked]
    for piece, reply in zip(found, endpoint.ask(prompts, 0, progress), strict=True):
        good, bad = [], [(reply.content, problem) for problem in reply.problems]
        if not bad:
            good, bad = rewrite.questions(piece.text, reply.content)
        _add(made, piece, good, "asked")
        made.rejects += ({"where": piece.source, "why": why, "reply": one} for one, why in bad)
    return made


def _add(made: Made, piece: documents.Piece, pairs: Sequence[tuple[str, str]], how: str) -> None:
    group = f"{piece.file}:{piece.lines[0]}"
    made.records += ({"prompt": q, "answer": a, "source": piece.source, "group": group} for q, a in pairs)
    made.used[how] += len(pairs)


# ---- the verb --------------------------------------------------------------------------------------------------------


def verb(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="FILE...", help="rows, or documents for --by questions")],
    output: Annotated[Path, typer.Option(help="the file to write, a jsonl")],
    by: Annotated[By, typer.Option(help="rules; rewrite: by a model; questions: out of txt and md")] = "rules",
    variants: Annotated[int, typer.Option(min=1, help="new rows for each row, or questions for each piece")] = 1,
    rule: Annotated[
        list[str] | None, typer.Option(metavar=f"{'|'.join(RULES)}=CHANCE", help="a rule's chance; repeatable")
    ] = None,
    tools: Annotated[str | None, typer.Option(help="functions by name (hotel), to run the calls of new rows")] = None,
    endpoint: Annotated[str | None, typer.Option(help="an OpenAI-compatible endpoint, http://…/v1")] = None,
    rewriter: Annotated[str, typer.Option(help="the model's name at the endpoint")] = "default",
    key_variable: Annotated[str, typer.Option(help="environment variable with the key")] = "OPENAI_API_KEY",
    language: Annotated[Literal["zh", "en"], typer.Option(help="language of the prompts")] = "zh",
    prompt: Annotated[Path | None, typer.Option(help="a file with a prompt of your own: $turns and $values")] = None,
    concurrency: Annotated[int, typer.Option(help="requests under way at once")] = 4,
    timeout: Annotated[float, typer.Option(help="seconds until a request is sent again")] = 60,
    retries: Annotated[int, typer.Option(help="how often a request is sent again")] = 5,
    price_in: Annotated[float, typer.Option(help="price of a million prompt tokens")] = 0,
    price_out: Annotated[float, typer.Option(help="price of a million tokens written")] = 0,
    originals: Annotated[bool, typer.Option("--originals", help="write the rows themselves, too")] = False,
    seed: Annotated[int, typer.Option(min=0, help="another seed makes other rows")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Write new rows made of FILEs: by rules, in a model's words, or out of documents; each checked to be true."""
    if output.exists() and not overwrite:
        raise InputError(t("{path}: is there already; --overwrite replaces it", path=output))
    client = None
    if endpoint is not None:
        values = {"url": endpoint, "model": rewriter, "key_variable": key_variable, "concurrency": concurrency}
        values |= {"timeout": timeout, "retries": retries, "price_in": price_in, "price_out": price_out}
        client = Endpoint(build(EndpointOptions, values), output.with_suffix(".replies.jsonl"))
    elif by == "rewrite":
        raise InputError(t("--by rewrite needs --endpoint, an OpenAI-compatible URL"))
    functions = _functions(tools, getattr(context.obj, "tools", {}))
    chats = _chats(words, skip_bad) if by != "questions" else []
    with _Progress(len(chats) * variants if by == "rewrite" else 0) as progress:
        if by == "rules":
            made = by_rules(chats, variants, seed, functions, _chances(rule or []))
        elif by == "rewrite" and client:
            made = by_rewriting(chats, client, language, variants, functions, prompt, progress)
        else:
            made = by_questions(words, client, language, variants, prompt, progress)
    before = [record_of(grouped(chat)) for chat in chats] if originals else []
    rejects = output.with_suffix(".rejects.jsonl")
    _write(output, [*before, *made.records])
    _write(rejects, made.rejects)
    report: dict[str, Any] = {"output": str(output), "originals": len(before), "new": len(made.records)}
    report |= {"rejected": len(made.rejects), "rejects": str(rejects), "used": dict(made.used)}
    if client:
        report |= {"endpoint": vars(client.count), "cost": round(client.cost(), 6)}
    if not made.records:
        say("no new row was made")
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    for name, value in report.items():
        print(f"{name}\t{value if not isinstance(value, dict) else ', '.join(f'{k} {v}' for k, v in value.items())}")


def _chats(words: Sequence[str], skip_bad: bool) -> list[Chat]:
    from weitiao.data.sources import arguments, read_all

    sources = read_all(*arguments(words, skip_bad))
    for line in (line for source in sources for line in source.said):
        print(line, file=sys.stderr)
    rows = [row for source in sources for row in source.rows]
    chats = [row for row in rows if isinstance(row, Chat)]
    if len(chats) < len(rows) or not chats:
        message = "only conversations can be said in other words; {count} rows are none"
        raise InputError(t(message, count=len(rows) - len(chats)))
    return chats


def _functions(name: str | None, builders: Mapping[str, Callable[..., Functions]]) -> Functions | None:
    if name is None:
        return None
    if name not in builders:
        known = ", ".join(builders) or t("none")
        raise InputError(t("--tools {name}: no such tools; known: {known}", name=name, known=known))
    return builders[name]()


def _chances(words: Sequence[str]) -> dict[str, float]:
    """``typos=0.5`` as a rule's chance; InputError names every one that is none."""
    found, problems = {}, []
    for word in words:
        name, _, text = word.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = -1.0
        if name not in RULES or not 0 <= found[name] <= 1:
            message = "--rule {word}: expected NAME=CHANCE, a number from 0 to 1 ({names})"
            problems.append(t(message, word=word, names=", ".join(RULES)))
    if problems:
        raise InputError(problems)
    return found


class _Progress:
    """A bar on stderr that counts replies, where there is a terminal and something to count."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.bar = Progress(console=console, transient=True, disable=not total or not console.is_terminal)
        self.task = self.bar.add_task(t("asking"), total=total)

    def __enter__(self) -> Callable[[int], None]:
        self.bar.start()
        return lambda done: self.bar.advance(self.task, done)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _write(path: Path, records: Sequence[Any]) -> None:
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records))
