"""From logits to the next token: repetition penalty, temperature, top-k, top-p, one uniform number per row and step.

    options = SampleOptions(temperature=0.7, top_p=0.9, max_new_tokens=128)
    Sampler(options, rows=[0, 1], prompts=[[5, 6], [7]], device=device)(logits)      # [2, V] -> [2]

A row draws from its own stream, seeded by (seed, row), so what it says does not depend on which rows share its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from weitiao.config import Options


class SampleOptions(Options):
    """How the next token is chosen and when generation ends."""

    temperature: float = Field(
        default=0.0, ge=0, description="0 takes the likeliest token; 1 samples from the model's own distribution"
    )
    top_k: int | None = Field(default=None, ge=1, description="sample among the k likeliest tokens only")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="sample among the likeliest tokens whose probabilities reach this sum"
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="above 1, tokens already in the prompt or the answer become less likely"
    )
    max_new_tokens: int = Field(default=256, ge=1, description="tokens after which an answer is cut")
    seed: int = Field(default=0, ge=0, description="seed of sampling; row i draws from the stream (seed, i)")
    stop: list[str] = Field(default=[], description="texts that end an answer; they are not part of it")


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the ``seen`` tokens (bool, [B, V]) less likely: logits [B, V] are divided by ``penalty``, negative ones
    multiplied (Keskar et al. 2019, "CTRL", section 4.1).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def restrict(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set to -inf all logits [B, V] outside the ``top_k`` likeliest and outside the nucleus ``top_p``.

    The nucleus is the smallest set of likeliest tokens whose probabilities sum to at least ``top_p`` (Holtzman et al.
    2020); it is never empty.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = torch.topk(logits, top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ranked, order = torch.sort(logits, descending=True, stable=True)
        chances = ranked.softmax(-1)
        before = chances.cumsum(-1) - chances
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Token [B] at which the cumulative distribution of logits [B, V] first exceeds ``uniform`` [B] in [0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    threshold = uniform.double().unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)


class Sampler:
    """The choice of next tokens for the rows of one batch; ``keep`` follows the batch when it shrinks.

    ``rows`` are the rows' numbers (they seed the streams), ``prompts`` their token ids (for the repetition penalty).
    """

    def __init__(
        self, options: SampleOptions, rows: Sequence[int], prompts: Sequence[Sequence[int]], device: torch.device
    ):
        self.options = options
        self.prompts = prompts
        self.step = 0
        self.seen: Tensor | None = None
        self.uniform: Tensor | None = None
        if options.temperature > 0:
            streams = [np.random.default_rng((options.seed, row)) for row in rows]
            # float32 in [0, 1 - 2^-24], so that the product with a double sum stays below the sum
            drawn = np.stack([stream.random(options.max_new_tokens, dtype=np.float32) for stream in streams])
            self.uniform = torch.from_numpy(drawn).to(device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] -> token ids [B]; call once per step."""
        options, logits = self.options, logits.float()
        if options.repetition_penalty != 1:
            if self.seen is None:
                self.seen = self._seen_in_prompts(logits)
            logits = penalize(logits, self.seen, options.repetition_penalty)
        if self.uniform is None:
            tokens = logits.argmax(-1)
        else:
            logits = restrict(logits / options.temperature, options.top_k, options.top_p)
            tokens = draw(logits, self.uniform[:, self.step])
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens

    def keep(self, index: Tensor) -> None:
        """Go on with the batch rows ``index`` only."""
        if self.uniform is not None:
            self.uniform = self.uniform[index]
        if self.seen is not None:
            self.seen = self.seen[index]

    def _seen_in_prompts(self, logits: Tensor) -> Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            seen[row, torch.tensor(list(prompt), device=logits.device)] = True
        return seen
