"""The recipe, and the one function that ties the rooms together, top to bottom: :func:`run`.

recipe = Recipe(model={"path": "weitiao-tiny-zh"}, data={"train": "rows.jsonl"}, output="runs/first")
result = run(recipe)                     # plans, rehearses, tunes, keeps the best, writes runs/first/
weitiao train recipes/hotel-lora.yaml train.epochs=1
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import typer
from pydantic import Discriminator, Field, Tag, model_validator

from weitiao import config, methods
from weitiao.config import Options, Tree
from weitiao.data.sources import DataOptions, Generators
from weitiao.errors import InputError, say, t
from weitiao.evaluate.tasks import EvaluateOptions
from weitiao.export.merge import merged
from weitiao.machine import awake_seconds, environment
from weitiao.machine.ranks import Ranks, joined, launched
from weitiao.methods import METHODS
from weitiao.methods.base import Method
from weitiao.models.load import ModelOptions
from weitiao.plan import asked, checks
from weitiao.plan.changes import agree, changes
from weitiao.runs import Run, Watched, command, held, is_run
from weitiao.train.options import TrainOptions
from weitiao.train.tasks import TaskOptions

if TYPE_CHECKING:
    from weitiao.plan.fact import Result
    from weitiao.train.loop import Evaluator

    AnyMethod = Method
else:
    _CHOICES = tuple(Annotated[cls, Tag(name)] for name, cls in METHODS.items())
    AnyMethod = Annotated[Union[_CHOICES], Discriminator(methods.name_of)]  # noqa: UP007 (made from the table)


def _section(cls: type[Options], description: str) -> Any:  # one that may be left out
    return Field(default_factory=cls, description=description)


class Recipe(Options):
    """One training run: what is tuned, how, on what, and where the result goes."""

    model: ModelOptions = _section(ModelOptions, "the base model")
    method: AnyMethod = _section(METHODS["lora"], "what is trained, chosen by name")
    data: DataOptions = _section(DataOptions, "rows and how they become tokens")
    task: TaskOptions = _section(TaskOptions, "what is learnt from the rows")
    train: TrainOptions = _section(TrainOptions, "how the weights are changed")
    evaluate: EvaluateOptions | None = Field(default=None, description="measures of the result, added to the report")
    stages: list[dict[str, Any]] = Field(
        default_factory=list,
        description="recipes run in order, each with a name and starting from the former's result; the sections "
        "above are their defaults",
    )
    output: str = Field(min_length=1, description="the run folder")

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, values: Any) -> Any:
        return methods.implied(values) if isinstance(values, dict) else values


# ---- checking ------------------------------------------------------------------------------------------------------


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple[Recipe, Tree]:
    """A recipe from YAML or a mapping with ``key=value`` overrides, and the tree that knows where values came from."""
    tree = config.read(source, overrides)
    return config.build(Recipe, tree), tree


def check(recipe: Recipe, tree: Tree | None = None, *, generators: Iterable[str] = (), measured: bool = False) -> None:
    """InputError naming every problem that no single option shows: files that are absent, options that contradict.

    ``generators``: names that ``generate:NAME`` may use; ``measured``: evaluators add measures for ``train.best``.
    """
    tree = tree or _tree(recipe)
    problems = [config.problem(tree, key, what) for key, what in checks.stage_names(recipe.stages)]
    parts = stages(tree) if recipe.stages else [(recipe, tree)]
    for part, part_tree in parts:
        found = [*checks.absent(part, generators), *checks.contradictions(part, measured)]
        problems += [config.problem(part_tree, key, what) for key, what in found]
    if what := checks.unwritable(Path(recipe.output).absolute(), parts[0][0].model.path):
        problems.append(config.problem(tree, "output", what))
    if problems:
        raise InputError(list(dict.fromkeys(problems)))


def _tree(recipe: Recipe) -> Tree:
    """The tree of a recipe made in Python: what was set, without origins."""
    return Tree(recipe.model_dump(mode="json", exclude_unset=True))


def stages(tree: Tree) -> list[tuple[Recipe, Tree]]:
    """A recipe for each stage: the sections above with the stage's laid over them, written to OUTPUT/NAME. InputError
    names the problems of all."""
    found, problems = [], []
    listed = tree.values["stages"]
    for number, stage in enumerate(listed):
        origins = {key: origin for key, origin in tree.origins.items() if not key.startswith("stages.")}
        inner = f"stages.{number}."
        origins |= {key.removeprefix(inner): origin for key, origin in tree.origins.items() if key.startswith(inner)}
        values = checks.laid_over(tree.values, stage, first=number == 0, last=number == len(listed) - 1)
        values["output"] = str(Path(tree.values["output"]) / str(stage.get("name")))
        stage_tree = Tree(values, origins, tree.source)
        try:
            found.append((config.build(Recipe, stage_tree), stage_tree))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return found


# ---- running -------------------------------------------------------------------------------------------------------


def run(
    recipe: Recipe,
    *,
    tree: Tree | None = None,
    generators: Generators | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    allow_changes: bool = False,
) -> Result:
    """Check, plan, rehearse, tune, keep the best, measure, report; the stages one after another if there are any.

    ``generators`` are what ``data.train: generate:NAME`` draws from, ``evaluators`` measure the model at every
    evaluation. Nothing is written before the rehearsal has passed. With ``resume`` the run in ``output`` goes on, with
    a recipe that learns otherwise only if ``allow_changes``; a finished one is left as it is. InputError for what the
    person can mend, all at once; RunError for what the machine could not do; Interrupted after Ctrl-C, with a
    checkpoint to go on from.
    """
    with joined(recipe.train.process_timeout) as ranks:
        ways = Ways(generators or {}, evaluators or {}, overwrite, resume, allow_changes, ranks)
        return _run(recipe, tree or _tree(recipe), ways)


@dataclass(frozen=True)
class Ways:
    """How a recipe is run, and by which processes: see :func:`run`."""

    generators: Generators
    evaluators: Mapping[str, Evaluator]
    overwrite: bool
    resume: bool
    allow_changes: bool
    ranks: Ranks

    def at(self, output: str) -> Run:
        """The run in the folder ``output``, which the first process alone writes."""
        return Run(output) if self.ranks.first else Watched(output)


def _run(recipe: Recipe, tree: Tree, ways: Ways) -> Result:
    """What :func:`run` does, in each of the processes."""
    own, ranks = ways.at(recipe.output), ways.ranks
    if ranks.restarts and ranks.told(lambda: own.of_this_launch):
        say("torchrun has started the processes anew; going on with {path}", path=own.path)
        ways = replace(ways, resume=True, overwrite=False)
    if ways.resume and ranks.told(lambda: own.finished and not any(changes(own.recipe(), _plain(recipe), "output"))):
        from weitiao.plan import fact

        return ranks.told(lambda: fact.finished(own))
    check(recipe, tree, generators=ways.generators, measured=bool(ways.evaluators))
    from weitiao.train import many  # it brings torch, for which nobody has to wait who mistyped a name

    for part, _ in stages(tree) if recipe.stages else [(recipe, tree)]:
        many.engine(part.train, ranks)
    with ExitStack() as locks:
        ranks.told(lambda: _take(own, ways, locks))
        return _run_stages(own, tree, ways, locks) if recipe.stages else _run_one(recipe, own, ways, locks)


def _take(run: Run, ways: Ways, locks: ExitStack) -> None:
    """Lock the folder if it holds a run; InputError if that is not to be gone on with or replaced."""
    if not is_run(run.path):
        return
    if not (ways.overwrite or ways.resume):
        run.forget_launch()
        raise InputError(held(run.path))
    locks.enter_context(run.locked())


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a run folder keeps it."""
    return recipe.model_dump(mode="json")


def _run_stages(above: Run, tree: Tree, ways: Ways, locks: ExitStack) -> Result:
    """The stages in order, each from the former's result; with ``resume``, those that are finished are passed over."""
    from weitiao.plan import fact

    result, base = None, None

    def begin() -> None:
        """Make the folder of all stages, when the first of them is ready to be written."""
        if result is None:
            _made(above, tree.values, ways, locks)

    told = ways.ranks.told
    for stage, _ in stages(tree):
        own = ways.at(stage.output)
        if not (ways.resume and told(partial(getattr, own, "finished"))):
            say("stage {name}", name=own.path.name)
            if base is not None:
                model = stage.model.model_copy(update={"path": str(told(partial(merged, base)))})
                stage = stage.model_copy(update={"model": model})
            again = replace(ways, overwrite=False, resume=ways.resume and told(partial(is_run, own.path)))
            result = _run_one(stage, own, again, locks, begin)
        base = told(partial(getattr, own, "final"))
    return result or told(lambda: fact.finished(own))


def _made(run: Run, values: Mapping[str, Any], ways: Ways, locks: ExitStack) -> None:
    """The run's folder, locked, with its recipe."""
    run.make()
    if not ways.resume:
        locks.push(run.undo_unless_begun)
    locks.enter_context(run.locked())
    if not ways.resume:
        Run.create(run.path, values, ways.overwrite)
    elif run.recipe() != values:
        run.write_recipe(values)
    if ways.ranks.started:
        run.launch()


def _run_one(
    recipe: Recipe, run: Run, ways: Ways, locks: ExitStack, begin: Callable[[], None] = lambda: None
) -> Result:
    """One stage, or a recipe without stages; ``begin`` is called just before the run folder is made."""
    from weitiao.evaluate import classify
    from weitiao.plan import fact, report
    from weitiao.plan.prepare import prepare
    from weitiao.train import many
    from weitiao.train.loop import fit
    from weitiao.train.progress import Bar
    from weitiao.train.rehearsal import rehearse
    from weitiao.train.room import check as check_room
    from weitiao.weights.folders import whole

    started, evaluators, resume, ranks = awake_seconds(), ways.evaluators, ways.resume, ways.ranks
    task, kind = recipe.task.build(), many.engine(recipe.train, ranks)
    with tempfile.TemporaryDirectory(prefix="weitiao-") as scratch:
        folder = run.tokenizer if resume and ranks.first else Path(scratch)
        fitted = recipe.model_copy(update={"train": many.fitting(recipe.train, kind)})
        ready = ranks.in_turn(lambda: prepare(fitted, ways.generators, folder), folder)
        if ready.head is not None:  # resuming and opening a checkpoint need the labels that were found
            recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update=vars(ready.head))})
            if ready.validation:
                watched = classify.watch(ready.validation, int(ready.tokenizer.pad_token_id), ready.head)  # type: ignore[arg-type]
                evaluators = {**evaluators, "classify": watched}
        if resume:
            ranks.told(lambda: agree(run, _plain(recipe), ways.allow_changes))
        print(report.text(ready.plan), file=sys.stderr, flush=True)
        ranks.told(lambda: check_room(run, ready.plan.room))
        if not ranks.alone:
            say("{size} processes share the rows of every step ({engine})", size=ranks.size, engine=kind)
        model = ready.opened(recipe.method, recipe.train.seed, sharded=kind == "fsdp2")
        group = many.of(ranks, model, task, recipe.train, ready.train)
        recomputed = ranks.told(lambda: ready.plan.recomputed_blocks)
        pad_id: Any = ready.tokenizer.pad_token_id
        loss = rehearse(model, recipe.method, task, ready.train, recipe.train, pad_id, recomputed, group)
        say("rehearsed the largest micro-batch: loss {loss}", loss=f"{loss:.4f}")

        def write() -> None:
            begin()
            _made(run, _plain(recipe), ways, locks)
            if isinstance(recipe.model.tokenizer, dict) and not run.tokenizer.is_dir():
                with whole(run.tokenizer, 0) as folder:
                    shutil.copytree(scratch, folder, dirs_exist_ok=True)

        ranks.told(write)
    run.write("env.json", environment())
    run.write("plan.json", ready.plan.to_dict())
    with Bar() as bar:
        done = fit(
            model, recipe.method, task, ready.train, recipe.train,
            run=run, validation=ready.validation, evaluators=evaluators, pad_id=pad_id, resume=resume,
            allow_changes=ways.allow_changes, recomputed=recomputed, progress=bar,
            words=lambda row: str(ready.tokenizer.decode(row.ids)), processes=group
        )  # fmt: skip
    group.make_whole(model)
    if not ranks.first:  # what is left is to write and to measure
        return fact.Result(run, done, ready.plan, awake_seconds() - started, fact.peak_bytes())
    figures = fact.left(recipe, run, ready, done, model, group.sharded)
    return fact.Result(run, done, ready.plan, awake_seconds() - started, fact.peak_bytes(), figures)


# ---- verbs ---------------------------------------------------------------------------------------------------------

Words = Annotated[
    list[str] | None, typer.Argument(metavar="RECIPE|KEY=VALUE", help="a recipe in YAML, and options over it")
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


def from_words(words: Sequence[str], overrides: Sequence[str] = ()) -> tuple[Recipe, Tree]:
    """The recipe that a command line means: a file and ``key=value``, or ``key=value`` alone. InputError for none."""
    if not words:
        raise InputError(t("which recipe? give a file, or options such as data.train=rows.jsonl output=runs/first"))
    words = list(words)
    file = words.pop(0) if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    if file is not None:
        checks.refuse_what_is_no_recipe(Path(file))
    return load(file or {}, [*words, *overrides])


def train_verb(
    context: typer.Context,
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved recipe and stop")] = False,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="go on with a run that was stopped")] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="go on with options that learn otherwise")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run that the output holds")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad rows out, with a count")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON Schema of recipes, for editors")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: plan, tune, choose the best checkpoint, report."""
    if schema:
        print(json.dumps(config.json_schema(Recipe), ensure_ascii=False, indent=2))
        return
    if resume is not None and (overwrite or skip_bad or not all("=" in word for word in words or ())):
        raise InputError(t("--resume goes on with the run's own recipe; it takes key=value and --allow-changes"))
    if resume is not None:
        folder = Run.open(resume).whole.path
        recipe, tree = load(folder / "recipe.yaml", [*(words or ()), f"output={json.dumps(str(folder))}"])
    else:
        recipe, tree = from_words(words or (), ["data.skip_bad=true"] if skip_bad else [])
    generators = getattr(context.obj, "generators", {})
    if dry_run:
        check(recipe, tree, generators=generators)
        print(json.dumps(_plain(recipe), ensure_ascii=False) if as_json else config.resolved(recipe, tree).rstrip())
        return
    result = run(
        recipe, tree=tree, generators=generators,
        overwrite=overwrite, resume=resume is not None, allow_changes=allow_changes
    )  # fmt: skip
    if not launched().first:
        return
    labels = recipe.task.name == "classify"
    if not labels:
        say("talk to it:  {command}", command=command("weitiao", "chat", recipe.output))
    measure = command("weitiao", "eval", recipe.output, "--task", "classify" if labels else "perplexity", "--data")
    say("measure it:  {command} FILE", command=measure)
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))


def plan_verb(
    ctx: typer.Context,
    words: Words = None,
    fit: asked.Fit = None,
    gpu: asked.Gpu = None,
    solve: asked.Solve = None,
    models: asked.Models = "",
    all_methods: asked.AllMethods = False,
    history: asked.History = False,
    clients: asked.Clients = 1,
    context: asked.Context = 0,
    as_json: AsJson = False,
) -> None:
    """Memory, disk and time of a recipe; no weight is read."""
    if history:
        found, text = asked.misses()
    else:
        (recipe, tree), generators = from_words(words or ()), getattr(ctx.obj, "generators", {})
        check(recipe, tree, generators=generators)
        recipe = stages(tree)[0][0] if recipe.stages else recipe
        question = fit, gpu, solve, models, all_methods, clients, context
        found, text = asked.answer(recipe, generators, asked.Asked(*question))
    print(json.dumps(found, ensure_ascii=False) if as_json else text)
