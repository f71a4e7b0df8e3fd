"""The run folder: what a training run was asked, what it ran on, what it measured, and what it left.

run = Run.create("runs/hotel-lora", recipe={...})
run.log({"step": 1, "loss": 2.3})
Run.open("runs/hotel-lora").metrics()

runs/NAME/  recipe.yaml env.json plan.json metrics.jsonl checkpoints/ adapter/ (or model/) report.md loss.png
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml

from weitiao.errors import InputError, Interrupted, RunError, redact, t
from weitiao.machine.lock import Lock
from weitiao.machine.ranks import launch_name

RECIPE = "recipe.yaml"
LAUNCH = ".launch"  # which start of torchrun has begun the run
METRICS = "metrics.jsonl"
FOLDERS = ("checkpoints", "adapter", "model", "tokenizer", "merged", "trunk", "compare")
REPORTS = ("report.md", "report.json", "report.html", "loss.png", "predictions.jsonl")
FILES = (METRICS, "env.json", "plan.json", "bad_rows.jsonl", *REPORTS)
FULL = (errno.ENOSPC, errno.EDQUOT)
FOLDER_BYTES = 4096  # a block of most file systems, which an empty folder takes


class Run:
    """One run folder. Build it with :meth:`create` or :meth:`open`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.tokenizer = self.path / "tokenizer"  # of a new model, trained on the run's own text
        self._lock = Lock(self.path)

    @classmethod
    def create(cls, folder: str | Path, recipe: Mapping[str, Any], overwrite: bool = False) -> Run:
        """A new run folder with its recipe; InputError if it holds a run (unless ``overwrite``) or is a file."""
        run = cls(folder)
        if is_run(run.path):
            if not overwrite:
                raise InputError(held(run.path))
            run.clear()
        run.make()
        run.write_recipe(recipe)
        return run

    def make(self) -> None:
        """Make the folder if it is not there; InputError if it cannot be, RunError if the disk is full."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(t("{path}: is a file, not a folder for a run", path=self.path))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in FULL:
                raise disk_error(error, self.path, FOLDER_BYTES) from None
            raise InputError(t("{path}: cannot be made: {reason}", path=self.path, reason=error.strerror)) from None

    def write_recipe(self, recipe: Mapping[str, Any]) -> None:
        """The recipe that this run goes by."""
        text = yaml.safe_dump(dict(recipe), allow_unicode=True, sort_keys=False, width=1000)
        write_atomic(self.path / RECIPE, redact(text))

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run that ``folder`` holds; InputError if it holds none."""
        if not is_run(folder):
            raise InputError(t("{path}: holds no run (a run folder has a recipe.yaml)", path=folder))
        return cls(folder)

    @property
    def final(self) -> Path:
        """The tuned weights, ``adapter/`` or ``model/``, of the last stage if there are any; InputError if absent."""
        for path in (self.adapter, self.model):
            if path.is_dir():
                return path
        if stages := self.stages:
            return stages[-1].final
        resume = command("weitiao", "train", "--resume", self.path)
        raise InputError(t("{path}: the run has not finished; go on with: {command}", path=self.path, command=resume))

    @property
    def finished(self) -> bool:
        """Whether the run has left its result, and its report, which is written last."""
        return (self.adapter.is_dir() or self.model.is_dir()) and (self.path / "report.md").is_file()

    def launch(self) -> None:
        """Note which start of torchrun has begun, or gone on with, this run."""
        write_atomic(self.path / LAUNCH, launch_name())

    def forget_launch(self) -> None:
        """Another start of torchrun has found this run in its way; it may be called the same."""
        (self.path / LAUNCH).unlink(missing_ok=True)

    @property
    def of_this_launch(self) -> bool:
        """Whether it was this start of torchrun, which has started its processes anew since."""
        file, name = self.path / LAUNCH, launch_name()
        return bool(name) and file.is_file() and file.read_text(encoding="utf-8") == name

    def locked(self) -> AbstractContextManager[Any]:
        """Hold this for as long as the run is written: RunError if another process, or another run of this one, does.
        The folder must exist."""
        return self._lock

    @property
    def stages(self) -> list[Run]:
        """The runs of the recipe's stages, in order; empty if it has none."""
        return [Run(self.path / Path(stage["name"]).name) for stage in self.recipe().get("stages") or []]

    @property
    def whole(self) -> Run:
        """The run of all stages if this is one of its stages; this one otherwise."""
        above = Run(self.path.absolute().parent)
        stage = is_run(above.path) and self.path.absolute() in [stage.path for stage in above.stages]
        return above if stage else self

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe this run was started with."""
        return yaml.safe_load((self.path / RECIPE).read_text(encoding="utf-8")) or {}

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; it is on its way to the disk when this returns."""
        line = redact(json.dumps(dict(record), ensure_ascii=False)) + "\n"
        path = self.path / METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise disk_error(error, path, len(line.encode())) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of ``metrics.jsonl``; a last line that was cut by a kill is left out."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                if number < len(lines):
                    raise RunError(t("{path}:{line}: not JSON", path=path, line=number)) from None
        return records

    def rewind(self, step: int) -> None:
        """Forget metrics of steps after ``step``: a resumed run logs those again."""
        kept = [record for record in self.metrics() if record.get("step", 0) <= step]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomic(self.path / METRICS, text)

    def write(self, name: str, content: Mapping[str, Any] | str) -> Path:
        """Write a file of the run: a mapping as JSON, or text; secrets stay out of it."""
        path = self.path / name
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        write_atomic(path, redact(text))
        return path

    def undo_unless_begun(self, kind: type[BaseException] | None, *_: object) -> None:
        """For ``ExitStack.push``: of a run that failed before its first step nothing stays for which a second try would
        be refused."""
        failed = kind is not None and issubclass(kind, Exception) and not issubclass(kind, Interrupted)
        begun = is_run(self.path) and any(is_run(stage.path) for stage in self.stages)
        if not failed or begun or self.metrics() or self.checkpoints.is_dir():
            return
        with suppress(RunError, OSError):
            with self.locked():
                self.clear()
            self.path.rmdir()  # where nothing else is in it

    def clear(self) -> None:
        """Remove what the former run left, and only that: other files in the folder stay."""
        for stage in self.stages:
            if is_run(stage.path):
                stage.clear()
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (*FILES, LAUNCH, RECIPE):  # without its recipe it is a run no more, so that goes last
            (self.path / name).unlink(missing_ok=True)

    @property
    def foreign(self) -> list[str]:
        """What lies in the folder under a run's names although it holds no run: somebody else's."""
        return [] if is_run(self.path) else [name for name in (*FOLDERS, *FILES) if (self.path / name).exists()]


class Watched(Run):
    """A run that another process writes: here nothing of it is."""

    def make(self) -> None:
        """Nothing."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def write(self, name: str, content: Mapping[str, Any] | str) -> Path:
        """The path alone."""
        return self.path / name

    def locked(self) -> AbstractContextManager[Any]:
        """The other process holds it."""
        return nullcontext()


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is a run folder: it has the recipe it was started with."""
    return (Path(path) / RECIPE).is_file()


def held(path: Path) -> str:
    """The refusal of a folder that holds a run, with the two commands that go on from here."""
    return t(
        "{path}: holds a run already; go on with it: {resume}   or start it anew: {overwrite}",
        path=path,
        resume=command("weitiao", "train", "--resume", path),
        overwrite=command("weitiao", "train", path / RECIPE, "--overwrite"),
    )


def command(*words: object) -> str:
    """A command line that a person can copy."""
    return shlex.join(str(word) for word in words)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a whole file or none of it: temporary file, fsync, rename. RunError names a full disk and bytes needed."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path, len(data)) from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_error(error: OSError, path: Path, needed_bytes: int) -> RunError:
    """The RunError of a failed write: a full disk is named with what is needed and what is free."""
    if error.errno not in FULL:
        return RunError(t("{path}: cannot be written: {reason}", path=path, reason=error.strerror or error))
    free_bytes = shutil.disk_usage(existing(path)).free
    message = "{path}: the disk is full: {needed} bytes needed, {free} bytes free"
    return RunError(t(message, path=path, needed=needed_bytes, free=free_bytes))


def folder_bytes(folder: Path) -> int:
    """What the files in ``folder`` hold; 0 where it is not there. A file that goes meanwhile does not count."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found += os.stat(os.path.join(place, name)).st_size
    return found


def existing(path: Path) -> Path:
    """The nearest folder above ``path``, or itself, that exists."""
    path = Path(path).absolute()
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
