"""Messages and tools to tokens and back: the one renderer of training, chat, serving and evaluation.

    renderer = Renderer.of(tokenizer, tools=True)
    renderer.render(chat)                              # Rendered(ids, mask, text)
    renderer.prompt(messages, tools)                   # ids up to where the assistant begins
    renderer.parse(text)                               # Message("assistant", content, calls)

The text is what the model's own chat template writes, in a sandbox with limits, and nothing else. The mask is found
from the template too: a turn of the assistant is what the conversation has beyond the prompt that leads there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.data import sandbox
from weitiao.data import tools as tool_calls
from weitiao.data.examples import Examples, examples
from weitiao.data.messages import as_dicts, fold_system, number_calls
from weitiao.data.rows import Call, Chat, Message
from weitiao.data.spans import Marker, Piece, Rendered, encode_text
from weitiao.data.templates import FALLBACK, TEMPLATES, named_template, own_template, save_template
from weitiao.errors import InputError, t

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["EMPTY_THOUGHT", "FALLBACK", "Examples", "Rendered", "Renderer", "encode_text", "examples"]

OWN = "own"

PROBE_SYSTEM = "weitiao probe: system"
PROBE_CALL = Call("probe_tool", {"probe_argument": "weitiao probe: value"})
PROBE_TOOL = tool_calls.wrapped(
    {
        "name": PROBE_CALL.name,
        "description": "weitiao probe: description",
        "parameters": {"type": "object", "properties": {"probe_argument": {"type": "string", "description": "value"}}},
    }
)
PROBE_RESULT = "weitiao probe: result"
PROBE_ANSWER = "weitiao probe: answer"
QUESTION, ANSWER = Message("user", "weitiao probe: question"), Message("assistant", PROBE_ANSWER)
PROBE = Chat((QUESTION, ANSWER, QUESTION, ANSWER))
TOOL_PROBE = Chat(
    (QUESTION, Message("assistant", calls=(PROBE_CALL,)), Message("tool", PROBE_RESULT, name=PROBE_CALL.name), ANSWER),
    tools=(PROBE_TOOL,),
)

EMPTY_THOUGHT = re.compile(r"^\s*(?:<think>)?\s*</think>\s*")
NO_THOUGHTS = "{%- set enable_thinking = false -%}"


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant: the characters of the prompt that leads to it, and the text up to where it is done."""

    start: int
    text: str


class Renderer:
    """A tokenizer with the chat template that is used with it.

    ``said`` is what a person should be told about the choice of template; ``why_no_tools`` why the template cannot be
    used with tools ("" if it can); ``syntax`` how calls are written (a name of ``tools.SYNTAXES``); ``folds_system``
    whether system text goes before the first question; ``stop_ids`` the tokens that end a turn.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: str, template_name: str = OWN, said: Sequence[str] = ()
    ):
        if tokenizer.eos_token_id is None:
            raise InputError(t("{tokenizer}: the tokenizer has no eos token", tokenizer=tokenizer.name_or_path))
        self.tokenizer, self.template, self.template_name = tokenizer, template, template_name
        self.said = list(said)
        self.folds_system, self._numbers_calls, self.why_no_tools = False, False, ""
        self.stop_ids: list[int] = []
        self.folds_system = self._refuses_system()
        whole = self.text(PROBE.messages)
        if not all(message.content in whole for message in PROBE.messages):
            raise InputError(t("the chat template leaves out the words of a conversation"))
        tail = whole[whole.rindex(PROBE_ANSWER) + len(PROBE_ANSWER) :]
        self.marker = Marker(tokenizer, more_ends=tail.split())
        self._around = self._probe_answer()
        self.why_no_tools, self.syntax = self._probe_tools()
        self.ends_turns, self.stop_ids = self._probe_ends()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, tools: bool = False, override: str | None = None) -> Renderer:
        """The renderer with the tokenizer's own chat template, or with ``override`` (a Jinja file or the name of a
        template), or, where there is no template or none that can write ``tools``, with ``weitiao-plain``.

        InputError if an override cannot write the tools, and if a tuned folder's template is not the one it was tuned
        with.
        """
        if override is not None:
            renderer = cls(tokenizer, named_template(override), override)
            if tools and renderer.why_no_tools:
                message = "chat template {name} cannot be used with tools: {reason}"
                raise InputError(t(message, name=override, reason=renderer.why_no_tools))
            return renderer
        own = own_template(tokenizer, tools)
        if own is None:
            reason = t("the tokenizer has no chat template")
        else:
            name = next((name for name, template in TEMPLATES.items() if template == own), OWN)
            renderer = cls._own(tokenizer, own, name)
            if not tools or not renderer.why_no_tools:
                return renderer
            reason = t("the model's chat template cannot be used with tools ({reason})", reason=renderer.why_no_tools)
        said = t("{reason}; using the template {name}, and saving it with the model", reason=reason, name=FALLBACK)
        return cls(tokenizer, TEMPLATES[FALLBACK], FALLBACK, [said])

    @classmethod
    def _own(cls, tokenizer: PreTrainedTokenizerFast, template: str, name: str) -> Renderer:
        """The model's own template; with thoughts switched off where its generation prompt opens one that the answers
        of a conversation do not have."""
        try:
            return cls(tokenizer, template, name)
        except InputError:
            if "enable_thinking" not in template:
                raise
        said = t("the model's chat template is used, and saved, with enable_thinking off: rows have no thoughts")
        return cls(tokenizer, NO_THOUGHTS + template, f"{name}, enable_thinking off", [said])

    @property
    def can_call(self) -> bool:
        """Whether the template writes tools, calls and results in a way that can be trained and read."""
        return not self.why_no_tools

    # --- messages to text and tokens

    def text(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generate: bool = False,
    ) -> str:
        """What the chat template writes; ``generate``: up to where the assistant begins. InputError with the template's
        own words if it refuses the conversation."""
        return self._text(self.conversation(messages), tools, generate)

    def prompt(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """The tokens to generate from: the conversation so far, and the beginning of the assistant's turn."""
        return self.marker.ids(self.text(messages, tools, generate=True))

    def render(self, chat: Chat, train_on: str = "assistant") -> Rendered:
        """The whole conversation, token by token what the chat template writes, with the mask of what is trained.

        A turn that the template writes differently once the conversation goes on (Qwen 3 takes out earlier thoughts) is
        not marked here; ``renders`` has it as an example of its own.
        """
        whole, turns = self._turns(chat, train_on)
        spans = tuple((turn.start, len(turn.text)) for turn in turns if whole.startswith(turn.text))
        (rendered,) = self.marker.mark([Piece(whole, spans)])
        return rendered if train_on != "all" else Rendered(rendered.ids, [True] * len(rendered.ids), whole)

    def renders(self, chats: Sequence[Chat], train_on: str = "assistant") -> list[list[Rendered] | InputError]:
        """What is trained on, for every conversation: itself, or one example per assistant turn where the template or
        the tokenizer writes earlier turns differently. An eos is added where the template ends the last turn with no
        token of its own. A conversation that the template refuses gives the error in its place."""
        found: list[list[Rendered] | InputError] = []
        pieces: list[Piece] = []
        places: list[int] = []
        for place, chat in enumerate(chats):
            found.append([])
            try:
                own = self._pieces(chat, train_on)
            except InputError as error:
                found[place] = error
                continue
            pieces += own
            places += [place] * len(own)
        for place, made in zip(places, self.marker.examples(pieces), strict=True):
            row = found[place]
            assert isinstance(row, list)
            row += [self._ended(rendered, train_on) for rendered in made]
        return found

    def left_out(self, chat: Chat) -> bool:
        """Whether the template leaves out words of an assistant turn (some do so beside a call)."""
        whole = self.text(chat.messages, chat.tools)
        return any(
            message.role == "assistant" and message.content.rpartition("</think>")[2].strip() not in whole
            for message in chat.messages
        )

    def _ended(self, rendered: Rendered, train_on: str) -> Rendered:
        """With an eos after a last answer that the template leaves open, and with everything marked for ``all``."""
        ids, mask, text = rendered.ids, rendered.mask, rendered.text
        if train_on == "all":
            mask = [True] * len(ids)
        stop = len(mask) - (mask[::-1].index(True) if True in mask else len(mask))
        if not self.ends_turns and stop and not self.marker.decode(ids[stop:]).strip():
            ids, mask = [*ids[:stop], self.marker.eos_id], [*mask[:stop], True]
            text = text.rstrip() + self.marker.eos_token
        return Rendered(ids, mask, text)

    def _pieces(self, chat: Chat, train_on: str) -> list[Piece]:
        whole, turns = self._turns(chat, train_on)
        if all(whole.startswith(turn.text) for turn in turns):
            return [Piece(whole, tuple((turn.start, len(turn.text)) for turn in turns))]
        return [Piece(turn.text, ((turn.start, len(turn.text)),)) for turn in turns]

    def _turns(self, chat: Chat, train_on: str) -> tuple[str, list[_Turn]]:
        """The whole text, and the turns to train. An assistant's turn that opens the conversation is context: no prompt
        leads there."""
        conversation = self.conversation(chat.messages)
        whole = self._text(conversation, chat.tools, False)
        places = [place for place, message in enumerate(conversation) if message["role"] == "assistant" and place]
        places = {"assistant": places, "last": places[-1:], "all": []}[train_on]
        turns = []
        for place in places:
            prompt = self._text(conversation[:place], chat.tools, True)
            last = place == len(conversation) - 1
            text = whole if last else self._text(conversation[: place + 1], chat.tools, False)
            if not text.startswith(prompt):
                raise InputError(_not_begun(prompt, text))
            turns.append(_Turn(len(prompt), text))
        return whole, turns

    def _text(self, conversation: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], generate: bool) -> str:
        if self.why_no_tools and (tools or any(message.get("tool_calls") for message in conversation)):
            raise InputError(t("the chat template cannot be used with tools: {reason}", reason=self.why_no_tools))
        if not conversation:
            reason = t("it is empty")
            raise InputError(t("the chat template refuses this conversation: {reason}", reason=reason))
        given = [{key: value for key, value in message.items() if value is not None} for message in conversation]
        values = {
            "messages": given,
            "tools": [tool_calls.wrapped(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": generate,
        }
        return sandbox.render(self.template, values | self.tokenizer.special_tokens_map)

    def conversation(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The dictionaries that the template is given: calls numbered and system text folded where it needs that."""
        conversation = as_dicts(messages)
        if self._numbers_calls:
            conversation = number_calls(conversation)
        return fold_system(conversation) if self.folds_system else conversation

    # --- tokens and text to messages

    def decode(self, ids: Sequence[int]) -> str:
        """What the model wrote: special tokens included, since some of them introduce calls; the end of turn not."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.marker.decode(ids[:end])

    def parsed(self, text: str) -> tool_calls.Parsed:
        """An assistant's text as words, calls and what looked like a call and is none. What the template itself writes
        around an answer is taken off; a thought stays among the words unless it is empty, and is not searched for
        calls."""
        for stop in self.stop_ids:
            text = text.strip().removesuffix(self.marker.decode([stop]))
        before, after = self._around
        text = EMPTY_THOUGHT.sub("", text.strip().removeprefix(before).removesuffix(after))
        thought, mark, answer = text.rpartition("</think>")
        parsed = tool_calls.parse_calls(answer, self.syntax)
        if not mark:
            return parsed
        return tool_calls.Parsed(f"{thought}{mark}\n\n{parsed.content}".strip(), parsed.calls, parsed.problems)

    def parse(self, text: str) -> Message:
        """An assistant's text as a message."""
        parsed = self.parsed(text)
        return Message("assistant", parsed.content, parsed.calls)

    # --- files

    def save(self, folder: str | Path) -> None:
        """Write the template into a tuned model's folder, after the tokenizer's own files, which hold the old one."""
        save_template(Path(folder), self.template, self.template_name)

    # --- probes: what the template can do is found by using it

    def _refuses_system(self) -> bool:
        """Whether a system turn is refused or dropped; it is then put before the first question, and that is said."""
        try:
            if PROBE_SYSTEM in self.text([Message("system", PROBE_SYSTEM), QUESTION, ANSWER]):
                return False
        except InputError:
            pass
        return True

    def _probe_answer(self) -> tuple[str, str]:
        """What the template writes around an answer, its end-of-turn token apart (``<|channel|>final<|message|>``)."""
        _, turns = self._turns(PROBE, "last")
        before, _, after = turns[0].text[turns[0].start :].partition(PROBE_ANSWER)
        return before.strip(), _without(after, self._ends()).strip()

    def _ends(self) -> list[str]:
        return [self.marker.decode([token]) for token in self.marker.end_ids]

    def _probe_tools(self) -> tuple[str, str | None]:
        """Why the template cannot be used with tools ("" if it can), and the syntax of its calls."""
        reason = ""
        for numbered in (False, True):  # some templates want call ids, the others are better off without
            self._numbers_calls = numbered
            try:
                reason, syntax = self._try_tools()
            except InputError as error:
                reason = str(error)
                continue
            if not reason:
                return "", syntax
        self._numbers_calls = False
        return reason, None

    def _try_tools(self) -> tuple[str, str | None]:
        self.why_no_tools, self.syntax = "", None
        _, turns = self._turns(TOOL_PROBE, "assistant")
        written = turns[0].text[turns[0].start :]
        if PROBE_CALL.name not in self.text([QUESTION], [PROBE_TOOL], generate=True):
            return t("it does not write the tools"), None
        if PROBE_CALL.arguments["probe_argument"] not in written:
            return t("it does not write calls"), None
        if PROBE_RESULT not in turns[-1].text:
            return t("it does not write results"), None
        for self.syntax in tool_calls.SYNTAXES:
            if self.parsed(_without(written, self._ends())).calls == (PROBE_CALL,):
                return "", self.syntax
        return t("it writes calls in an unknown way: {text}", text=written.strip()), None

    def _probe_ends(self) -> tuple[bool, list[int]]:
        """Whether the template ends the last turn with a token, and every token that ends a turn."""
        chats = [PROBE] if self.why_no_tools else [PROBE, TOOL_PROBE]
        stops, ended = {self.marker.eos_id}, True
        for chat in chats:
            for piece in self._pieces(chat, "assistant"):
                (rendered,) = self.marker.mark([piece])
                for place, trained in enumerate(rendered.mask):
                    if trained and not any(rendered.mask[place + 1 : place + 2]):
                        stops |= {rendered.ids[place]} & self.marker.end_ids
                last = max((place for place, trained in enumerate(rendered.mask) if trained), default=0)
                ended = ended and rendered.ids[last] in self.marker.end_ids
        return ended, sorted(stops)


def _without(text: str, ends: Sequence[str]) -> str:
    """``text`` without the end-of-turn token it closes with."""
    text = text.strip()
    return next((text.removesuffix(end) for end in ends if text.endswith(end)), text)


def _not_begun(prompt: str, text: str) -> str:
    same = next((place for place, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), len(text))
    message = (
        "the chat template's generation prompt is not how it begins the answer: it has {prompt} where the conversation "
        "has {text}, so training would not be what is served; name another one in data.chat_template (weitiao-plain)"
    )
    return t(message, prompt=repr(prompt[same - 10 : same + 20]), text=repr(text[same - 10 : same + 20]))
