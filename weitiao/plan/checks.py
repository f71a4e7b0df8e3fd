"""What is wrong with a recipe as a whole: files that are not there, options of different sections that contradict.

for key, what in (*absent(recipe, generators), *contradictions(recipe, measured=False)):
    print(f"{key}: {what}")
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from weitiao import config, machine
from weitiao.data import crosswoz
from weitiao.data.formats import rows_in
from weitiao.data.remote import is_remote
from weitiao.data.sources import GENERATE, DataOptions
from weitiao.data.tokenizer import TokenizerOptions
from weitiao.errors import InputError, t
from weitiao.evaluate.tasks import LABEL_MEASURES, EvaluateOptions
from weitiao.methods.base import Method
from weitiao.methods.lora import IN_CODES
from weitiao.models.load import ModelOptions
from weitiao.runs import FULL, Run, command, held, is_run
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import TaskOptions

SHARDED_METHODS, SHARDED_OPTIMIZERS = ("full", "freeze", "lora"), ("adamw", "sgd", "lion")


class Sections(Protocol):
    """The sections of a recipe, as the rooms to the left of it see them."""

    @property
    def model(self) -> ModelOptions: ...
    @property
    def method(self) -> Method: ...
    @property
    def data(self) -> DataOptions: ...
    @property
    def task(self) -> TaskOptions: ...
    @property
    def train(self) -> TrainOptions: ...
    @property
    def evaluate(self) -> EvaluateOptions | None: ...
    @property
    def output(self) -> str: ...


def unwritable(output: Path, base: str) -> str:
    """Why the folder of a run from the model ``base`` cannot be written; "" where nothing stands in its way."""
    below = Path(base).absolute()
    if output in (below, *below.parents):
        return t("would overwrite the base model {path}", path=base)
    place = next((path for path in (output, *output.parents) if path.exists()), output)
    if not place.is_dir():
        return t("cannot be written: {path} is a file", path=place)
    try:  # the system may grant on paper what it then refuses, as in /proc
        os.rmdir(tempfile.mkdtemp(prefix=".weitiao-", dir=place))
    except OSError as error:
        if error.errno not in FULL:
            return t("cannot be written: {path}: {reason}", path=place, reason=error.strerror)
    if foreign := Run(output).foreign:
        message = "holds no run, but what a run would replace: {names}; name another folder"
        return t(message, names=", ".join(foreign))
    return ""


def absent(recipe: Sections, generators: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Files and folders that the recipe names and that are not there."""
    data, known = recipe.data, list(generators)
    names = [source.path for source in data.sources]
    if data.format == "crosswoz":
        if problem := crosswoz.missing(data.folder, crosswoz.part_of(recipe.task.name)):
            yield "data.folder", problem
    elif not names:
        yield "data.train", t("is required: a file of rows, or a list of them")
    for name in names:
        if not name.startswith(GENERATE):
            yield from _exists("data.train", name)
        elif known and name.removeprefix(GENERATE) not in known:
            yield "data.train", t("{name}: no such generator ({names})", name=name, names=", ".join(known))
    model, replay = recipe.model, data.replay
    for name in [replay] if isinstance(replay, str) else replay or []:
        if not name.startswith(GENERATE):
            yield from _exists("data.replay", name)
    others = {
        "data.validation": data.validation,
        "data.test": data.test,
        "data.tools": data.tools,
        "data.patch": data.patch,
        "model.config": model.config,
        "model.tokenizer": model.tokenizer,
    }
    if recipe.evaluate:
        others |= {"evaluate.data": measured_on(recipe), "evaluate.shot_data": recipe.evaluate.shot_data}
        if not measured_on(recipe) and data.format != "crosswoz":
            yield "evaluate.data", t("is required: the file to measure on")
    for key, name in others.items():
        yield from _exists(key, name)


def measured_on(recipe: Sections) -> str | None:
    """The file or folder that the result is measured on: the evaluation's own, or the data's test file or folder."""
    test = recipe.data.test if isinstance(recipe.data.test, str) else None
    return (recipe.evaluate.data if recipe.evaluate else "") or test or recipe.data.folder


def _exists(key: str, name: object) -> Iterator[tuple[str, str]]:
    if isinstance(name, str) and not is_remote(name) and not Path(name).expanduser().exists():
        yield key, t("{path}: no such file or folder", path=name)


def contradictions(recipe: Sections, measured: bool) -> Iterator[tuple[str, str]]:
    """Options of different sections that cannot go together."""
    new, trained = recipe.model.config is not None, isinstance(recipe.model.tokenizer, dict)
    if new and recipe.method.saves == "adapter":
        message = "{method} saves what it adds and not the new model (model.config) below it; take method.name=full"
        yield "method.name", t(message, method=recipe.method.model_dump()["name"])
    if trained and not new:
        yield "model.tokenizer", t("a new tokenizer fits no existing model; give model.config for a new one")
    if isinstance(recipe.model.tokenizer, dict):
        try:
            config.build(TokenizerOptions, recipe.model.tokenizer)
        except InputError as error:
            yield from (("model.tokenizer", problem) for problem in error.problems)
    if recipe.train.paged_optimizer and machine.device() == "cpu" and machine.in_memory(recipe.output):
        message = "{path} lies in memory (tmpfs), where a file frees none; take an output on a disk"
        yield "train.paged_optimizer", t(message, path=recipe.output)
    if getattr(recipe.method, "target_parameters", ()) and recipe.model.quantize != "none":
        yield "method.target_parameters", t(IN_CODES)
    yield from _shards(recipe)
    if recipe.evaluate and (recipe.evaluate.task == "lm-eval" or ".py:" in recipe.evaluate.task):
        yield (
            "evaluate.task",
            t("a recipe names no code; measure with weitiao eval RUN --task {task}", task=recipe.evaluate.task),
        )
    measured = measured or (recipe.task.name == "classify" and recipe.train.best in LABEL_MEASURES)
    if recipe.train.best not in (None, "loss") and not measured:
        yield "train.best", t("nothing measures {name}; take loss or null", name=recipe.train.best)


def _shards(recipe: Sections) -> Iterator[tuple[str, str]]:
    """Options that FSDP2 cannot go with: what does not do on a shard of a tensor what it does on the whole."""
    if recipe.train.distributed != "fsdp2":
        return
    method = recipe.method
    message = "{name} does not work on shards; take {names}, or train.distributed=ddp"
    if (name := method.model_dump()["name"]) not in SHARDED_METHODS or getattr(method, "initialize", "zero") != "zero":
        yield "method.name", t(message, name=name, names=", ".join(SHARDED_METHODS))
    if recipe.train.optimizer not in SHARDED_OPTIMIZERS:
        yield "train.optimizer", t(message, name=recipe.train.optimizer, names=", ".join(SHARDED_OPTIMIZERS))
    if recipe.train.paged_optimizer:
        yield "train.paged_optimizer", t(message, name="paged_optimizer", names="false")
    if recipe.model.quantize != "none":
        yield "model.quantize", t(message, name=recipe.model.quantize, names="none")


def stage_names(stages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Stages need names, which become folders."""
    names = [stage.get("name") for stage in stages]
    for number, name in enumerate(names):
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            yield f"stages.{number}.name", t("needs a name that can be a folder's")
        elif name in names[:number]:
            yield f"stages.{number}.name", t("is another stage's name too")


def laid_over(above: Mapping[str, Any], stage: Mapping[str, Any], first: bool, last: bool) -> dict[str, Any]:
    """``stage`` over the sections above it; a section that chooses another name starts from that choice's defaults."""
    values = {key: value for key, value in above.items() if key not in ("stages", "output")}
    if not last:
        values.pop("evaluate", None)
    if not first:
        kept = ("dtype", "quantize", "double_quantization")
        values["model"] = {key: value for key, value in (above.get("model") or {}).items() if key in kept}
    for key, value in stage.items():
        old = values.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same = value.get("name", old.get("name")) == old.get("name")
            value = {**old, **value} if same else value
        if key != "name":
            values[key] = value
    return values


def refuse_what_is_no_recipe(path: Path) -> None:
    """InputError for rows, a run or a model where a recipe is expected, with the command that was probably meant."""
    if is_run(path):
        raise InputError(held(path))
    if (path / "config.json").is_file():
        meant = command("weitiao", "train", f"model.path={path}", "data.train=rows.jsonl", "output=runs/first")
        message = "{path}: a model, not a recipe; to tune it: {command}"
    elif path.is_file() and rows_in(path):
        meant = command("weitiao", "train", f"data.train={path}", "output=runs/first")
        message = "{path}: a file of rows, not a recipe; to train on it: {command}"
    else:
        return
    raise InputError(t(message, path=path, command=meant))
