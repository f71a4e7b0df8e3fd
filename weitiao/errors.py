"""What goes wrong, and how it is said: the few exceptions of the project and the one table of its messages.

    raise InputError(t("no such file: {path}", path=path))
    raise InputError([t("..."), t("...")])          # every problem at once

Messages are written in English where they arise; ``zh.yaml`` beside this file holds their Chinese, and the language
is chosen by the locale variables of the environment (``LC_ALL``, ``LC_MESSAGES``, ``LANG``).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
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


COUNTED = re.compile(
    r"""(?<!of\ )\{(\w+)\}\ (?:(?:bad|new|training|example|independent|other)\ )?
    (?:row|step|token|example|text|answer|prompt|case|conversation|dialogue|character|cell|turn|file|tensor|parameter|byte
    |label|weight|adapter|layer|position|run)s\b""",
    re.VERBOSE,
)  # a number and what it counts, which English writes without its s where the number is one


def t(english: str, **values: object) -> str:
    """The message in the person's language, with ``{name}`` filled in from ``values``."""
    if language() == "zh":
        text = chinese().get(english, english)
    else:
        text = COUNTED.sub(lambda one: one[0][:-1] if str(values.get(one[1])) == "1" else one[0], english)
    return text.format(**values) if values else text


def first_of(problems: Sequence[str], shown: int = 20, count: int | None = None) -> list[str]:
    """The first ``shown`` problems of one kind, and how many more of ``count`` (all that are given) there are."""
    rest = (len(problems) if count is None else count) - min(shown, len(problems))
    return [*problems[:shown], *([t("… and {count} more of this kind", count=rest)] if rest > 0 else [])]


def say(english: str, **values: object) -> None:
    """Print a message to stderr: words go there, data to stdout."""
    print(redact(t(english, **values)), file=sys.stderr, flush=True)


SHAPES = re.compile(
    r"""(?:hf_|api_org_)[A-Za-z0-9]{16,} | sk-(?:[A-Za-z0-9]+-)*[A-Za-z0-9_-]{16,} | gh[pousr]_[A-Za-z0-9]{16,}
    | github_pat_\w{16,} | glpat-[\w-]{16,} | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[\w-]{30,} | xox[abprs]-[\w-]{10,}
    | ms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12} | ey[IJ][\w-]{8,}\.ey[IJ][\w-]{8,}\.[\w-]{8,}
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----[\s\S]*?-----END\ [A-Z ]*PRIVATE\ KEY-----""",
    re.VERBOSE,
)  # tokens of Hugging Face, OpenAI and its kin, GitHub, GitLab, AWS, Google, Slack, ModelScope; JWT; private keys
NAMED = re.compile(
    r"""(?P<before>\b(?:[a-z0-9]+[_-])*(?:api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|client[_-]?secret|
    (?:auth|access|hub|hf|api|refresh|bearer)[_-]?token|password|passwd|secret|credentials?)["']?\s*[:=]\s*["']?
    | authorization["']?\s*[:=]\s*["']?(?:bearer\s+|basic\s+|token\s+)? | \bbearer\s+
    | [?&](?:token|key|sig|signature)=)
    (?P<secret>[^\s"'&,;<>{}\[\]\\]{6,})""",
    re.VERBOSE | re.IGNORECASE,
)
USERINFO = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://)[^\s/@\"']+@", re.IGNORECASE)
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)
HIDDEN, SHORTEST = "***", 8


def redact(text: str) -> str:
    """``text`` without secrets: tokens by their shape, values by the name before them, names and passwords in URLs, and
    whatever the environment holds under a secret's name. Everything that this project prints or writes of what it was
    told goes through here; JSON and YAML stay what they are."""
    for value in _secrets(tuple(os.environ.items())):
        text = text.replace(value, HIDDEN)
    text = NAMED.sub(rf"\g<before>{HIDDEN}", SHAPES.sub(HIDDEN, text))
    return USERINFO.sub(rf"\g<before>{HIDDEN}@", text)


@lru_cache(maxsize=4)
def _secrets(environment: tuple[tuple[str, str], ...]) -> list[str]:
    """Values of the environment whose names say that they are secret, the longest first; paths and flags are not."""
    named = {value for name, value in environment if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return sorted((value for value in named if not os.path.exists(value)), key=len, reverse=True)
