"""Part of the model trains, the rest is frozen.

Freeze(blocks=2).attach(model)                                  # the last two blocks
Freeze(blocks=0, modules=["*.mlp.down_proj"], norms=True).attach(model)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weitiao.config import nearest
from weitiao.errors import InputError, t
from weitiao.methods.base import Method, save_plain, train_only

if TYPE_CHECKING:
    from torch import nn

    from weitiao.models.shape import Shape

REGEX = "re:"
NORM = re.compile(r"norm|(^|_)ln(_|$)", re.IGNORECASE)


class Freeze(Method):
    """Chosen parameters train in float32; everything else stays as it is."""

    learning_rate: ClassVar[float] = 1e-4

    name: Literal["freeze"] = Field(default="freeze", description="chosen parts of the model train")
    blocks: int = Field(default=2, ge=0, description="the last so many layers train")
    modules: tuple[str, ...] = Field(
        default=(),
        description="modules that train: a dotted name or the end of one, * and ? allowed, or re: and an expression",
    )
    embeddings: bool = Field(default=False, description="the token embedding trains")
    norms: bool = Field(default=False, description="every normalisation trains")
    head: bool = Field(
        default=False,
        description="the output head trains (the embedding with it, where they are tied); a task's head always does",
    )

    def attach(self, model: Any) -> nn.Module:
        """Freeze everything but the chosen parameters, which become float32."""
        from weitiao.models import shape

        train_only(model, self.base_names(shape.read(model.config)))
        return model

    def count(self, shape: Shape) -> int:
        """The chosen parameters."""
        return sum(math.prod(shape.tensors[name]) for name in self.base_names(shape))

    def base_names(self, shape: Shape) -> set[str]:
        """Names of the parameters that train; InputError for a name that matches nothing, or if nothing is chosen."""
        if self.blocks > len(shape.blocks):
            message = "method.blocks: the model has {layers} layers, not {blocks}"
            raise InputError(t(message, layers=len(shape.blocks), blocks=self.blocks))
        vocabulary = [name for name, size in shape.tensors.items() if len(size) == 2 and size[0] == shape.vocab]
        parts = list(shape.blocks[len(shape.blocks) - self.blocks :]) + matched(self.modules, shape.tensors)
        if self.embeddings:
            parts += vocabulary[:1]
        if self.head and not shape.head:
            parts += vocabulary[-1:]
        chosen = {name for name in shape.tensors if any(name == part or name.startswith(part + ".") for part in parts)}
        if self.norms:
            chosen |= {name for name in shape.tensors if NORM.search(name.split(".")[-2])}
        chosen |= shape.head
        if not chosen:
            raise InputError(t("method: nothing would train; choose blocks, modules, embeddings, norms or head"))
        return chosen

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """A plain model folder."""
        save_plain(model, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """What was saved is the whole model."""
        return model


def matched(patterns: Iterable[str], parameters: Iterable[str]) -> list[str]:
    """Dotted names of modules and parameters that the patterns mean, every problem in one InputError."""
    names = dict.fromkeys(
        ".".join(words[:end]) for words in (name.split(".") for name in parameters) for end in range(1, len(words) + 1)
    )
    found: list[str] = []
    wrong: list[str] = []
    for pattern in patterns:
        try:
            hits = [name for name in names if _matches(name, pattern)]
        except re.error as error:
            wrong.append(t("method.modules: {pattern}: {reason}", pattern=pattern, reason=error))
            continue
        found += hits
        if not hits:
            ends = list(dict.fromkeys(word for name in names for word in name.split(".") if not word.isdigit()))
            near = nearest(pattern.rpartition(".")[2], ends)
            hint = t('; did you mean "{near}"?', near=near) if near else ""
            message = 'method.modules: no module "{pattern}"{hint} ({names})'
            wrong.append(t(message, pattern=pattern, hint=hint, names=", ".join(ends)))
    if wrong:
        raise InputError(wrong)
    return found


def _matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` means ``name`` or a dotted end of it; an expression must match the whole name."""
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern.removeprefix(REGEX), name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern)
