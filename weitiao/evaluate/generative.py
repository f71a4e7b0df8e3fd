"""Answers beside the true ones: exact match, BLEU, ROUGE-L and chrF, each a figure that two systems can be compared by.

    evaluation = evaluate(open_model("runs/first"), EvaluateOptions(task="generate", data="test.jsonl"))
    evaluation.figures["exact_match"]               # {"value": 0.62, "low": 0.55, "high": 0.69, "count": 180}

Definitions. Exact match compares without regard to case, width (NFKC) and white space. BLEU is sacrebleu's with its
tokens for Chinese (a character each; other text in words, Post 2018), chrF sacrebleu's too (Popović 2015), both over
the corpus, 0 to 100. ROUGE-L is the mean F1 of the longest common subsequence of the same tokens (Lin 2004), 0 to 1.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from weitiao.data.endpoint import Endpoint
from weitiao.errors import InputError, t
from weitiao.evaluate.ask import ask, conversations, draw_shots, questions
from weitiao.evaluate.bootstrap import Measure, mean
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation, figures_of

if TYPE_CHECKING:
    from weitiao.methods.io import Tuned

WORDS, CHARACTERS = 4, 6  # the longest n-grams of BLEU and chrF
RECALL = 2  # chrF weighs recall as much more than precision


def task(tuned: Tuned | Endpoint, options: EvaluateOptions) -> Evaluation:
    """Every answer of the assistant in a file of conversations, and a prediction for each."""
    asked = [one for one in questions(conversations(options.data)) if not one.gold.calls]
    if not asked:
        raise InputError(
            t("{path}: no turn of the assistant in words; calls are what task dialogue measures", path=options.data)
        )
    replies, cost = ask(tuned, asked, options, draw_shots(options))
    said = [without_thought(reply.content) for reply in replies]
    lines: list[dict[str, Any]] = [
        {"id": one.id, "turn": one.turn, "prompt": one.asked, "gold": one.gold.content, "predicted": text}
        for one, text in zip(asked, said, strict=True)
    ]
    made = measures([(one.gold.content, text) for one, text in zip(asked, said, strict=True)])
    groups = [one.id for one in asked]
    return Evaluation(figures_of(made, groups, options), lines, made, groups, [one.asked for one in asked], cost=cost)


def measures(pairs: Sequence[tuple[str, str]]) -> dict[str, Measure]:
    """What the figures of (gold, predicted) texts are made of, a row a pair."""
    tokens = [(tokenized(gold), tokenized(said)) for gold, said in pairs]
    return {
        "exact_match": mean([normal(gold) == normal(said) for gold, said in pairs]),
        "bleu": Measure(_rows([ngram_counts(*pair, WORDS) for pair in tokens], 2 + 2 * WORDS), _bleu),
        "rouge_l": mean([rouge_l(*pair) for pair in tokens]),
        "chrf": Measure(_rows([_chrf_counts(*pair) for pair in pairs], 3 * CHARACTERS), _chrf),
    }


def without_thought(text: str) -> str:
    """An answer without the thought that a reasoning model writes before it."""
    return text.rpartition("</think>")[2].strip()


def normal(text: str) -> str:
    """A text as exact match compares it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@cache
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    return TokenizerZh()


def tokenized(text: str) -> list[str]:
    """Chinese by character, anything else by word and sign: sacrebleu's ``zh``."""
    return _tokenizer()(text).split()


def ngram_counts(gold: Sequence[str], said: Sequence[str], orders: int) -> tuple[int, ...]:
    """(tokens said, tokens gold, matched n-grams by order, said n-grams by order)."""
    matched, total = [], []
    for order in range(1, orders + 1):
        ours, theirs = _grams(said, order), _grams(gold, order)
        matched.append((ours & theirs).total())
        total.append(ours.total())
    return (len(said), len(gold), *matched, *total)


def _grams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def rouge_l(gold: Sequence[str], said: Sequence[str]) -> float:
    """F1 of the longest common subsequence; 1 where both are empty."""
    if not gold or not said:
        return float(not gold and not said)
    row = [0] * (len(gold) + 1)
    for token in said:
        before = 0
        for place, other in enumerate(gold, 1):
            before, row[place] = row[place], before + 1 if token == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(gold) + len(said))


def _chrf_counts(gold: str, said: str) -> tuple[int, ...]:
    """(said, gold, matched) character n-grams of each order, white space left out."""
    ours, theirs = "".join(said.split()), "".join(gold.split())
    counts: list[int] = []
    for order in range(1, CHARACTERS + 1):
        hyp, ref = _grams(ours, order), _grams(theirs, order)
        counts += (hyp.total() if ref else 0, ref.total(), (hyp & ref).total())
    return tuple(counts)


def _chrf(sums: np.ndarray) -> float:
    """chrF of summed counts: precision and recall are means over the orders that both sides have."""
    said, gold, matched = sums.reshape(-1, 3).T
    both = (said > 0) & (gold > 0)
    if not both.any():
        return 0.0
    precision, recall = (matched[both] / said[both]).mean(), (matched[both] / gold[both]).mean()
    below = RECALL**2 * precision + recall
    return float(100 * (1 + RECALL**2) * precision * recall / below) if below else 0.0


def _bleu(sums: np.ndarray) -> float:
    from sacrebleu.metrics.bleu import BLEU

    said, gold, *grams = (int(count) for count in sums)
    return BLEU.compute_bleu(grams[:WORDS], grams[WORDS:], said, gold, smooth_method="exp").score


def _rows(counts: Sequence[Sequence[int]], width: int) -> np.ndarray:
    return np.array(counts, dtype=np.int64).reshape(-1, width)
