"""Perplexity: the loss of the training loop, on rows of text or on the assistant's turns of conversations.

figures = evaluate(model, examples, pad_id=0, tokenizer=tokenizer)
figures                         # {"loss", "perplexity", "tokens", "bits_per_byte"}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weitiao.config import build
from weitiao.data.batch import Example, collate, plan_epoch
from weitiao.data.examples import examples as make_examples
from weitiao.data.rows import Chat
from weitiao.data.sources import DataOptions, read
from weitiao.errors import InputError, say, t
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation
from weitiao.generate.engine import positions
from weitiao.generate.toolset import able
from weitiao.train.logps import token_logps
from weitiao.train.losses import nll
from weitiao.train.modes import evaluating

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
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    lengths = [len(example) for example in examples]
    with evaluating(model):
        for batches in plan_epoch(lengths, 64, BATCH_TOKENS, 0, 0):
            for rows in batches:
                batch = collate([examples[row] for row in rows], pad_id, positions(model)).to(device)
                total += nll(token_logps(model, batch.ids, None, batch.mask), batch.mask).double().cpu()
    loss = total.item() / tokens
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens}
    if tokenizer is not None and (text_bytes := sum(_bytes(example, tokenizer) for example in examples)):
        figures["bits_per_byte"] = total.item() / math.log(2) / text_bytes
    return figures


def _bytes(example: Example, tokenizer: Any) -> int:
    """Bytes of the trained tokens' text; a character whose first bytes were not trained does not count."""
    trained = [int(token) for token in example.ids[1:][example.mask[1:]]]
    text = tokenizer.decode(trained, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.replace("\ufffd", "").encode())


def task(tuned: Tuned, options: EvaluateOptions) -> Evaluation:
    """Perplexity on a file: every token of plain text, the assistant's turns of conversations."""
    data = build(DataOptions, {})
    source = read(options.data, data)
    chats = [row for row in source.rows if isinstance(row, Chat)]
    kind = "sft" if chats else "pretrain"
    renderer = able(tuned.renderer, any(chat.tools for chat in chats))
    examples = make_examples(source.rows, renderer, data, kind, max_positions=positions(tuned.model))
    for line in (*source.said, *examples.said):
        say("{line}", line=line)
    pad_id: Any = tuned.tokenizer.pad_token_id  # load_tokenizer sees to it that there is one
    return Evaluation(evaluate(tuned.model, examples, pad_id, tuned.tokenizer))
