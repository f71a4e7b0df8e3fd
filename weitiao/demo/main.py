"""The hotel assistant, from nothing to measured, offline: what ``weitiao demo`` does.

    figures = demo(seed=0, output="runs/hotel-demo")
    figures["tuned"]["call_exact_match"]                    # beside base_zero_shot, base_few_shot, rule_parser

Invents a database, writes dialogues on it, measures the embedded base without and with examples, tunes it with LoRA by
the same function that runs every recipe, measures again, and writes a report with intervals, curves and dialogues.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from weitiao.data.messages import as_dicts
from weitiao.data.rows import Call, Chat
from weitiao.demo import parser
from weitiao.demo.database import Database, search_hotels
from weitiao.demo.dialogues import dialogues
from weitiao.demo.talks import searches
from weitiao.demo.tools import NAME
from weitiao.errors import InputError, Interrupted, say, t
from weitiao.runs import Run, command, is_run, write_atomic

MEASURES = ("call_exact_match", "slot_f1", "bleu4", "task_success")
ORDER = ("base_zero_shot", "base_few_shot", "rule_parser", "tuned")
TABLE = ("call_exact_match", "slot_precision", "slot_recall", "slot_f1", "bleu4", "task_success", "task_success_empty")
SHOTS = 2
ANSWER_TOKENS = 128
EPOCHS = 2
RATE = 2.5e-4  # low: the base understands guests as it is, and what it knows of phrasings is soon lost
REPLAYED = 0.2  # of the training rows are conversations of the kind that the base was made from: it forgets less
WATCHED = 24  # validation dialogues that are answered after each epoch, to choose the checkpoint

RECIPE: dict[str, Any] = {
    "model": {"path": "weitiao-tiny-zh"},
    "method": {"name": "lora", "rank": 32, "alpha": 64, "dropout": 0.2},  # without dropout it learns the phrasings
    "data": {"replay_share": REPLAYED},
    "train": {"epochs": EPOCHS, "batch_size": 8, "learning_rate": RATE, "warmup_steps": 10, "best": "call_exact_match"},
}


def verb(
    seed: Annotated[int, typer.Option(min=0, help="draws other hotels and other dialogues")] = 0,
    output: Annotated[Path, typer.Option(help="the run folder; a former demo in it is replaced")] = Path(
        "runs/hotel-demo"
    ),
    count: Annotated[int, typer.Option("--dialogues", min=20, help="how many dialogues are written")] = 1100,
    epochs: Annotated[float, typer.Option(min=0.01, help="times that tuning sees the training dialogues")] = EPOCHS,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """The hotel assistant: data, base, tuning, measures, report."""
    figures = demo(seed=seed, output=output, count=count, epochs=epochs)
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))


def demo(
    seed: int = 0, output: str | Path = "runs/hotel-demo", count: int = 1100, epochs: float = EPOCHS
) -> dict[str, Any]:
    """Run the main job; returns the figures that ``--json`` prints. Everything lands in the run folder ``output``.

    InputError where ``output`` holds a run of somebody else's.
    """
    from weitiao.methods.io import open_model
    from weitiao.recipe import Recipe, run

    started, output = time.monotonic(), Path(output)
    if is_run(output) and not (output / "data" / "hotels.jsonl").is_file():
        raise InputError(t("{path}: holds another run; give --output another folder", path=output))
    _heading(1, t("1,000 hotels and {count} dialogues, drawn from seed {seed}", count=count, seed=seed))
    database = Database.build(seed)
    parts = {part: _draw(database, part, count, seed) for part in database.parts}
    files = write_data(output / "data", database, parts, seed)
    values = RECIPE | {
        "data": RECIPE["data"] | files,
        "output": str(output),
        "train": RECIPE["train"] | {"epochs": epochs, "seed": seed},
    }
    recipe, former = Recipe.model_validate(values), Run(output)
    there = is_run(output)
    resume = there and not former.finished and former.recipe() == recipe.model_dump(mode="json")
    if resume:
        say("the base is measured again, then tuning goes on where it was stopped")
    _heading(2, t("the base as it is: zero-shot, then with {shots} example dialogues", shots=SHOTS))
    measured = Measured(database, parts)
    base = open_model(RECIPE["model"]["path"])
    systems = {"base_zero_shot": measured(base), "base_few_shot": measured(base, shots=_shots(parts["train"]))}
    systems["rule_parser"] = measured.parser()
    del base
    _heading(3, t("plan, then tuning with LoRA"))
    try:
        result = run(recipe, evaluators={"dialogue": measured.watch}, overwrite=there and not resume, resume=resume)
    except Interrupted:
        again = command("weitiao", "demo", "--seed", seed, "--output", output, "--dialogues", count, "--epochs", epochs)
        raise Interrupted(t("stopped; tuning goes on from here with: {command}", command=again)) from None
    _record_tools(result.run, seed)
    _heading(4, t("the tuned model on the test dialogues"))
    tuned = open_model(output)
    systems["tuned"] = measured(tuned)
    figures = {"seed": seed, "seconds": round(time.monotonic() - started, 1), "report": str(output / "report.md")}
    figures |= {
        name: {measure: round(found[measure].value, 4) for measure in MEASURES if measure in found}
        for name, found in systems.items()
    }
    _report(result.run, figures, systems, measured)
    return figures


def _draw(database: Database, part: str, count: int, seed: int) -> list[Chat]:
    share = len(database.part(part)) / len(database.all)
    return list(dialogues(database, part, round(count * share), seed))


def write_data(folder: Path, database: Database, parts: Mapping[str, Sequence[Chat]], seed: int) -> dict[str, str]:
    """The hotels and the dialogues as files of their own, so that any recipe can use them, and conversations to replay
    against forgetting; ``data`` of a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    hotels = [{"part": part, **asdict(hotel)} for part in database.parts for hotel in database.part(part)]
    _write_lines(folder / "hotels.jsonl", hotels)
    replayed = list(searches(seed, round(len(parts["train"]) * REPLAYED / (1 - REPLAYED))))
    for part, chats in {**parts, "replay": replayed}.items():
        rows = [{"id": c.id, "messages": as_dicts(c.messages), "tools": list(c.tools)} for c in chats]
        _write_lines(folder / f"{part}.jsonl", rows)
    return {part: str(folder / f"{part}.jsonl") for part in ("train", "validation", "replay")}


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _shots(chats: Sequence[Chat]) -> list[Chat]:
    """The example dialogues: the first short ones that hold a call."""
    return [chat for chat in chats if len(chat.messages) <= 5][:SHOTS]


class Measured:
    """Measures systems on the test dialogues, and a model in training on some of the validation ones."""

    def __init__(self, database: Database, parts: Mapping[str, Sequence[Chat]]):
        self.database, self.parts = database, parts
        self.tuned: Any = None  # tokenizer and renderer, for a model in training
        self.turns: list[Any] = []  # of the last system measured

    def __call__(self, tuned: Any, shots: Sequence[Chat] = ()) -> Mapping[str, Any]:
        """Every measure of ``tuned`` on the test dialogues."""
        self.tuned = tuned
        self.turns = self._replay(tuned, self.parts["test"], shots)
        return self._measure(self.turns, "test")

    def parser(self) -> Mapping[str, Any]:
        """Every measure of the untrained parser, which makes calls and says nothing."""
        from weitiao.evaluate.dialogue import Turn

        turns, hotels = [], self.database.part("test")
        for chat in self.parts["test"]:
            for place, message in enumerate(chat.messages):
                if message.role == "assistant":
                    call = parser.next_call(chat.messages[:place], hotels)
                    turns.append(Turn(chat.id, place, message.calls, (call,) if call else (), message.content, ""))
        figures = dict(self._measure(turns, "test"))
        del figures["bleu4"]
        return figures

    def watch(self, model: Any) -> dict[str, float]:
        """The measures by which a checkpoint is chosen, on a few validation dialogues."""
        from dataclasses import replace

        turns = self._replay(replace(self.tuned, model=model), self.parts["validation"][:WATCHED], ())
        found = self._measure(turns, "validation", samples=1)
        return {name: found[name].value for name in MEASURES}

    def _replay(self, tuned: Any, chats: Sequence[Chat], shots: Sequence[Chat]) -> list[Any]:
        from weitiao.evaluate.dialogue import replay
        from weitiao.evaluate.tasks import EvaluateOptions, answers
        from weitiao.generate.engine import positions

        options = EvaluateOptions(task="dialogue", data="-", max_new_tokens=ANSWER_TOKENS)
        room = positions(tuned.model)
        limit = None if room is None else room - ANSWER_TOKENS
        return replay(chats, lambda prompts: answers(tuned, prompts, options), tuned.renderer, shots, limit)

    def _measure(self, turns: Sequence[Any], part: str, samples: int = 1000) -> Mapping[str, Any]:
        from weitiao.evaluate.dialogue import measure

        return measure(turns, partial(execute, self.database, part), samples=samples)


def execute(database: Database, part: str, call: Call) -> list[str]:
    """The names of all hotels of ``part`` that a call finds; an error for a call that cannot be made."""
    if call.name != search_hotels.__name__:
        raise InputError(t("no such tool: {name}", name=call.name))
    return [hotel.name for hotel in search_hotels(database.part(part), **call.arguments)]


def _record_tools(run: Run, seed: int) -> None:
    """Note beside the adapter which functions its calls mean, so that ``weitiao chat`` can execute them."""
    from weitiao.generate.toolset import save_toolset

    schemas = json.loads((run.final / "tools.json").read_text(encoding="utf-8"))
    schemas = schemas["schemas"] if isinstance(schemas, dict) else schemas
    save_toolset(run.final, schemas, toolset=NAME, arguments={"seed": seed})


def _heading(number: int, text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).rule(f"{number} / 4  {text}", align="left")


def _report(run: Run, figures: Mapping[str, Any], systems: Mapping[str, Mapping[str, Any]], measured: Measured) -> None:
    """report.md: the systems side by side, what the base reached, three dialogues, and the run's own report; then the
    end of the demo on stderr."""
    from weitiao.evaluate.compare import dialogues as shown
    from weitiao.evaluate.compare import table

    tests = measured.parts["test"]
    side_by_side = table({name: systems[name] for name in ORDER}, TABLE)
    unseen = t(
        "Test hotels and test phrasings occur in neither the base's corpus nor the tuning rows. "
        "Intervals: 95 %, bootstrap over dialogues."
    )
    reached = t(
        "As it is, the base reached call exact match {zero} without examples and {few} with {shots}; "
        "tuning brought it to {tuned}.",
        zero=figures["base_zero_shot"]["call_exact_match"],
        few=figures["base_few_shot"]["call_exact_match"],
        shots=SHOTS,
        tuned=figures["tuned"]["call_exact_match"],
    )
    counted = t(
        "Seed {seed}; {train} dialogues to tune on, {test} to test on; {seconds} seconds in all.",
        seed=figures["seed"],
        train=len(measured.parts["train"]),
        test=len(tests),
        seconds=figures["seconds"],
    )
    head = ["# " + t("The hotel assistant"), "", counted, unseen, "", side_by_side, reached, ""]
    talk = ["## " + t("Three dialogues"), "", shown(tests, measured.turns, 3)]
    lines = [*head, *talk, (run.path / "report.md").read_text(encoding="utf-8")]
    run.write("report.md", "\n".join(lines))
    print(f"\n{side_by_side}\n{shown(tests, measured.turns, 1)}", file=sys.stderr)
    say("report: {path}", path=run.path / "report.md")
    say("talk to it: {command}", command=command("weitiao", "chat", run.path))
