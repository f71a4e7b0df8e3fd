"""Questions to a model, here or behind an address, and what it replied: one way for every task that reads answers.

    asked = questions(chats)                                # one per assistant message, after the true turns before it
    replies, cost = ask(open_model("runs/first"), asked, options, shots)
    replies[0].message.content, cost.per_thousand()

With ``options.thoughts`` the model is told to think first, and only what it says behind its last "Answer:" counts.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.config import build
from weitiao.data.endpoint import Endpoint
from weitiao.data.rows import Call, Chat, Message
from weitiao.data.sources import DataOptions, read
from weitiao.errors import InputError, say, t
from weitiao.evaluate.endpoint import answer_all

if TYPE_CHECKING:
    from weitiao.data.render import Renderer
    from weitiao.evaluate.tasks import EvaluateOptions
    from weitiao.methods.io import Tuned

THINK = {
    True: "请先一步一步地思考，最后另起一行写“答案：”，后面只写答案。",
    False: 'Think step by step. Then write "Answer:" on a last line, and behind it nothing but the answer.',
}
CONCLUSION = re.compile(r"(?:答案|[Aa]nswer)\s*[:：]")
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Question:
    """The conversation so far, the tools that may be called, and the assistant's message that is right; ``id`` names
    the dialogue and ``turn`` the message in it."""

    id: str
    turn: int
    messages: tuple[Message, ...]
    gold: Message
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def asked(self) -> str:
        """What was said last before the answer."""
        return self.messages[-1].content if self.messages else ""


@dataclass(frozen=True)
class Reply:
    """What was answered: words and calls, what looked like a call and is none, and the text as it was written."""

    content: str = ""
    calls: tuple[Call, ...] = ()
    problems: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Cost:
    """What a number of answers took."""

    answers: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    def per_thousand(self) -> dict[str, float]:
        """The same for 1,000 answers."""
        share = 1000 / max(self.answers, 1)
        return {name: round(value * share, 1) for name, value in asdict(self).items() if name != "answers"}


# ---- questions -------------------------------------------------------------------------------------------------------


def questions(chats: Sequence[Chat]) -> list[Question]:
    """One for every assistant message, each after the true messages before it (teacher-forced)."""
    return [
        Question(chat.id or str(number), place, chat.messages[:place], message, chat.tools)
        for number, chat in enumerate(chats)
        for place, message in enumerate(chat.messages)
        if message.role == "assistant"
    ]


def conversations(path: str) -> list[Chat]:
    """The conversations of a file; InputError where a row is none, or has no assistant's turn."""
    source = read(path, build(DataOptions, {}))
    for line in source.said:
        say("{line}", line=line)
    chats = [row for row in source.rows if isinstance(row, Chat)]
    chats = [chat for chat in chats if any(message.role == "assistant" for message in chat.messages)]
    if not chats or len(chats) < len(source.rows):
        message = "{path}: {count} of {rows} rows are no conversation with an assistant's turn"
        raise InputError(t(message, path=path, count=len(source.rows) - len(chats), rows=len(source.rows)))
    return chats


def draw_shots(options: EvaluateOptions) -> list[Chat]:
    """``options.shots`` example dialogues from ``options.shot_data``, the same for every question.
    InputError where the examples would be what is measured."""
    if not options.shots or not options.shot_data:
        return []
    if Path(options.shot_data).resolve() == Path(options.data).resolve():
        raise InputError(t("shot_data: {path} is what is measured on; examples must be others", path=options.data))
    examples = conversations(options.shot_data)
    return random.Random(options.seed).sample(examples, min(options.shots, len(examples)))


def as_shot(chat: Chat) -> list[Message]:
    """A dialogue as the beginning of another: without its system message and what no assistant's turn follows."""
    messages = [message for message in chat.messages if message.role != "system"]
    while messages and messages[-1].role != "assistant":
        messages.pop()
    return messages


def with_shots(messages: Sequence[Message], shots: Sequence[Chat]) -> list[Message]:
    """A conversation behind example dialogues, its own system message before them."""
    head = [message for message in messages[:1] if message.role == "system"]
    return [*head, *(message for shot in shots for message in as_shot(shot)), *messages[len(head) :]]


def thinking(question: Question) -> Question:
    """The question with the request to think first behind the last thing that the user said, in its language."""
    said = [place for place, message in enumerate(question.messages) if message.role == "user"]
    if not said:
        return question
    last = question.messages[said[-1]]
    told = replace(last, content=f"{last.content}\n{THINK[bool(CHINESE.search(last.content))]}")
    messages = (*question.messages[: said[-1]], told, *question.messages[said[-1] + 1 :])
    return replace(question, messages=messages)


def concluded(text: str) -> str:
    """What stands behind the last "Answer:"; all of a text that has none."""
    return CONCLUSION.split(text)[-1].strip()


# ---- replies ---------------------------------------------------------------------------------------------------------


def ask(
    system: Tuned | Endpoint, asked: Sequence[Question], options: EvaluateOptions, shots: Sequence[Chat] = ()
) -> tuple[list[Reply], Cost]:
    """A reply to every question, and what they took. RunError where an address does not answer."""
    from weitiao.evaluate.tasks import completions
    from weitiao.generate.engine import positions
    from weitiao.generate.toolset import able

    asked = [thinking(question) for question in asked] if options.thoughts else list(asked)
    started = time.monotonic()
    if isinstance(system, Endpoint):
        replies, prompt_tokens, new_tokens = _remotely(system, asked, options, shots)
        return replies, Cost(len(asked), prompt_tokens, new_tokens, time.monotonic() - started)
    tuned = replace(system, renderer=able(system.renderer, any(one.tools for one in (*asked, *shots))))
    room = positions(tuned.model)
    limit = None if room is None else max(1, room - options.max_new_tokens)
    counted = [0, 0]

    def answer(prompts: Sequence[Sequence[int]]) -> list[str]:
        done = completions(tuned, prompts, options)
        counted[:] = sum(map(len, prompts)), sum(len(one.ids) for one in done)
        return [one.text for one in done]

    replies = locally(asked, answer, tuned.renderer, shots, limit, options.thoughts)
    return replies, Cost(len(asked), counted[0], counted[1], time.monotonic() - started)


def locally(
    asked: Sequence[Question],
    answer: Callable[[list[list[int]]], Sequence[str]],
    renderer: Renderer,
    shots: Sequence[Chat] = (),
    limit: int | None = None,
    thoughts: bool = False,
) -> list[Reply]:
    """Replies by ``answer``, which maps prompts (token ids) to texts and is called once.

    ``shots`` are whole dialogues put before each conversation as if they were its beginning; as many of the last ones
    are dropped as do not fit in ``limit`` prompt tokens, and it is said how often. A prompt that is too long without
    any is answered by nothing, which is said too.
    """
    prompts = [_prompt(question, renderer, shots, limit) for question in asked]
    dropped = sum(missing > 0 for _, missing in prompts)
    if dropped:
        message = "{count} of {total} prompts had no room for all {shots} example dialogues"
        say(message, count=dropped, total=len(asked), shots=len(shots))
    fitting = [prompt for prompt, _ in prompts if prompt is not None]
    if count := len(prompts) - len(fitting):
        message = "{count} of {total} prompts are longer than {limit} tokens and count as wrong"
        say(message, count=count, total=len(asked), limit=limit)
    texts = iter(answer(fitting) if fitting else ())
    replies = []
    for prompt, _ in prompts:
        text = "" if prompt is None else next(texts)
        parsed = renderer.parsed(concluded(text) if thoughts else text)
        replies.append(Reply(parsed.content, parsed.calls, tuple(parsed.problems), text))
    if unreadable := sum(bool(reply.problems) for reply in replies):
        say("{count} of {total} answers hold a call that cannot be read", count=unreadable, total=len(asked))
    return replies


def _prompt(
    question: Question, renderer: Renderer, shots: Sequence[Chat], limit: int | None
) -> tuple[list[int] | None, int]:
    """The prompt with as many shots as fit, and how many did not; None where none would do."""
    for count in range(len(shots), -1, -1):
        ids = renderer.prompt(with_shots(question.messages, shots[:count]), question.tools)
        if limit is None or len(ids) <= limit:
            return list(ids), len(shots) - count
    return None, len(shots)


def _remotely(
    endpoint: Endpoint, asked: Sequence[Question], options: EvaluateOptions, shots: Sequence[Chat]
) -> tuple[list[Reply], int, int]:
    """Replies of an address, and the tokens that it counted."""
    prompts = [(with_shots(question.messages, shots), question.tools) for question in asked]
    answers = answer_all(endpoint, prompts, options.max_new_tokens)
    if cut := sum(answer.cut for answer in answers):
        message = "{cut} of {total} answers were cut at {tokens} tokens (max_new_tokens, or the model's last position)"
        say(message, cut=cut, total=len(answers), tokens=options.max_new_tokens)
    replies = []
    for answer in answers:
        content = concluded(answer.content) if options.thoughts else answer.content.strip()
        replies.append(Reply(content, answer.calls, answer.problems, answer.content))
    return replies, sum(one.prompt_tokens for one in answers), sum(one.new_tokens for one in answers)
