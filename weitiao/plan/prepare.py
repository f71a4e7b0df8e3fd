"""What a run is, before a weight is read: base, tokenizer, rows as examples, and the plan.

ready = prepare(recipe, {}, Path("tokenizer"))
print(report.text(ready.plan))
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao import config, machine
from weitiao.data import mapped
from weitiao.data.batch import Example, lengths_of, trained_of
from weitiao.data.labels import head_of, labelled
from weitiao.data.remote import fetched
from weitiao.data.render import Renderer, examples
from weitiao.data.rows import Chat, Row, text_of
from weitiao.data.sources import Generators, Splits
from weitiao.data.sources import load as load_rows
from weitiao.data.tokenizer import TokenizerOptions
from weitiao.data.tokenizer import train as train_tokenizer
from weitiao.errors import InputError, say, t
from weitiao.machine import ranks
from weitiao.methods.base import Method
from weitiao.models import heads, sizes
from weitiao.models import shape as shapes
from weitiao.models.heads import Head
from weitiao.models.load import DEFAULT_MODEL, ModelOptions, choose_dtype, load, load_tokenizer
from weitiao.plan import need, phases
from weitiao.plan.checks import Sections
from weitiao.plan.later import ONE, Answers
from weitiao.plan.need import ITEM_BYTES, Facts, Plan
from weitiao.plan.report import size
from weitiao.runs import Run, command, is_run
from weitiao.train.progress import counting
from weitiao.weights import fetch, inspect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Given:
    """What a plan goes by beside the recipe. ``file_bytes``: of the weights' files, 0 for a new model;
    ``fetched_bytes``: of those that come from a hub."""

    shape: shapes.Shape
    train: Sequence[Example]
    validation: Sequence[Example]
    facts: Facts
    file_bytes: int
    fetched_bytes: int = 0
    answers: Answers = ONE


@dataclass(frozen=True)
class Gathered:
    """Everything about a run that is known before a weight is read, but its plan. ``model``: the options with which the
    base is to be loaded; ``tools``: every schema in its own rows; ``training``: the base's own parameters that train;
    ``head``: that of task classify."""

    model: ModelOptions
    tokenizer: PreTrainedTokenizerFast
    renderer: Renderer
    tools: list[Mapping[str, Any]]
    training: Collection[str]
    given: Given
    head: Head | None

    @property
    def train(self) -> Sequence[Example]:
        """The rows that are trained on."""
        return self.given.train

    @property
    def validation(self) -> Sequence[Example]:
        """Those that are validated on."""
        return self.given.validation


@dataclass(frozen=True)
class Prepared(Gathered):
    """The same with the plan."""

    plan: Plan

    def opened(self, method: Method, seed: int, sharded: bool = False) -> PreTrainedModel:
        """The model with ``method`` attached. One that is to be ``sharded`` stays in the host memory: it goes to where
        it is computed shard by shard. InputError where the method and the rows do not go together."""
        from weitiao.train import loop, modes

        model: Any = load(self.model, tokenizer=self.tokenizer, seed=seed, training=self.training,
                          head=self.head, device="cpu" if sharded else None)  # fmt: skip
        modes.seed_everything(seed)
        model = method.attach(model)
        loop.check(model, self.train)
        return model


def prepare(recipe: Sections, generators: Generators, tokenizer_folder: Path) -> Prepared:
    """Base, tokenizer, rows, examples and plan. A tokenizer that is to be trained is written to ``tokenizer_folder``,
    or read from there if a former run of the recipe has left it."""
    gathered = gather(recipe, generators, tokenizer_folder)
    return Prepared(**vars(gathered), plan=planned(recipe, gathered.given))


def gather(recipe: Sections, generators: Generators, tokenizer_folder: Path) -> Gathered:
    """The same without the plan."""
    before = need.peak_bytes() or 0
    model, data, task = recipe.model, fetched(recipe.data), recipe.task
    new = model.config is not None
    base = base_folder(model) if not new or model.tokenizer is None else None
    if base is not None and not new and is_run(model.path):
        model = model.model_copy(update={"path": str(base)})
    seed, on_disk = recipe.train.seed, mapped.applies(data, task.name)
    splits = Splits([]) if on_disk else load_rows(data, task.name, generators=generators, seed=seed)
    texts = mapped.texts(data, task.name, seed) if on_disk else splits.train
    tokenizer = load_tokenizer(_tokenizer(model, base, texts, tokenizer_folder))
    if base is not None and not new and isinstance(model.tokenizer, str):
        _check_fits(tokenizer, base)
    head = _head(recipe, base, [*splits.train, *splits.validation])
    shape = _shape(model, base, len(tokenizer), head)
    with counting(t("rows to tokens")) as progress:
        given = {"max_positions": shape.positions, "progress": progress}
        if on_disk:
            made = mapped.load(data, task.name, tokenizer, seed=seed, **given)
        else:
            made = _in_memory(splits, tokenizer, head, recipe, **given)
    rows, validation, renderer = made.train, made.validation, made.renderer
    for line in (*made.said, *(() if head else renderer.said), *getattr(rows, "said", ())):
        print(line, file=sys.stderr)
    _say_examples(rows, validation)
    files = 0 if base is None or new else inspect.weight_bytes(base)
    most = need.peak_bytes() or 0
    tokenised = most if most > before else need.resident_bytes()  # what was higher before is not of these rows
    facts = phases.facts(dtype_of(model), recipe.output, tokenised)
    here = Path(model.path).expanduser().is_dir() or model.path == DEFAULT_MODEL
    given = Given(shape, rows, validation, facts, files, 0 if here else files)
    training = recipe.method.base_names(shape)
    return Gathered(model, tokenizer, renderer, made.tools, training, given, head)


def planned(recipe: Sections, given: Given) -> Plan:
    """The plan of a recipe. One that differs from the recipe of ``given`` in its method, its options of training or the
    model's alone may go by the same."""
    model, shape, elsewhere = recipe.model, given.shape, given.facts.device != machine.device()
    dtype = dtype_of(model, elsewhere)
    return phases.plan(
        shape,
        recipe.method,
        recipe.task.build(),
        recipe.train,
        given.train,
        facts=given.facts,
        dtype=dtype,
        result_dtype=dtype if elsewhere else choose_dtype(model.dtype),
        validation=given.validation,
        file_bytes=given.file_bytes,
        coded_bytes=coded(shape, model, recipe.method.base_names(shape), ITEM_BYTES[dtype]),
        processes=ranks.launched().size,
        quantize=model.quantize,
        fetched_bytes=given.fetched_bytes,
        answers=given.answers,
    )


def dtype_of(model: ModelOptions, elsewhere: bool = False) -> str:
    """What its weights are held in; ``elsewhere``: on a GPU that is not here, where bfloat16 is what is fast."""
    if elsewhere and model.dtype == "auto" and model.config is None:
        return "bfloat16"
    return choose_dtype(model.dtype, model.config is not None)


def _in_memory(
    splits: Splits,
    tokenizer: PreTrainedTokenizerFast,
    head: Head | None,
    recipe: Sections,
    max_positions: int | None,
    progress: Callable[[int, int | None], None],
) -> mapped.Loaded:
    """The examples of rows that are held in memory."""
    data, able = recipe.data, any(isinstance(row, Chat) and row.tools for row in splits.train)
    renderer = Renderer.of(tokenizer, tools=able, override=data.chat_template)
    tools = _tools([row for place, row in enumerate(splits.train) if place not in splits.replayed])

    def tokens(part: Sequence[Row]) -> Sequence[Example]:
        if head is not None:
            return labelled(part, tokenizer, head, data, max_positions)
        return examples(part, renderer, data, recipe.task.name, max_positions=max_positions, progress=progress)

    train, validation = (tokens(part) if part else [] for part in (splits.train, splits.validation))
    return mapped.Loaded(train, validation, renderer, tools, splits.said)


def _head(recipe: Sections, base: Path | None, rows: Sequence[Row]) -> Head | None:
    """The head that task classify needs; None for the other tasks. InputError for a base with another one."""
    own = None if base is None or recipe.model.config is not None else heads.of(shapes.read_config(base))
    if recipe.task.name != "classify":
        if own is not None:
            message = "model.path: {path} tells {labels} and writes no words; it is a base for task.name=classify alone"
            raise InputError(t(message, path=base, labels=", ".join(own.labels)))
        return None
    head = head_of(rows, recipe.task.labels, recipe.task.kind, own)
    if own is not None and own != head:
        message = "model.path: {path} has a head for {own} ({kind}); these rows need one for {labels} ({other})"
        names = {"own": ", ".join(own.labels), "labels": ", ".join(head.labels)}
        raise InputError(t(message, path=base, kind=own.kind, other=head.kind, **names))
    return head


def coded(shape: shapes.Shape, model: ModelOptions, training: Collection[str], item_bytes: int) -> tuple[int, int]:
    """Bytes of the weights that codes stand for, and of these; what trains has none. Experts that cannot have any are
    named."""
    from weitiao.models.quantized import linear_bytes

    if model.quantize == "none":
        return 0, 0
    sizes = [
        (1, (linear.outputs, linear.inputs))
        for linear in shape.linears
        if not {f"{linear.name}.weight", f"{linear.name}.bias"} & {*training}
    ]
    stacks = [stack for stack in shape.experts if stack.name not in training]
    sizes += [(stack.count, (stack.outputs, stack.inputs)) for stack in stacks if stack.coded]
    if left := sum(stack.count * stack.inputs * stack.outputs for stack in stacks if not stack.coded):
        message = "model.quantize: the experts of {type} stay as they are, {size}: their family computes them by itself"
        say(message, type=shape.model_type, size=size(left * item_bytes))
    held = sum(count * linear_bytes(*wide, model.quantize, model.double_quantization) for count, wide in sizes)
    return sum(count * rows * columns for count, (rows, columns) in sizes) * item_bytes, held


def base_folder(model: ModelOptions) -> Path:
    """The folder of the base model; a run stands for the model it has left. InputError for an adapter."""
    folder = fetch.resolve(model.path, model.revision)
    folder = Run(folder).final if is_run(folder) else folder
    if (folder / "adapter_config.json").is_file():
        merge = command("weitiao", "merge", model.path, "OUT")
        raise InputError(t("model.path: {path} is an adapter; merge it first: {command}", path=folder, command=merge))
    inspect.check_folder(folder)
    sizes.check_tensors(folder, shapes.read(folder))
    return folder


def _tokenizer(model: ModelOptions, base: Path | None, rows: Iterable[Row], folder: Path) -> Path:
    """The folder of the tokenizer: the base's, another one, or one trained on ``rows`` into ``folder``."""
    given = model.tokenizer
    if isinstance(given, dict):
        if not (folder / "tokenizer.json").is_file():
            say("training a tokenizer on the training rows")
            train_tokenizer(map(text_of, rows), config.build(TokenizerOptions, given), folder)
        return folder
    return Path(given).expanduser() if given else base or base_folder(model)


def _check_fits(tokenizer: PreTrainedTokenizerFast, base: Path) -> None:
    """InputError for a tokenizer whose ids mean other tokens than those that the base has learnt them as."""
    if not (base / "tokenizer.json").is_file():
        return
    own, given = load_tokenizer(base).get_vocab(), tokenizer.get_vocab()
    other = sorted(token for token, number in own.items() if given.get(token) != number)
    if len(other) > len(own) / 100:
        message = (
            "model.tokenizer: {count} of the {all} tokens that {base} has learnt have another number in it, or none "
            "(first: {token}), so that its embedding means nothing; tokens are added by weitiao tokenizer extend"
        )
        named = json.dumps(other[0], ensure_ascii=False)
        raise InputError(t(message, count=len(other), all=len(own), base=base.name, token=named))


def _shape(model: ModelOptions, base: Path | None, vocab: int, head: Head | None) -> shapes.Shape:
    """The shape of the base, or of the new model with as many tokens as the tokenizer has; with its task's head."""
    old = base is not None and model.config is None
    found = shapes.read_config(base if old else model.config or {})  # type: ignore[arg-type]
    if not old:
        found.vocab_size = vocab
    return shapes.read(found if head is None else heads.put_on(found, head))


def _tools(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """Every tool schema of the rows once; they are saved with the result."""
    schemas = (schema for row in rows if isinstance(row, Chat) for schema in row.tools)
    return list({json.dumps(schema, sort_keys=True, ensure_ascii=False): schema for schema in schemas}.values())


def _say_examples(train: Sequence[Example], validation: Sequence[Example]) -> None:
    """One line: rows, tokens, the share that is trained, what was cut."""
    tokens, trained = int(lengths_of(train).sum()), int(trained_of(train).sum())
    say(
        "{rows} examples to train on, {validation} to validate; {tokens} tokens, {share} trained; {cut} truncated",
        rows=len(train),
        validation=len(validation),
        tokens=f"{tokens:,}",
        share=f"{trained / max(tokens, 1):.0%}",
        cut=getattr(train, "truncated", 0),
    )
