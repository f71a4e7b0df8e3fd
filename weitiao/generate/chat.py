"""Talking to a model: history, streaming, and a bounded loop of tool calls; and the verb ``weitiao chat``.

    chat = Chat(open_model("runs/hotel-demo"), Toolset({"search_hotels": search}, schemas))
    for event in chat.send("帮我找一家经济型酒店"): ...          # TextDelta, ToolCall, ToolResult, Problem, End

Arguments are checked against the schema before anything is called; what went wrong is told to the model as the result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao.data.messages import as_dicts
from weitiao.data.render import EMPTY_THOUGHT
from weitiao.data.rows import Call, Message
from weitiao.data.tools import check
from weitiao.errors import InputError, WeitiaoError, say, t
from weitiao.generate.toolset import Toolset, able, find_toolset, named_toolset
from weitiao.models import heads
from weitiao.runs import write_atomic

if TYPE_CHECKING:
    from weitiao.generate.engine import Completion
    from weitiao.generate.sample import SampleOptions
    from weitiao.methods.io import Tuned

ROUNDS = 8  # answers with calls to one message; a model that still calls then is going round in circles
OPENINGS = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
}  # what a call begins with, where words may stand before it


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the answer's words."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call, and in what it does not fit its schema (then it is not executed)."""

    call: Call
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToolResult:
    """What a call returned, as the model reads it."""

    name: str
    content: str


@dataclass(frozen=True)
class Problem:
    """Something that went wrong and did not end the conversation."""

    message: str


@dataclass(frozen=True)
class End:
    """The answer is complete; ``message`` is the last assistant message of the history."""

    message: Message


Event = TextDelta | ToolCall | ToolResult | Problem | End


class Chat:
    """A conversation; ``messages`` is its history, which an answer that is broken off leaves as it was."""

    def __init__(
        self,
        tuned: Tuned,
        tools: Toolset | None = None,
        options: SampleOptions | None = None,
        system: str | None = None,
        rounds: int = ROUNDS,
    ):
        from weitiao.generate.sample import SampleOptions

        self.tuned = tuned
        self.tools = tools or Toolset()
        self.renderer = able(tuned.renderer, bool(self.tools.schemas))
        self.options = options or SampleOptions()
        self.system = system
        self.rounds = rounds
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system message only."""
        self.messages = [Message("system", self.system)] if self.system else []

    def send(self, text: str) -> Generator[Event, None, None]:
        """Answer ``text``: events as they happen. InputError: the conversation is longer than the model's positions."""
        kept = list(self.messages)
        self.messages.append(Message("user", text))
        finished = False
        try:
            yield from self._answer()
            finished = True
        finally:
            if not finished:
                self.messages = kept

    def save(self, path: str | Path) -> None:
        """Append the conversation to a JSONL file as a row that ``weitiao train`` reads."""
        row = {"messages": as_dicts(self.messages), "tools": list(self.tools.schemas)}
        before = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
        write_atomic(path, before + json.dumps(row, ensure_ascii=False) + "\n")

    def _answer(self) -> Iterator[Event]:
        for _ in range(self.rounds):
            completion = yield from self._write()
            parsed = self.renderer.parsed(completion.text)
            said = Message("assistant", parsed.content, parsed.calls)
            self.messages.append(said)
            for problem in parsed.problems:
                yield Problem(problem)
            if completion.finish == "length":
                yield Problem(t("the answer was cut at {tokens} tokens", tokens=len(completion.ids)))
            if not said.calls:
                yield End(said)
                return
            for call in said.calls:
                yield from self._execute(call)
            if self.messages[-1] is said:  # nothing here can be executed
                yield End(said)
                return
        yield Problem(t("still calling tools after {rounds} rounds; stopped", rounds=self.rounds))
        yield End(self.messages[-1])

    def _write(self) -> Generator[Event, None, Completion]:
        """One assistant message, its words streamed, the text of calls held back."""
        from weitiao.generate.engine import positions, stream

        renderer = self.renderer
        prompt = renderer.prompt(self.messages, self.tools.schemas)
        limit = positions(self.tuned.model)
        if limit is not None and len(prompt) > limit:
            message = "the conversation has {tokens} tokens and the model {limit} positions; /reset begins anew"
            raise InputError(t(message, tokens=len(prompt), limit=limit))
        # another stream of random numbers for every message, the same in every conversation
        options = self.options.model_copy(update={"seed": self.options.seed + len(self.messages)})
        pieces = stream(self.tuned.model, self.tuned.tokenizer, prompt, options, stop_ids=renderer.stop_ids)
        text = shown = ""
        while True:
            try:
                text += next(pieces)
            except StopIteration as end:
                completion: Completion = end.value
                break
            certain = words(text, renderer.syntax)
            if len(certain) > len(shown):
                yield TextDelta(certain[len(shown) :])
                shown = certain
        content = renderer.parse(completion.text).content
        if content != shown and content.startswith(shown):
            yield TextDelta(content[len(shown) :])
        return completion

    def _execute(self, call: Call) -> Iterator[Event]:
        """Check and execute one call; its result, or what went wrong, becomes a tool message."""
        problems = check(call, self.tools.schemas) if self.tools.schemas else []
        yield ToolCall(call, tuple(problems))
        function = self.tools.functions.get(call.name)
        if not self.tools.functions or (function is None and not problems):
            return
        if problems or function is None:
            content = _error("; ".join(problems))
        else:
            try:
                result = function(**call.arguments)
                content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
            except Exception as error:  # whatever a tool raises is the model's to hear, and the person's
                content = _error(f"{type(error).__name__}: {error}")
                yield Problem(t("{name} failed: {problem}", name=call.name, problem=error))
        self.messages.append(Message("tool", content, name=call.name))
        yield ToolResult(call.name, content)


def words(text: str, syntax: str | None) -> str:
    """The beginning of an unfinished answer that is certainly words: not part of a call, nor of an empty thought."""
    if "<think></think>".startswith("".join(text.split())):
        return ""
    text = EMPTY_THOUGHT.sub("", text)
    if syntax is not None:
        opening = OPENINGS.get(syntax)
        if opening is None:
            return ""
        text = text.partition(opening)[0]
        for length in range(min(len(opening) - 1, len(text)), 0, -1):
            if opening.startswith(text[-length:]):
                text = text[:-length]
                break
    return text.strip()


def _error(problem: str) -> str:
    return json.dumps({"error": problem}, ensure_ascii=False)


# --- the verb


def verb(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="a run, an adapter or model folder, or a model's name")
    ] = "weitiao-tiny-zh",
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    tools: Annotated[
        str | None, typer.Option(help="a JSON file of tool schemas, or a toolset's name; default: the run's own")
    ] = None,
    once: Annotated[str | None, typer.Option(help="answer this and end")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest answer")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="sample among the likeliest tokens only")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens after which an answer is cut")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="seed of sampling")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object an event")] = False,
) -> None:
    """Talk to a run or a model; calls are executed and shown where the tools are known."""
    from weitiao.config import build
    from weitiao.generate.sample import SampleOptions
    from weitiao.methods.io import open_model

    builders = getattr(context.obj, "tools", {})
    toolset = named_toolset(tools, builders) if tools else find_toolset(model, builders)
    sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    options = build(SampleOptions, sampling)
    tuned = open_model(model)
    heads.refuse(tuned.model.config, model)
    chat = Chat(tuned, toolset, options, system)
    show = show_json if as_json else ShowText()
    if once is not None:
        for event in chat.send(once):
            show(event)
    else:
        converse(chat, show)


class ShowText:
    """Writes events as a person reads them: words as they come, calls and results on lines of their own."""

    def __init__(self) -> None:
        self.midline = False

    def __call__(self, event: Event) -> None:
        """Write one event: what is said to stdout, what went wrong to stderr."""
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
            self.midline = not event.text.endswith("\n")
            return
        if self.midline:
            print(flush=True)
            self.midline = False
        if isinstance(event, ToolCall):
            print(f"→ {event.call.name}({json.dumps(event.call.arguments, ensure_ascii=False)})", flush=True)
            for problem in event.problems:
                say("the call does not fit: {problem}", problem=problem)
        elif isinstance(event, ToolResult):
            print(f"← {event.content}", flush=True)
        elif isinstance(event, Problem):
            say("{problem}", problem=event.message)


def show_json(event: Event) -> None:
    """Write an event as one JSON object: its ``type`` and its fields."""
    names = {TextDelta: "text", ToolCall: "call", ToolResult: "result", Problem: "problem", End: "end"}
    fields: dict[str, Any] = {"type": names[type(event)]}
    if isinstance(event, ToolCall):
        fields |= {"name": event.call.name, "arguments": event.call.arguments, "problems": event.problems}
    elif isinstance(event, End):
        fields |= as_dicts([event.message])[0]
    else:
        fields |= vars(event)
    print(json.dumps(fields, ensure_ascii=False), flush=True)


def converse(chat: Chat, show: Callable[[Event], None]) -> None:
    """Read messages line by line until the end of input, or /quit; a line that begins with / is a command."""
    tty = sys.stdin.isatty()
    if tty:
        say("/reset begins anew, /save FILE keeps the conversation, /quit ends")
    while (line := _line("> " if tty else None)) is not None:
        command, _, argument = line.strip().partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/reset":
                chat.reset()
            elif command == "/save" and argument:
                chat.save(argument.strip())
                say("saved: {path}", path=argument.strip())
            elif command.startswith("/"):
                say("no such command: {command} (/reset, /save FILE, /quit)", command=line.strip())
            elif command:
                for event in chat.send(line.strip()):
                    show(event)
        except KeyboardInterrupt:
            say("\nstopped; the message and its answer are not kept")
        except WeitiaoError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def _line(prompt: str | None) -> str | None:
    """The next line of input; None at its end, and on Ctrl-C at an empty prompt."""
    try:
        if prompt is None:
            return sys.stdin.readline() or None
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
