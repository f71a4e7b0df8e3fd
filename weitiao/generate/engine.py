"""Generation: our own decoding loop over a transformers model and its key-value cache.

    done = generate(model, [[1, 5, 9], [1, 7]], SampleOptions(max_new_tokens=32), stop_ids=[2], pad_id=0)
    for piece in stream(model, tokenizer, prompt, SampleOptions(), stop_ids=[2]): print(piece, end="")

Prompts are sorted by length into batches; what all prompts of a batch begin with is computed once; rows that are done
leave the batch and its cache; the head runs at the last position only. In float32 the result equals one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weitiao.errors import InputError, t
from weitiao.generate.cache import roomy
from weitiao.generate.decode import Decoder
from weitiao.generate.detokenize import Detokenizer, decode
from weitiao.generate.sample import SampleOptions, Sampler
from weitiao.methods.base import compute_dtype, computing
from weitiao.methods.virtual import leading
from weitiao.models import modules
from weitiao.models.products import FEW
from weitiao.models.quantized import keep_plain, quantized

SHARED_PREFIX_TOKENS = 16  # a shorter common prefix is not worth a forward pass of its own
CACHE, STATE = "past_key_values", "state"  # how a model is told its past
SHRINK_AT = 0.75  # the cache is compacted when no more than this share of its rows is still being written


@dataclass(frozen=True)
class Completion:
    """An answer: its token ids without the stop token, why it ended, and its text where a tokenizer was given."""

    ids: list[int]
    finish: Literal["stop", "length"]
    text: str = ""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    options: SampleOptions | None = None,
    *,
    stop_ids: Collection[int],
    pad_id: int,
    tokenizer: Any = None,
    on_token: Callable[[int, int], object] | None = None,
    on_done: Callable[[int, Completion], object] | None = None,
    batch_size: int = 32,
) -> list[Completion]:
    """Answers to ``prompts`` (token ids), in their order.

    ``stop_ids`` end an answer. ``tokenizer`` fills in ``Completion.text`` and is needed for ``options.stop``.
    ``on_token(row, id)`` sees every token as it is chosen, ``on_done(row, completion)`` every answer as it ends.
    A row also ends (``length``) at the model's last position. InputError: an empty prompt, one longer than the model's
    positions, stop texts without a tokenizer."""
    options = options or SampleOptions()
    check_prompts(model, prompts)
    if options.stop and tokenizer is None:
        raise InputError(t("stop texts need a tokenizer"))
    longest = max(map(len, prompts), default=0) + options.max_new_tokens
    _spread_out(model, longest)
    done: dict[int, Completion] = {}

    def finish(row: int, completion: Completion) -> None:
        done[row] = completion
        if on_done is not None:
            on_done(row, completion)

    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    batch_size = batch_size if modules.takes(model, CACHE) else 1
    with evaluating(model):
        batch_size = FEW if batch_size > FEW and Decoder.of(model, FEW, longest) else batch_size  # which is quicker
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            _generate_batch(model, prompts, rows, options, frozenset(stop_ids), pad_id, tokenizer, on_token, finish)
    return [done[row] for row in range(len(prompts))]


def _spread_out(model: PreTrainedModel, longest: int) -> None:
    """Spread codes out once, where tokens are not decoded from them as they are."""
    if quantized(model):
        with evaluating(model):
            decoder = Decoder.of(model, 1, longest)
        if decoder is None:
            keep_plain(model, compute_dtype(model))


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    options: SampleOptions,
    stop_ids: frozenset[int],
    pad_id: int,
    tokenizer: Any,
    on_token: Callable[[int, int], object] | None,
    finish: Callable[[int, Completion], None],
) -> None:
    batch = Batch(model, [prompts[row] for row in rows], options, pad_id, rows)
    answers = {row: Answer(tokenizer, options, limit) for row, limit in zip(rows, batch.limits, strict=True)}
    slots: list[int | None] = list(rows)  # the row that each line of the batch writes, None when it is done
    while True:
        for slot, token in enumerate(batch.step()):
            row = slots[slot]
            if row is None:
                continue
            answer = answers[row]
            answer.add(token, stop_ids)
            if on_token is not None and not (answer.finish == "stop" and token in stop_ids):
                on_token(row, token)
            if answer.finish is not None:
                finish(row, answer.completion())
                slots[slot] = None
        live = [slot for slot, row in enumerate(slots) if row is not None]
        if not live:
            return
        if len(live) <= SHRINK_AT * len(slots):
            batch.keep(live)
            slots = [slots[slot] for slot in live]


def stream(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Sequence[int],
    options: SampleOptions | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[str]:
    """The answer to one prompt, piece by piece; a piece never splits a character, nor shows part of a stop text.

    The pieces joined are the text that ``generate`` gives. The generator's return value is its ``Completion``.
    """
    options = options or SampleOptions()
    check_prompts(model, [prompt])
    _spread_out(model, len(prompt) + options.max_new_tokens)
    batch = Batch(model, [prompt], options, pad_id=0, rows=[0])
    answer = Answer(tokenizer, options, batch.limits[0], incremental=True)
    while answer.finish is None:
        with evaluating(model):
            token = batch.step()[0]
        if piece := answer.add(token, frozenset(stop_ids)):
            yield piece
    return answer.completion()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout inside, and the precision of training; a model that was training goes on training afterwards."""
    training = model.training
    dtype = compute_dtype(model)
    mixed = any(parameter.dtype != dtype for parameter in model.parameters())
    model.eval()
    try:
        with computing(model) if mixed else nullcontext():
            yield
    finally:
        if training:
            model.train()


def check_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
    """InputError for every prompt that is empty or longer than the model's positions."""
    limit = positions(model)
    problems = [] if any(modules.takes(model, name) for name in (CACHE, STATE)) else [_no_past(model)]
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            problems.append(t("prompt {row} is empty", row=row))
        elif limit is not None and len(prompt) > limit:
            problems.append(
                t(
                    "prompt {row} has {tokens} tokens; the model has {limit} positions",
                    row=row,
                    tokens=len(prompt),
                    limit=limit,
                )
            )
    if problems:
        raise InputError(problems)


def _no_past(model: PreTrainedModel) -> str:
    message = "{family}: how it carries its past from token to token is unknown here; it can be tuned, not asked"
    return t(message, family=model.config.model_type)


def positions(model: Any) -> int | None:
    """How many tokens the model was made for, prompt and answer together; None where its configuration names none.
    Virtual tokens take theirs."""
    limit = modules.positions(model)
    return None if limit is None else limit - leading(model)


class Answer:
    """One row's answer while it grows: token ids, the text when it is needed, and the rules that end it."""

    def __init__(self, tokenizer: Any, options: SampleOptions, limit: int, incremental: bool = False):
        self.ids: list[int] = []
        self.limit = limit
        self.finish: Literal["stop", "length"] | None = None
        self.tokenizer = tokenizer
        self.text: Detokenizer | None = None
        if tokenizer is not None and (incremental or options.stop):
            self.text = Detokenizer(tokenizer, options.stop)

    def add(self, token: int, stop_ids: frozenset[int]) -> str:
        """Take the next token; the text that is now certain is returned (empty unless text is followed)."""
        piece = ""
        if token in stop_ids:
            self.finish = "stop"
        else:
            self.ids.append(token)
            if self.text is not None:
                piece = self.text.add(token)
                if self.text.stopped:
                    self.finish = "stop"
            if self.finish is None and len(self.ids) >= self.limit:
                self.finish = "length"
        if self.finish is not None and self.text is not None:
            piece += self.text.flush()
        return piece

    def completion(self) -> Completion:
        """The answer as it stands."""
        if self.text is not None:
            text = self.text.text
        else:
            text = decode(self.tokenizer, self.ids) if self.tokenizer is not None else ""
        return Completion(self.ids, self.finish or "length", text)


class Batch:
    """Prompts decoded together, one token per row and ``step``.

    Legend: B rows, T slots of the cache, V vocabulary. The slots are [virtual tokens | shared prefix | padding | own
    prompt | answer]; ``mask`` [B, T] says which are real, and positions count those. Without padding there is no mask.
    A model with a state instead of keys and values is asked one row at a time: padding would enter the state.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        options: SampleOptions,
        pad_id: int,
        rows: Sequence[int],
    ):
        self.model = model
        self.pad_id = pad_id
        self.prompts = [list(map(int, prompt)) for prompt in prompts]
        self.room = room = positions(model)
        self.limits = [
            options.max_new_tokens if room is None else min(options.max_new_tokens, room - len(prompt) + 1)
            for prompt in self.prompts
        ]
        self.device = model.device
        self.sampler = Sampler(options, rows, self.prompts, self.device)
        longest = max(map(sum, zip(map(len, self.prompts), self.limits, strict=True)))
        self.decoder = Decoder.of(model, len(self.prompts), longest)
        self.cache = roomy(model) if modules.takes(model, CACHE) and self.decoder is None else None
        self.state: list[Tensor] | None = None
        self.leading = leading(model)
        self.lengths = torch.tensor([len(prompt) for prompt in self.prompts], device=self.device)
        self.mask: Tensor | None = None
        self.tokens: Tensor | None = None
        self.steps = 0

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of every row: [B] ids."""
        self.tokens = self.sampler(self._prefill() if self.tokens is None else self._decode(self.tokens))
        return self.tokens.tolist()

    @torch.inference_mode()
    def keep(self, slots: Sequence[int]) -> None:
        """Go on with these rows of the batch only; the cache gives up the others' memory."""
        index = torch.tensor(slots, device=self.device)
        if self.decoder is not None:
            self.decoder.keep(index)
        if self.cache is not None:
            self.cache.batch_select_indices(index)
        self.sampler.keep(index)
        self.lengths = self.lengths[index]
        if self.mask is not None:
            self.mask = self.mask[index]
        if self.tokens is not None:
            self.tokens = self.tokens[index]

    def _prefill(self) -> Tensor:
        """Prompts -> the logits [B, V] after their last tokens."""
        shared = self._shared_prefix()
        if self.decoder is not None:
            return self.decoder.prefill(self.prompts, shared)
        if shared and self.cache is not None:
            first = torch.tensor([self.prompts[0][:shared]], device=self.device)
            self._forward(first, torch.arange(shared, device=self.device).unsqueeze(0), None)
            self.cache.batch_repeat_interleave(len(self.prompts))
        rest = [prompt[shared:] for prompt in self.prompts]
        width = max(map(len, rest))
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rest], device=self.device)
        if any(len(row) < width for row in rest):
            pads = width - self.lengths.unsqueeze(1) + shared
            before = self.leading + shared
            slots = torch.arange(before + width + max(self.limits), device=self.device).unsqueeze(0)
            self.mask = (slots < before) | (slots >= before + pads)
            place = (torch.arange(width, device=self.device).unsqueeze(0) - pads).clamp_min(0) + shared
            return self._forward(ids, place, self.mask[:, : before + width])
        place = torch.arange(shared, shared + width, device=self.device).expand(len(rest), -1)
        return self._forward(ids, place, None)

    def _decode(self, tokens: Tensor) -> Tensor:
        if self.decoder is not None:
            return self.decoder.step(tokens)
        place = (self.lengths + self.steps).unsqueeze(1)
        if self.room is not None:  # rows that are done may still sit in the batch
            place = place.clamp_max(self.room - 1)
        self.steps += 1
        mask = self.mask
        if mask is not None and self.cache is not None:
            mask = mask[:, : self.cache.get_seq_length() + 1]
        return self._forward(tokens.unsqueeze(1), place, mask)

    def _forward(self, ids: Tensor, place: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [B, V] after the last of ``ids`` [B, t], which stand at ``place`` behind the virtual tokens."""
        past = {STATE: self.state} if self.cache is None else {CACHE: self.cache}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=place + self.leading,
            use_cache=True,
            logits_to_keep=1,
            **past,
        )
        self.state = getattr(output, STATE, None)
        return output.logits[:, -1]

    def _shared_prefix(self) -> int:
        """Tokens that all prompts begin with and that pay a pass of their own; 0 where slots and positions must agree.

        A sliding window counts slots of the cache: padding between the prefix and the rest would shorten it. Of a
        context that is read in both directions no part can be computed alone.
        """
        if len(self.prompts) < 2 or hasattr(self.model.config, "context"):
            return 0
        if self.decoder is None and (self.cache is None or any(self.cache.is_sliding)):
            return 0
        first, last = min(self.prompts), max(self.prompts)
        shared = next(
            (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
        )
        shared = min(shared, *(len(prompt) - 1 for prompt in self.prompts))
        return shared if shared >= SHARED_PREFIX_TOKENS else 0
