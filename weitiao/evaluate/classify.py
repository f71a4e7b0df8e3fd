"""Labels of texts: accuracy, F1, which class is taken for which, and whether the probabilities can be believed.

    scores = predict(model, examples, pad_id=0)                 # [rows, labels]
    figures = measure(scores, targets, Head(("差", "好")))
    figures["accuracy"], figures["macro_f1"], figures["calibration_error"], figures["f1: 好"]

Definitions. macro_f1 is the mean of the classes' F1, a class that never occurs and is never predicted left out;
micro_f1 counts all marks together; with several labels a text, accuracy counts texts whose labels are all right, and a
label is predicted from probability 1/2 on. The calibration error is the mean distance of confidence and accuracy over
ten equal bins of confidence, weighted by their texts (Guo et al., arXiv 1706.04599).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weitiao.config import build
from weitiao.data.batch import Example, collate, plan_epoch
from weitiao.data.labels import labelled
from weitiao.data.rows import text_of
from weitiao.data.sources import DataOptions, read
from weitiao.errors import InputError, say, t
from weitiao.evaluate.bootstrap import Measure, Resampling, mean, ratio
from weitiao.evaluate.tasks import LABEL_MEASURES, EvaluateOptions, Evaluation
from weitiao.models import heads
from weitiao.models.heads import Head

if TYPE_CHECKING:
    from torch import nn

    from weitiao.methods.io import Tuned

BATCH_TOKENS = 8192
BINS = 10


def predict(model: nn.Module, examples: Sequence[Example], pad_id: int) -> np.ndarray:
    """What the head says of every row [rows, labels], before any softmax."""
    from weitiao.generate.engine import positions
    from weitiao.train.modes import evaluating
    from weitiao.train.progress import counting

    found: dict[int, np.ndarray] = {}
    device = next(model.parameters()).device
    with evaluating(model), counting(t("measuring")) as progress:
        for batches in plan_epoch([len(example) for example in examples], 64, BATCH_TOKENS, 0, 0):
            for rows in batches:
                batch = collate([examples[row] for row in rows], pad_id, positions(model)).to(device)
                found |= dict(zip(rows, heads.scores(model, batch.ids, batch.attention).cpu().numpy(), strict=True))
                progress(len(found), len(examples))
    return np.stack([found[row] for row in range(len(examples))])


def watch(examples: Sequence[Example], pad_id: int, head: Head) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluator for the training loop: the measures of a model on these rows."""

    def measured(model: nn.Module) -> dict[str, float]:
        figures = measure(predict(model, examples, pad_id), targets(examples), head, samples=1)
        values = {name: figures[name] for name in LABEL_MEASURES if name in figures}
        return {name: value["value"] if isinstance(value, Mapping) else value for name, value in values.items()}

    return measured


def targets(examples: Sequence[Example]) -> np.ndarray:
    """The labels of all rows: classes [rows], marks [rows, labels], or numbers [rows]."""
    return np.stack([example.labels for example in examples if example.labels is not None])


def measure(
    scores: np.ndarray, gold: np.ndarray, head: Head, groups: Sequence[str] = (), samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Every measure of ``scores`` [rows, labels] against ``gold``; intervals draw whole ``groups`` of rows."""
    if head.kind == "regression":
        return _regression(scores[:, 0], gold)
    drawn = Resampling(groups or [str(row) for row in range(len(gold))], samples, seed)
    said, true, _, _ = _read(scores, gold, head)
    counts = np.stack([said & true, said, true], axis=2).astype(np.int64)  # [rows, labels, 3]
    figures: dict[str, Any] = {
        name: drawn.of(measure).as_dict() for name, measure in measures(scores, gold, head).items()
    }
    if head.kind != "multi":
        figures["majority"] = float(true.sum(0).max() / len(gold))  # what always saying the commonest class would reach
    figures["calibration_error"] = details(scores, gold, head)["calibration_error"]
    return figures | {f"f1: {label}": _class(*counts.sum(0)[n].tolist()) for n, label in enumerate(head.labels)}


def measures(scores: np.ndarray, gold: np.ndarray, head: Head) -> dict[str, Measure]:
    """What the figures of all rows are made of, a row a text."""
    if head.kind == "regression":
        return {"mse": mean((scores[:, 0] - gold) ** 2, higher=False)}
    said, true, right, _ = _read(scores, gold, head)
    counts = np.stack([said & true, said, true], axis=2).astype(np.int64)
    made = {"accuracy": ratio(right.astype(np.int64), np.ones(len(gold), np.int64))}
    made["macro_f1"] = Measure(counts.reshape(len(gold), -1), _macro_f1)
    if head.kind == "multi":
        made["micro_f1"] = Measure(counts.sum(1), lambda sums: float(np.nan_to_num(_f1(sums))))
    return made


def details(scores: np.ndarray, gold: np.ndarray, head: Head) -> dict[str, Any]:
    """What pictures are drawn from: ``bins`` of confidence, and for one class a text ``confusion``, how often a class
    (row) was taken for one (column)."""
    said, true, right, confidence = _read(scores, gold, head)
    if head.kind == "multi":
        return _calibration(confidence.ravel(), (said == true).ravel())
    return _calibration(confidence, right) | {"confusion": (true.T.astype(np.int64) @ said.astype(np.int64)).tolist()}


def _read(scores: np.ndarray, gold: np.ndarray, head: Head) -> tuple[Any, Any, Any, Any]:
    """Labels said and true [rows, labels], which rows are right, and how sure the model was."""
    if head.kind == "multi":
        chances = 1 / (1 + np.exp(-scores))
        said, true = chances >= 0.5, gold > 0.5
        return said, true, (said == true).all(1), np.maximum(chances, 1 - chances)
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    one = np.eye(len(head.labels), dtype=bool)
    said, true = one[chances.argmax(1)], one[gold]
    return said, true, (said & true).any(1), chances.max(1)


def _f1(sums: np.ndarray) -> np.ndarray:
    """F1 of (right, said, true) in the last axis; 0 where nothing is right, NaN where nothing was said or true."""
    whole = sums[..., 1] + sums[..., 2]
    return np.where(whole > 0, 2 * sums[..., 0] / np.maximum(whole, 1), np.nan)


def _macro_f1(flat: np.ndarray) -> float:
    found = _f1(flat.reshape(-1, 3))
    return float(np.nanmean(found)) if not np.isnan(found).all() else 0.0


def _class(right: int, said: int, true: int) -> dict[str, float]:
    """One class's F1 as a figure, with what it is made of."""
    shares = {"precision": right / max(said, 1), "recall": right / max(true, 1)}
    return {"value": 2 * right / max(said + true, 1), **shares, "count": true}


def _calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """The error, and of every bin of confidence that holds any: mean confidence, accuracy, count."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [
        {"confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean()), "count": int(here.sum())}
        for number in range(BINS)
        if (here := place == number).any()
    ]
    error = sum(abs(one["confidence"] - one["accuracy"]) * one["count"] for one in bins) / max(len(confidence), 1)
    return {"calibration_error": float(error), "bins": bins}


def _regression(said: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    """Mean squared and absolute error, the share of variance explained (R²), and Pearson's correlation."""
    error, spread = said - gold, ((gold - gold.mean()) ** 2).sum()
    varied = len(gold) > 1 and said.std() > 0 and gold.std() > 0
    return {
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "r2": float(1 - (error**2).sum() / spread) if spread > 0 else 0.0,
        "pearson": float(np.corrcoef(said, gold)[0, 1]) if varied else 0.0,
        "count": len(gold),
    }


def task(tuned: Tuned, options: EvaluateOptions) -> Evaluation:
    """A model with a head on a file of labelled texts; ``options.pictures`` names a folder for the confusion matrix and
    the calibration."""
    from weitiao.evaluate.plot import confusion, reliability
    from weitiao.generate.engine import positions

    head = heads.of(tuned.model.config)
    if head is None:
        raise InputError(t("--task classify: {base} is a language model and has no head for labels", base=tuned.base))
    data = build(DataOptions, {"allow_truncated": 1})
    source = read(options.data, data, "classify")
    examples = labelled(source.rows, tuned.tokenizer, head, data, positions(tuned.model))
    for line in (*source.said, *examples.said):
        say("{line}", line=line)
    pad_id: Any = tuned.tokenizer.pad_token_id
    scores, gold = predict(tuned.model, examples, pad_id), targets(examples)
    groups = [row.group or row.id for row in source.rows]
    figures = measure(scores, gold, head, groups, options.samples, options.seed)
    if options.pictures is not None and head.kind != "regression":
        folder, drawn = Path(options.pictures), details(scores, gold, head)
        folder.mkdir(parents=True, exist_ok=True)
        reliability(drawn["bins"], folder / "calibration.png")
        if "confusion" in drawn:
            confusion(drawn["confusion"], head.labels, folder / "confusion.png")
    said = partial(_said, head=head)
    lines = [
        {"id": example.id, "gold": said(target, gold=True), "predicted": said(row)}
        for example, target, row in zip(examples, gold, scores, strict=True)
    ]
    keyed = [group or str(place) for place, group in enumerate(groups)]
    return Evaluation(figures, lines, measures(scores, gold, head), keyed, [text_of(row) for row in source.rows])


def _said(row: np.ndarray, head: Head, gold: bool = False) -> Any:
    """A class by its name, the names of several, or a number."""
    if head.kind == "regression":
        return float(row if gold else row[0])
    if head.kind == "single":
        return head.labels[int(row) if gold else int(row.argmax())]
    return [label for label, value in zip(head.labels, row, strict=True) if value > (0.5 if gold else 0.0)]
