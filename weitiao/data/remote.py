"""Rows that lie elsewhere: a link to a file, or a data set of the hub, becomes files of the cache.

    fetched(DataOptions(train="https://example.org/rows.parquet"))          # .train is the file here
    fetched(DataOptions(train="hub:OWNER/NAME@main:data/train.jsonl"))      # a file of a data set
    fetched(DataOptions(train="hub:OWNER/NAME:validation"))                 # a split: files with that in their names

Files come as weights do: verified, gone on with after a cut, taken from the cache where nobody can be reached.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from weitiao.data.formats import FORMATS
from weitiao.data.options import DataOptions, SourceOptions
from weitiao.errors import InputError, t

HUB = "hub:"
LINKS = ("https://", "http://")
NAMED = re.compile(r"hub:(?P<name>[^/@:\s]+/[^/@:\s]+)(@(?P<revision>[^:\s]+))?(:(?P<rest>\S.*))?")
SPLIT = "train"  # of a data set of which no file and no split is named


def is_remote(name: object) -> bool:
    """Whether a name is one of a link or of a data set of the hub."""
    return isinstance(name, str) and name.startswith((*LINKS, HUB))


def files(name: str) -> list[Path]:
    """The files that a link or ``hub:OWNER/NAME[@REVISION][:FILE or SPLIT]`` stands for, fetched where they are not
    here yet; of another name itself. InputError for what cannot be, RunError where nobody can be reached."""
    from weitiao.weights.fetch import fetch

    if not is_remote(name):
        return [Path(name)]
    if not name.startswith(HUB):
        got = fetch(name, dataset=True)
        return [got.folder / one for one in got.names] or sorted(got.folder.iterdir())
    found = NAMED.fullmatch(name)
    if found is None:
        message = "{name}: a data set is hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME@REVISION:FILE"
        raise InputError(t(message, name=name))
    wanted = found["rest"] or SPLIT
    one_file = wanted.rpartition(".")[2].lower() in (*FORMATS, "ndjson")
    patterns = [wanted] if one_file else [f"*{wanted}*.{kind}" for kind in FORMATS if kind != "txt"]
    got = fetch(found["name"], found["revision"], include=patterns, dataset=True)
    here = got.names or [path.relative_to(got.folder).as_posix() for path in got.folder.rglob("*") if path.is_file()]
    names = sorted(one for one in here if any(fnmatch(one, pattern) for pattern in patterns))
    kinds = {one.rpartition(".")[2] for one in names}
    if len(kinds) != 1:
        message = "{name}: name one of its files: {names}"
        raise InputError(t(message, name=name, names=", ".join(names[:8]) or "-"))
    return [got.folder / one for one in names]


def fetched(options: DataOptions) -> DataOptions:
    """The options with files here instead of what they name elsewhere; those without such names as they are. A source
    of several files becomes as many, which share its weight. InputError with all that is wrong."""
    held_out = {"validation": options.validation, "test": options.test}
    replay = [options.replay] if isinstance(options.replay, str) else options.replay or []
    if not any(map(is_remote, [*(one.path for one in options.sources), *held_out.values(), *replay])):
        return options
    problems: list[str] = []

    def found(name: str) -> list[Path]:
        try:
            return files(name)
        except InputError as error:
            problems.extend(error.problems)
            return []

    def one(part: str, name: str) -> str:
        if len(own := found(name)) > 1:
            message = "data.{part}: {name} is several files; name one: {names}"
            problems.append(t(message, part=part, name=name, names=", ".join(path.name for path in own[:8])))
        return str(own[0]) if own else name

    train: list[str | SourceOptions] = []
    for source in options.sources:
        here = found(source.path)
        weight = source.weight and source.weight / max(len(here), 1)
        train += [source.model_copy(update={"path": str(path), "weight": weight}) for path in here]
    update: dict[str, object] = {"train": train}
    update |= {part: one(part, name) for part, name in held_out.items() if isinstance(name, str)}
    if replay:
        update["replay"] = [str(path) for name in replay for path in found(name)]
    if problems:
        raise InputError(problems)
    return options.model_copy(update=update)
