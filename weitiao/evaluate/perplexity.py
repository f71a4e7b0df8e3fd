"""Perplexity: the loss of the training loop, on rows of text or on the assistant's turns of conversations.

figures = evaluate(model, examples, pad_id=0, tokenizer=tokenizer)
figures                         # {"loss", "perplexity", "tokens", "bits_per_byte"}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from weitiao.config import build
from weitiao.data.batch import Example, collate, plan_epoch
from weitiao.data.examples import examples as make_examples
from weitiao.data.rows import Chat, Row
from weitiao.data.sources import DataOptions, read
from weitiao.errors import InputError, say, t
from weitiao.evaluate.bootstrap import Measure, ratio
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation
from weitiao.generate.engine import positions
from weitiao.generate.toolset import able
from weitiao.train.logps import token_logps
from weitiao.train.modes import evaluating
from weitiao.train.progress import counting

if TYPE_CHECKING:
    from weitiao.methods.io import Tuned

BATCH_TOKENS = 8192  # padded tokens measured together


def evaluate(model: nn.Module, examples: Sequence[Example], pad_id: int, tokenizer: Any = None) -> dict[str, float]:
    """Mean negative log-likelihood (nats) per trained token of all ``examples``, its exponential, and the token count.

    With ``tokenizer`` also ``bits_per_byte``: bits per UTF-8 byte of the trained tokens' text, which compares models
    with different tokenizers. InputError if no token is trained.
    """
    tokens = sum(example.trained_tokens for example in examples)
    if not tokens:
        raise InputError(t("there is no token to measure: the mask of every row is empty"))
    total = float(row_losses(model, examples, pad_id).sum())
    loss = total / tokens
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens}
    if tokenizer is not None and (text_bytes := sum(_bytes(example, tokenizer) for example in examples)):
        figures["bits_per_byte"] = total / math.log(2) / text_bytes
    return figures


def row_losses(model: nn.Module, examples: Sequence[Example], pad_id: int) -> np.ndarray:
    """Negative log-likelihood (nats) of each example's trained tokens, float64 [examples]."""
    device, found = next(model.parameters()).device, np.zeros(len(examples))
    lengths = [len(example) for example in examples]
    done = 0
    with evaluating(model), counting(t("measuring")) as progress:
        for batches in plan_epoch(lengths, 64, BATCH_TOKENS, 0, 0):
            for rows in batches:
                batch = collate([examples[row] for row in rows], pad_id, positions(model)).to(device)
                logps = token_logps(model, batch.ids, None, batch.mask).double().cpu().numpy()
                ends = np.cumsum([examples[row].trained_tokens for row in rows])
                found[rows] = [-part.sum() for part in np.split(logps, ends[:-1])]
                progress(done := done + len(rows), len(examples))
    return found


def measures(losses: np.ndarray, examples: Sequence[Example], tokenizer: Any) -> dict[str, Measure]:
    """What the figures are made of, a row an example: bits per byte first, which compares any two tokenizers."""
    tokens = np.array([example.trained_tokens for example in examples])
    text_bytes = np.array([_bytes(example, tokenizer) for example in examples])
    counts = np.stack([losses, tokens], axis=1)
    return {
        "bits_per_byte": ratio(losses / math.log(2), text_bytes, higher=False),
        "loss": ratio(losses, tokens, higher=False),
        "perplexity": Measure(counts, lambda sums: math.exp(min(sums[0] / max(sums[1], 1), 700)), higher=False),
    }


def _bytes(example: Example, tokenizer: Any) -> int:
    """Bytes of the trained tokens' text; a character whose first bytes were not trained does not count."""
    trained = [int(token) for token in example.ids[1:][example.mask[1:]]]
    text = tokenizer.decode(trained, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.replace("\ufffd", "").encode())


def task(tuned: Tuned, options: EvaluateOptions) -> Evaluation:
    """Perplexity on a file: every token of plain text, the assistant's turns of conversations; each row's loss is its
    prediction."""
    source = read(options.data, build(DataOptions, {}))
    for line in source.said:
        say("{line}", line=line)
    examples, losses = measured(tuned, source.rows)
    made = measures(losses, examples, tuned.tokenizer)
    counts = {name: measure.counts for name, measure in made.items()}
    figures = {"loss": made["loss"].value, "perplexity": made["perplexity"].value}
    figures["tokens"] = int(counts["loss"][:, 1].sum())
    if counts["bits_per_byte"][:, 1].sum():
        figures["bits_per_byte"] = made["bits_per_byte"].value
    lines = [
        {"id": example.id, "loss": float(loss / tokens), "tokens": int(tokens)}
        for example, (loss, tokens) in zip(examples, counts["loss"], strict=True)
    ]
    return Evaluation(figures, lines, made, [example.id or str(place) for place, example in enumerate(examples)])


def measured(tuned: Tuned, rows: Sequence[Row]) -> tuple[Sequence[Example], np.ndarray]:
    """Rows as examples, and the loss of each; what a person should be told of the rows is said."""
    data, chats = build(DataOptions, {}), [row for row in rows if isinstance(row, Chat)]
    renderer = able(tuned.renderer, any(chat.tools for chat in chats))
    kind = "sft" if chats else "pretrain"
    examples = make_examples(rows, renderer, data, kind, max_positions=positions(tuned.model))
    for line in examples.said:
        say("{line}", line=line)
    pad_id: Any = tuned.tokenizer.pad_token_id  # load_tokenizer sees to it that there is one
    return examples, row_losses(tuned.model, examples, pad_id)
