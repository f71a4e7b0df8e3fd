"""CrossWOZ's hotel dialogues: a guest asks in Chinese, the assistant calls ``search_hotels``.

    splits = load(DataOptions(format="crosswoz", folder="../data/crosswoz"), "sft", seed=0)
    for dialogue in read(Path("hotel_dialogues.validation.jsonl")): ...

Two skills are trained and measured, told apart by the system prompt: ``call`` (the dialogue so far -> the search it
asks for) and ``acts`` (one utterance -> what it states by itself). ``call_prompt`` and ``acts_prompt`` make the prompts
of both, for training and for evaluation alike. A prompt holds nothing but what was said: of the annotation only the
bounds of a hotel segment are used, and no call of the wizard's, not even an earlier one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weitiao.data import crosswoz_augment, crosswoz_raw
from weitiao.data.crosswoz_turns import Arguments, Dialogue, Turn, turns_of
from weitiao.data.formats import Unreadable, records
from weitiao.data.rows import Call, Chat, Labelled, Message, Row, Text
from weitiao.errors import InputError, t

if TYPE_CHECKING:
    from weitiao.data.sources import DataOptions, Splits

SEARCH_HOTELS: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "search_hotels",
        "description": "按条件查酒店",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "酒店名称"},
                "type": {"type": "string", "enum": list(crosswoz_raw.TYPES), "description": "酒店类型"},
                "facilities": {"type": "array", "items": {"type": "string"}, "description": "须全部具备的设施"},
                "price_range_lower": {"type": "number", "minimum": 0, "description": "价格下限（元）"},
                "price_range_upper": {"type": "number", "minimum": 0, "description": "价格上限（元）"},
                "rating_range_lower": {"type": "number", "minimum": 0, "maximum": 5, "description": "评分下限"},
                "rating_range_upper": {"type": "number", "minimum": 0, "maximum": 5, "description": "评分上限"},
            },
            "required": [],
        },
    },
}
NAME = SEARCH_HOTELS["function"]["name"]
ARGUMENTS = tuple(SEARCH_HOTELS["function"]["parameters"]["properties"])

CALL_SYSTEM = "按对话中现在的全部要求查酒店。"
ACTS_SYSTEM = "只按这一句话里的要求查酒店。"

EXTRACT = {part: f"hotel_dialogues.{part}.jsonl" for part in ("train", "validation", "test")}
PUBLISHED = {"train": "train.json.zip", "validation": "val.json.zip", "test": "test.json.zip"}

Part = Literal["train", "validation", "test"]


def missing(folder: str | Path | None, part: Part) -> str | None:
    """What keeps ``folder`` from holding ``part`` of CrossWOZ, in words; None where it is there."""
    extract, published = EXTRACT[part], PUBLISHED[part]
    if folder is None:
        message = "is required: the folder that holds {extract} (the hotel extract) or {published} (as published)"
        return t(message, extract=extract, published=published)
    path = Path(folder).expanduser()
    if not path.is_dir():
        return t("{folder}: no such folder", folder=folder)
    if (path / extract).is_file() or (path / published).is_file():
        return None
    message = "{folder} holds neither {extract} (the hotel extract) nor {published} (as published)"
    return t(message, folder=folder, extract=extract, published=published)


def find(folder: str | Path | None, part: Part) -> Path:
    """The file of ``part`` in ``folder``: the hotel extract's, or else the zip that CrossWOZ publishes."""
    if problem := missing(folder, part):
        raise InputError(f"data.folder: {problem}")
    path = Path(str(folder)).expanduser() / EXTRACT[part]
    return path if path.is_file() else path.with_name(PUBLISHED[part])


def read(path: Path) -> list[Dialogue]:
    """The hotel dialogues of one file, in the form of the hotel extract; a zip is read as CrossWOZ's published format.

    Raises InputError that names every line that is not such a dialogue (the first 20, and how many)."""
    if not path.is_file():
        raise InputError(t("{path}: no such file", path=path))
    if path.suffix == ".zip":
        return list(crosswoz_raw.read(path))
    dialogues: list[Dialogue] = []
    problems: list[str] = []
    for line, record in records(path, "jsonl"):
        if isinstance(record, Unreadable):
            problems.append(f"{path}:{line}: {record.reason}")
        elif problem := _problem(record):
            problems.append(f"{path}:{line}: {problem}")
        else:
            dialogues.append(record)
    if problems:
        more = [t("and {count} more", count=len(problems) - 20)] if len(problems) > 20 else []
        raise InputError(problems[:20] + more)
    if not dialogues:
        raise InputError(t("{path}: no dialogue in it", path=path))
    return dialogues


def _problem(dialogue: Any) -> str | None:
    """What keeps one line from being a dialogue."""
    if not isinstance(dialogue, dict) or not isinstance(dialogue.get("id"), str):
        return t('not a dialogue: no "id"')
    messages = dialogue.get("messages")
    if not isinstance(messages, list) or not messages:
        return t('not a dialogue: no "messages"')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            return t("message {number}: the role is neither user nor assistant", number=number)
        if not isinstance(message.get("text"), str):
            return t('message {number}: no "text"', number=number)
        for field in ("act_args", "search_args"):
            if not isinstance(message.get(field, {}), dict):
                return t("message {number}: {field} is not an object", number=number, field=field)
        acts = message.get("acts", [])
        if not isinstance(acts, list) or not all(isinstance(act, list) and len(act) == 4 for act in acts):
            return t("message {number}: acts are not lists of intent, domain, slot and value", number=number)
    return None


def call_prompt(text: str, before: Sequence[Message] = ()) -> tuple[Message, ...]:
    """The messages of the skill ``call``: what was said in the segment, then the guest's utterance."""
    return (Message("system", CALL_SYSTEM), *before, Message("user", text))


def acts_prompt(text: str) -> tuple[Message, ...]:
    """The messages of the skill ``acts``: one utterance alone."""
    return (Message("system", ACTS_SYSTEM), Message("user", text))


def canonical(arguments: Mapping[str, Any]) -> Arguments:
    """Arguments in the schema's order; whole numbers without a fraction, names without blanks, nothing empty."""
    ordered = {name: arguments[name] for name in ARGUMENTS if arguments.get(name) not in (None, "", [])}
    ordered |= {name: value for name, value in arguments.items() if name not in ARGUMENTS}
    for name, value in ordered.items():
        if isinstance(value, float) and value.is_integer():
            ordered[name] = int(value)
        elif name == "name" and isinstance(value, str):
            ordered[name] = "".join(value.split())
    return ordered


def load(options: DataOptions, task: str, seed: int = 0) -> Splits:
    """Training rows, and a held-out share of the training dialogues as validation rows.

    ``options.folder`` holds the hotel extract or CrossWOZ's zips; nothing is read but the training part. ``pretrain``
    gives what was said, with the searches; ``classify`` the guests' utterances with their intents (see
    :func:`_intents`); any other task the two skills, each utterance as it stands and varied.
    InputError: no such folder or file, lines that are no dialogues, other files named beside the folder."""
    from weitiao.data.sources import Splits

    others = [name for name in ("train", "validation", "test") if isinstance(getattr(options, name), str | list)]
    if others or options.test:
        given = ", ".join(f"data.{name}" for name in others or ["test"])
        raise InputError(t("{given}: format crosswoz reads data.folder and nothing else", given=given))
    if task == "classify":
        return _intents(find(options.folder, part_of(task)), float(options.validation or 0), seed)
    path = find(options.folder, part_of(task))
    dialogues = read(path)
    random.Random(f"crosswoz {seed}").shuffle(dialogues)
    held = round(len(dialogues) * float(options.validation or 0))
    kept, held_out = dialogues[held:], dialogues[:held]
    said = [t("{path}: {count} dialogues, {held} of them to validate", path=path, count=len(dialogues), held=held)]
    if task == "pretrain":
        return Splits([*map(_text, kept)], [*map(_text, held_out)], [], said)
    rows: list[Row] = [row for dialogue in kept for row in _rows(dialogue)]
    turns = [turn for dialogue in kept for turn in turns_of(dialogue)]
    chance = random.Random(f"crosswoz skills {seed}")
    for number, turn in enumerate(crosswoz_augment.vary(turns, *names(path, dialogues), seed)):
        name = f"varied-{number:06d}"
        skills = _skills(turn, name, name)
        rows.append(skills[-1] if turn.history else chance.choice(skills))
    return Splits(rows, [row for dialogue in held_out for row in _rows(dialogue)], [], said)


def part_of(task: str) -> Part:
    """The part that a task learns from: intents are noted in the validation dialogues alone, for the extract's training
    segments have no dialogue acts."""
    return "validation" if task == "classify" else "train"


def _intents(path: Path, share: float, seed: int) -> Splits:
    """What guests say, with the intents of each utterance and their domains (``Inform-酒店``, ``General-thank``), split
    by dialogue."""
    from weitiao.data.sources import Splits
    from weitiao.data.split import split

    dialogues = read(path)
    rows = [
        Labelled(
            message["text"],
            tuple(sorted({f"{intent}-{domain}" for intent, domain, _, _ in message["acts"]})),
            f"{dialogue['id']}:{number}",
            dialogue["id"],
        )
        for dialogue in dialogues
        for number, message in enumerate(dialogue["messages"])
        if message["role"] == "user" and "acts" in message
    ]
    train, validation = split(rows, [1 - share, share], seed=seed)
    message = "{path}: {count} dialogues, {rows} utterances of guests"
    return Splits([*train], [*validation], [], [t(message, path=path, count=len(dialogues), rows=len(rows))])


def names(path: Path, dialogues: Iterable[Dialogue]) -> tuple[list[str], list[str]]:
    """Names of hotels and of places near them, to put into varied utterances: the database's where it lies beside
    ``path`` (or in ``database/`` there), else the hotels that the dialogues name."""
    for database in (path.parent / "hotel_db.json", path.parent / "database" / "hotel_db.json"):
        if database.is_file():
            try:
                hotels = dict(json.loads(database.read_text(encoding="utf-8")))
                return list(hotels), sorted({place for hotel in hotels.values() for place in hotel["周边景点"]})
            except (ValueError, TypeError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise InputError(t("{path}: not CrossWOZ's hotels ({error})", path=database, error=reason)) from None
    seen = {name for dialogue in dialogues for message in dialogue["messages"] for name in message.get("results", ())}
    return sorted(seen), []


def _rows(dialogue: Dialogue) -> list[Chat]:
    group = dialogue["id"]
    return [row for number, turn in enumerate(turns_of(dialogue)) for row in _skills(turn, f"{group}:{number}", group)]


def _skills(turn: Turn, name: str, group: str) -> list[Chat]:
    """The rows of one turn: ``acts``, and ``call`` where its search is known."""
    asked = [("acts", acts_prompt(turn.text), turn.own)]
    if turn.search is not None:
        asked.append(("call", call_prompt(turn.text, turn.history), turn.search))
    return [
        Chat(
            (*prompt, Message("assistant", calls=(Call(NAME, canonical(answer)),))),
            (SEARCH_HOTELS,),
            f"{name}:{skill}",
            group,
        )
        for skill, prompt, answer in asked
    ]


def _text(dialogue: Dialogue) -> Text:
    """What was said in one dialogue, a line each, with the searches between."""
    lines = []
    for message in dialogue["messages"]:
        lines.append(message["text"])
        if "search_args" in message:
            lines.append(f"{NAME} {json.dumps(canonical(message['search_args']), ensure_ascii=False)}")
    return Text("\n".join(lines), dialogue["id"], dialogue["id"])
