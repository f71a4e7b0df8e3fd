"""Every method with a task's head: the head trains too, is counted, saved and found again, on every kind of family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from tests.methods.test_matrix import METHODS as LANGUAGE
from tests.train.support import method_of, train
from weitiao.data.batch import Example, collate
from weitiao.data.render import Renderer
from weitiao.errors import InputError
from weitiao.methods.base import trainable
from weitiao.methods.io import open_model, save
from weitiao.models import heads, shape, tiny
from weitiao.models.heads import Head
from weitiao.models.load import ModelOptions, load, load_tokenizer

METHODS: dict[str, dict[str, Any]] = LANGUAGE | {"head": {"name": "head"}}
FAMILIES = ("llama", "gpt2", "bert")
HEAD = Head(("差", "中", "好"))
UNSUPPORTED = {  # what the error says
    ("prefix_tuning", "bert"): "no cache",
    ("expand", "bert"): "norms what its blocks add up",
}
CELLS = [(name, family) for name in METHODS for family in FAMILIES if (name, family) not in UNSUPPORTED]
cells = pytest.mark.parametrize(("name", "family"), CELLS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in found.items():
        tiny.make(family, folder)
    return found


def texts(count: int = 8, seed: int = 0) -> list[Example]:
    """Random rows, each with a class."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        ids = draw.integers(5, 300, int(draw.integers(2, 20))).astype(np.int32)
        made.append(Example(ids, np.arange(len(ids)) == len(ids) - 1, f"row:{number}", np.array(number % 3)))
    return made


def scores(model: Any, examples: list[Example]) -> torch.Tensor:
    batch = collate(examples, 0)
    with torch.no_grad():
        return heads.scores(model.eval(), batch.ids, batch.attention)


def based(folder: Path) -> Any:
    return load(ModelOptions(path=str(folder), dtype="float32"), head=HEAD)


@cells
def test_the_head_trains_too_and_all_is_saved(name: str, family: str, folders: dict[str, Path], tmp_path: Path):
    method, model = method_of(METHODS[name]), based(folders[family])
    found, before = shape.read(model.config), {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(0)
    model = method.attach(model)
    assert sum(p.numel() for p in trainable(model).values()) == method.count(found)
    rate = {"ia3": 0.05, "full": 3e-3, "freeze": 3e-3, "expand": 3e-3, "head": 0.05}.get(name, 0.01)
    options = {"epochs": 60, "batch_size": 8, "learning_rate": rate, "schedule": "constant", "evaluate_every": "none"}
    done, model, _ = train(tmp_path / "run", texts(), model=(model, method), task={"name": "classify"}, options=options)
    learnt = [line["loss"] for line in done.history if "loss" in line]
    assert learnt[-1] < learnt[0] - 0.2
    after = trainable(model)
    for tensor in found.head:
        (module,) = (part for part in found.head_modules if tensor.startswith(f"{part}."))
        last = tensor.removeprefix(f"{module}.")
        here = next(p for n, p in after.items() if f"{module}." in n and n.endswith(f".{last}"))
        assert here.dtype == torch.float32 and not torch.equal(here, before[tensor])
    tokenizer = load_tokenizer(folders[family])
    save(model, method, tokenizer, Renderer.of(tokenizer), tmp_path / "saved", base=str(folders[family]))
    again = open_model(tmp_path / "saved", dtype="float32")
    assert heads.of(again.model.config) == HEAD
    torch.testing.assert_close(scores(again.model, texts()), scores(model, texts()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "family"), UNSUPPORTED)
def test_what_cannot_be_says_why(name: str, family: str, folders: dict[str, Path]):
    with pytest.raises(InputError, match=UNSUPPORTED[name, family]):
        method = method_of(METHODS[name])
        method.count(shape.read(heads.put_on(tiny.make(family).config, HEAD)))
        method.attach(based(folders[family]))


@pytest.mark.parametrize("name", ["lora", "adalora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3"])
def test_peft_opens_what_was_saved(name: str, folders: dict[str, Path], tmp_path: Path):
    method, model = method_of(METHODS[name]), based(folders["llama"])
    model = method.attach(model)
    options = {"max_steps": 3, "learning_rate": 0.05, "warmup_steps": 0}
    _, model, _ = train(tmp_path / "run", texts(), model=(model, method), task={"name": "classify"}, options=options)
    tokenizer = load_tokenizer(folders["llama"])
    save(model, method, tokenizer, Renderer.of(tokenizer), tmp_path / "saved", base=str(folders["llama"]))
    base = AutoModelForSequenceClassification.from_pretrained(folders["llama"], num_labels=3, pad_token_id=0)
    theirs = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    for example in texts(4, seed=5):
        batch = collate([example], 0)
        ids = batch.ids[:, : len(example)]
        with torch.no_grad():
            found = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(scores(model, [example]), found.float(), rtol=0, atol=1e-4)


def test_a_head_alone_needs_a_head():
    with pytest.raises(InputError, match="has no head of a task"):
        method_of({"name": "head"}).count(shape.read(tiny.make("llama").config))


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in ("llama3", "rwkv", "chatglm")])
def test_padding_on_either_side_changes_nothing(family: str):
    """Also where the padding is the end token, and where a text itself ends with it."""
    config = heads.put_on(tiny.make(family).config, HEAD)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    examples = texts(6)
    alone = torch.cat([scores(model, [example]) for example in examples])
    for pad in (0, int(examples[0].ids[-1])):
        batch = collate(examples, pad)
        with torch.no_grad():
            right = heads.scores(model, batch.ids, batch.attention)
            width = batch.ids.shape[1]
            left_ids, left_seen = torch.full_like(batch.ids, pad), torch.zeros_like(batch.attention)
            for row, example in enumerate(examples):
                left_ids[row, width - len(example) :] = torch.from_numpy(example.ids.astype(np.int64))
                left_seen[row, width - len(example) :] = 1
            torch.testing.assert_close(right, alone, rtol=0, atol=1e-5)
            if "bert" not in family:  # an encoder's first place is its [CLS], which stands at the left edge
                torch.testing.assert_close(heads.scores(model, left_ids, left_seen), alone, rtol=0, atol=1e-5)


def test_our_scores_are_transformers_own_where_those_can_tell(tmp_path: Path):
    config = heads.put_on(tiny.make("gpt2").config, HEAD)
    config.pad_token_id = 0
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = collate(texts(6), 0)
    with torch.no_grad():
        theirs = model(input_ids=batch.ids, attention_mask=batch.attention).logits
    torch.testing.assert_close(heads.scores(model, batch.ids, batch.attention), theirs, rtol=0, atol=1e-5)
