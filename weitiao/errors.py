"""What goes wrong, and how it is said: the few exceptions of the project and the one table of its messages.

    raise InputError(t("no such file: {path}", path=path))
    raise InputError([t("..."), t("...")])          # every problem at once

Messages are written in English where they arise; ``zh.yaml`` beside this file holds their Chinese, and the language
is chosen by the locale variables of the environment (``LC_ALL``, ``LC_MESSAGES``, ``LANG``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib.resources import files


class WeitiaoError(Exception):
    """The work failed. ``exit_code`` is what the command line ends with; ``problems`` lists every problem found."""

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class InputError(WeitiaoError, ValueError):
    """Bad usage or bad input: a file, line or option that the person can mend."""

    exit_code = 2


class RunError(WeitiaoError, RuntimeError):
    """The input was fine and the work failed all the same: a full disk, a NaN, a lost process."""


class Interrupted(WeitiaoError):
    """A person or the system asked to stop; what was done is kept, and the message says how to go on."""


def language() -> str:
    """``zh`` or ``en``, from the locale variables in the order POSIX gives them."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(name):
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


@cache
def chinese() -> dict[str, str]:
    """The message table, English to Chinese."""
    import yaml

    return yaml.safe_load((files("weitiao") / "zh.yaml").read_text(encoding="utf-8")) or {}


def t(english: str, **values: object) -> str:
    """The message in the person's language, with ``{name}`` filled in from ``values``."""
    text = chinese().get(english, english) if language() == "zh" else english
    return text.format(**values) if values else text


def first_of(problems: Sequence[str], shown: int = 20) -> list[str]:
    """The first ``shown`` problems of one kind, and how many more there are."""
    rest = len(problems) - shown
    return [*problems[:shown], *([t("… and {count} more of this kind", count=rest)] if rest > 0 else [])]


def say(english: str, **values: object) -> None:
    """Print a message to stderr: words go there, data to stdout."""
    print(t(english, **values), file=sys.stderr, flush=True)
