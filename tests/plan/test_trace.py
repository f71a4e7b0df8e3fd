"""What is gone through is what happens: the storages of a real step, and none of their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from weitiao.data.batch import Example
from weitiao.methods import METHODS
from weitiao.methods.base import Method
from weitiao.models import shape, tiny
from weitiao.models.shape import Shape
from weitiao.plan import trace
from weitiao.plan.activations import tape
from weitiao.train.course import Course
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import TaskOptions

TASK = TaskOptions(name="pretrain").build()
FAMILIES = ["llama", "qwen3", "gemma", "mistral", "gpt2", "phi", "glm", "qwen3_moe", "bloom"]


def rows(count: int = 4, longest: int = 96) -> list[Example]:
    """Rows of different lengths, every token trained."""
    random = np.random.default_rng(0)
    lengths = [longest, *random.integers(longest // 2, longest, count - 1)]
    return [
        Example(random.integers(5, 300, n).astype(np.int32), np.ones(n, bool), str(k)) for k, n in enumerate(lengths)
    ]


def found(family: str, **sizes: Any) -> Shape:
    return shape.read(tiny.make(family, **sizes).config)


def stepped(given: Shape, method: Method, dtype: str, **options: Any) -> trace.Traced:
    """One step over two micro-batches."""
    batches = [rows(4), rows(2)]
    return trace.step(
        given, method, TASK, TrainOptions(**options), batches, dtype, recomputed=options.get("memory") == "low"
    )


class Counted(trace.Recorder):
    """The same notes of a step that is really computed."""

    hollow = False

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_lives_is_what_lives_in_a_real_step(family: str, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch):
    given = found(family)
    traced = stepped(given, METHODS[name](), dtype)
    monkeypatch.setattr(trace, "Recorder", Counted)
    real = stepped(given, METHODS[name](), dtype)
    assert traced.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    assert traced.state_bytes == pytest.approx(real.state_bytes, rel=0.01)


@pytest.mark.parametrize("options", [{"optimizer": "muon"}, {"optimizer": "adamw8bit"}, {"optimizer": "adafactor"},
                                     {"memory": "low"}], ids=str)  # fmt: skip
def test_options_too(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    given = found("gemma", num_hidden_layers=3)
    traced = stepped(given, METHODS["full"](), "float32", **options)
    monkeypatch.setattr(trace, "Recorder", Counted)
    real = stepped(given, METHODS["full"](), "float32", **options)
    assert traced.parts == pytest.approx(real.parts, rel=0.02, abs=20_000)


@pytest.mark.parametrize(
    ("family", "name"), [("gemma", "full"), ("phi", "lora"), ("llama", "freeze"), ("gpt2", "expand")]
)
def test_few_blocks_tell_of_many(family: str, name: str, monkeypatch: pytest.MonkeyPatch):
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    given = found(family, **{depth: 12})
    extended = stepped(given, METHODS[name](), "float32")
    monkeypatch.setattr(trace, "NUMBERS", (2, 12))
    monkeypatch.setattr(trace, "Expand", ())
    assert extended.peak_bytes == pytest.approx(stepped(given, METHODS[name](), "float32").peak_bytes, rel=0.02)


def test_a_large_model_takes_no_memory():
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    values = {"model_type": "llama", "num_hidden_layers": 80, "vocab_size": 128256, **sizes}
    given = shape.read(values)
    before = psutil.Process().memory_info().rss
    made = stepped(given, METHODS["lora"](), "bfloat16")
    assert psutil.Process().memory_info().rss - before < 200 << 20
    assert made.peak_bytes > 80 * rows(4)[0].ids.size * 4 * 8192


def test_random_numbers_stay():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    stepped(found("gemma"), METHODS["lora"].model_validate({"dropout": 0.1}), "float32")
    assert torch.equal(torch.rand(3), expected)


def test_what_cannot_be_gone_through_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fails(*_: Any) -> None:
        raise RuntimeError("sizes depend on numbers")

    given, options = found("gemma"), TrainOptions(epochs=1)
    course = Course(rows(), TASK, options)
    kept = tape(given, METHODS["lora"](), "float32")
    worst = trace.Worst(given, METHODS["lora"](), TASK, options, course, "float32", "none", kept)
    assert worst.peak_bytes(1, 0)
    monkeypatch.setattr(trace, "step", fails)
    assert (
        trace.Worst(given, METHODS["lora"](), TASK, options, course, "float32", "none", kept).peak_bytes(1, 0) is None
    )
