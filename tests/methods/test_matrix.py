"""Every method on every family and every kind of base: one cell, all properties.

A sample that changes nothing but its size with the seed runs in ``make test``; ``make matrix`` runs every cell. A cell
that cannot be stands in ``UNSUPPORTED`` with the reason that its error prints, and fails once the reason is gone.
"""

from __future__ import annotations

import os
import random
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.support import method_of, rows, train, weights_hash
from weitiao.data.batch import collate
from weitiao.errors import InputError
from weitiao.generate.engine import generate
from weitiao.generate.sample import SampleOptions
from weitiao.methods.base import computing, trainable
from weitiao.methods.io import open_model, save
from weitiao.models import shape, tiny
from weitiao.models.load import load_tokenizer
from weitiao.models.quantized import dequantize, quantize
from weitiao.train.logps import token_logps

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "freeze": {"name": "freeze", "blocks": 1},
    "expand": {"name": "expand", "blocks": 1},
    "prompt_tuning": {"name": "prompt_tuning", "tokens": 4},
    "p_tuning": {"name": "p_tuning", "tokens": 4, "encoder_hidden": 16},
    "prefix_tuning": {"name": "prefix_tuning", "tokens": 4},
    "adapter": {"name": "adapter", "size": 8},
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "pissa": {"name": "lora", "rank": 4, "initialize": "pissa"},
    "adalora": {"name": "adalora", "rank": 4, "target_rank": 2, "every": 1},
    "ia3": {"name": "peft", "kind": "IA3"},
}
FAMILIES = [name for name in tiny.FAMILIES if "bert" not in name]
BASES = ("float32", "bfloat16", "nf4")
CELLS = [(method, family, base) for method in METHODS for family in FAMILIES for base in BASES]
UNSUPPORTED = {  # (method, family, base), "*" for any: what the error says
    ("full", "*", "nf4"): "every linear trains",
    ("prefix_tuning", "rwkv", "*"): "no cache of keys and values",
}
CHANGES_THE_BASE = ("full", "freeze", "expand", "pissa")
STARTS_ELSEWHERE = ("prompt_tuning", "p_tuning", "prefix_tuning")
SAMPLE = 24


def unsupported(cell: tuple[str, str, str]) -> str | None:
    """What the error of a cell says that cannot be."""
    fits = (said for wanted, said in UNSUPPORTED.items() if all(map(fnmatchcase, cell, wanted)))
    return next(fits, None)


def cells() -> list[Any]:
    """Every cell if asked for, else a sample that is the same every time."""
    whole = os.environ.get("WEITIAO_MATRIX") == "1"
    chosen = CELLS if whole else random.Random(0).sample(CELLS, SAMPLE)
    return [pytest.param(*cell, id="-".join(cell)) for cell in chosen if unsupported(cell) is None]


matrix = pytest.mark.parametrize(("name", "family", "base"), cells())


def base_model(family: str, base: str, training: Any = ()) -> Any:
    """A tiny model held as ``base`` says."""
    dtype = torch.float32 if base == "nf4" else getattr(torch, base)
    model = tiny.make(family).to(dtype)
    model.config.dtype = dtype
    return quantize(model, "nf4", training=training) if base == "nf4" else model


def plain(name: str, family: str, base: str) -> Any:
    """The model that the method is put on: of codes only what it does not train."""
    return base_model(family, base, method_of(METHODS[name]).base_names(shape.read(tiny.make(family).config)))


def attached(name: str, family: str, base: str) -> tuple[Any, Any]:
    """A model with the method on it, and the method."""
    method, model = method_of(METHODS[name]), plain(name, family, base)
    torch.manual_seed(0)
    return method.attach(model), method


def moved(name: str, family: str, base: str, folder: Path, **options: Any) -> tuple[Any, Any, Any]:
    """The same after a few steps at a high rate: model, method, run."""
    model, method = attached(name, family, base)
    settings = {"max_steps": 3, "learning_rate": 0.03, "warmup_steps": 0, **options}
    _, model, run = train(folder, rows(8), METHODS[name], model=(model, method), options=settings)
    return model.eval(), method, run


def logps(model: Any, examples: Any) -> torch.Tensor:
    """Log-probabilities of every token of ``examples``, padded to one batch."""
    batch = collate(examples, 0)
    with torch.no_grad(), computing(model):
        return token_logps(model, batch.ids, None, batch.mask).float()


def close(one: torch.Tensor, other: torch.Tensor, family: str, base: str) -> None:
    """Rounding may turn a router's near tie, and another expert then says something else."""
    tolerance = {"float32": 1e-4, "nf4": 1e-4, "bfloat16": 0.5 if "moe" in family else 0.15}[base]
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@matrix
def test_starts_as_the_base_and_can_be_switched_off(name: str, family: str, base: str, tmp_path: Path):
    untouched = logps(plain(name, family, base).eval(), rows(3))
    model, method = attached(name, family, base)
    if name not in STARTS_ELSEWHERE:
        close(logps(model.eval(), rows(3)), untouched, family, base)
    model, method, _ = moved(name, family, base, tmp_path / "run")
    changed = logps(model, rows(3))
    assert not torch.equal(changed, untouched)
    if name in CHANGES_THE_BASE:
        with pytest.raises(InputError, match="switched"):
            method.disabled(model)
        return
    with method.disabled(model):
        close(logps(model, rows(3)), untouched, family, base)
    assert torch.equal(logps(model, rows(3)), changed)


@matrix
def test_learns_eight_rows(name: str, family: str, base: str, tmp_path: Path):
    model, method = attached(name, family, base)
    before = logps(model.eval(), rows(8)).mean()
    rate = {"prompt_tuning": 0.3, "p_tuning": 0.02, "ia3": 0.1, "full": 0.01, "freeze": 0.01, "expand": 0.01}
    options = {"epochs": 30, "batch_size": 8, "learning_rate": rate.get(name, 0.05), "schedule": "constant"}
    _, model, _ = train(tmp_path, rows(8), METHODS[name], model=(model, method), options=options)
    after = logps(model.eval(), rows(8)).mean()
    assert after > before + 0.1, f"{before:.3f} -> {after:.3f}"


@matrix
def test_keeping_activations_or_computing_them_again_is_the_same(name: str, family: str, base: str, tmp_path: Path):
    kept, again = (
        moved(name, family, base, tmp_path / memory, memory=memory, max_grad_norm=1e9)[0] for memory in ("fast", "low")
    )
    one, two = trainable(kept), trainable(again)
    for parameter, value in one.items():
        torch.testing.assert_close(value, two[parameter], rtol=0, atol=1e-5 if base != "bfloat16" else 0.02)


@matrix
def test_resumed_is_uninterrupted(name: str, family: str, base: str, tmp_path: Path):
    options = {"epochs": 2, "max_steps": None, "save_every": 1, "keep": 9, "learning_rate": 0.01}
    whole, _, run = moved(name, family, base, tmp_path / "whole", **options)
    for path in sorted(run.checkpoints.glob("step-*"))[2:]:
        path.rename(tmp_path / path.name)
    model, method = attached(name, family, base)
    settings = {"warmup_steps": 0, **options}
    _, resumed, _ = train(run.path, rows(8), METHODS[name], model=(model, method), options=settings, resume=True)
    assert weights_hash(resumed) == weights_hash(whole)


@matrix
def test_a_row_alone_is_a_row_in_a_batch(name: str, family: str, base: str, tmp_path: Path):
    model, _, _ = moved(name, family, base, tmp_path)
    examples = rows(4, seed=3)
    together = logps(model, examples)
    alone = torch.cat([logps(model, [example]) for example in examples])
    close(alone, together, family, base)


@matrix
def test_answers_with_a_cache_are_those_without(name: str, family: str, base: str, tmp_path: Path):
    model, _, _ = moved(name, family, base, tmp_path)
    prompts = [[7, 8, 9, 10, 11], [20, 21]]
    options = SampleOptions(max_new_tokens=6)
    answers = generate(model, prompts, options, stop_ids=(), pad_id=0)
    alone = [generate(model, [prompt], options, stop_ids=(), pad_id=0)[0] for prompt in prompts]
    for prompt, answer, single in zip(prompts, answers, alone, strict=True):
        if base != "bfloat16":  # whose rounding may turn a near tie
            assert list(answer.ids) == list(single.ids)
        ids = [*prompt]
        for token in answer.ids:
            with torch.no_grad(), computing(model):
                scores = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            assert scores.max() - scores[token] <= (0.3 if base == "bfloat16" else 1e-3)
            ids.append(token)


@matrix
def test_saved_opened_and_merged_is_the_same(name: str, family: str, base: str, tmp_path: Path):
    folder = tiny.make(family, tmp_path / "base")
    dtype = "float32" if base == "nf4" else base
    start = open_model(folder, dtype=dtype)
    model, method, _ = moved(name, family, base, tmp_path / "run")
    tokenizer = load_tokenizer(folder)
    out = save(model, method, tokenizer, start.renderer, tmp_path / "out", str(folder))
    wanted = logps(model, rows(3))
    opened = open_model(out, dtype=dtype)
    close(logps(opened.model, rows(3)), wanted, family, base)
    if name in (*STARTS_ELSEWHERE, "adapter"):
        with pytest.raises(InputError, match="cannot be merged"):
            method.merge(model)
        return
    close(logps(method.merge(dequantize(model)), rows(3)), wanted, family, base)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if unsupported(cell)], ids="-".join)
def test_what_cannot_be_says_why(cell: tuple[str, str, str]):
    with pytest.raises(InputError, match=unsupported(cell)):
        attached(*cell)


def test_few_cells_cannot_be():
    assert len(list(filter(unsupported, CELLS))) <= 0.05 * len(CELLS)
