"""Heads above a language model's hidden states: one class, several classes, or a number for a whole text.

    head = Head(("差", "好"))
    model = load(ModelOptions(path="gpt2"), head=head)      # transformers' own class, with a new head
    scores(model, ids, attention)                           # [B, labels]
    of(model.config)                                        # Head(labels=("差", "好"), kind="single")

The model is transformers' ``...ForSequenceClassification`` of its family, so what is saved loads there too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from weitiao.errors import InputError, t

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

Kind = Literal["single", "multi", "regression"]
PROBLEMS: dict[Kind, str] = {  # what transformers calls them
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
CLASS = "ForSequenceClassification"


@dataclass(frozen=True)
class Head:
    """``labels`` in the order of the outputs; ``single``: one of them is right, ``multi``: any number of them,
    ``regression``: the one label names a number."""

    labels: tuple[str, ...]
    kind: Kind = "single"


def described(values: Mapping[str, Any] | None) -> Head | None:
    """The head that was noted as ``{"labels": [...], "kind": ...}``."""
    return Head(tuple(values["labels"]), values["kind"]) if values else None


def has_one(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a model with such a head."""
    return str((getattr(config, "architectures", None) or [""])[0]).endswith(CLASS)


def of(config: PretrainedConfig) -> Head | None:
    """The head that a configuration describes; None for a language model."""
    if not has_one(config):
        return None
    names: Any = config.id2label
    labels = tuple(str(names[number]) for number in range(len(names)))
    kinds: dict[Any, Kind] = {problem: kind for kind, problem in PROBLEMS.items()}
    return Head(labels, kinds.get(config.problem_type, "regression" if len(labels) == 1 else "single"))


def put_on(config: PretrainedConfig, head: Head) -> PretrainedConfig:
    """A copy of ``config`` that describes the model with ``head``; InputError for a family that has none."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    if type(config) not in CLASSES:
        message = "{type}: transformers has no classifier of this family"
        raise InputError(t(message, type=config.model_type))
    found: Any = copy.deepcopy(config)
    chosen: Any = CLASSES[type(config)]
    found.architectures = [chosen.__name__]
    found.id2label = dict(enumerate(head.labels))
    found.label2id = {label: number for number, label in enumerate(head.labels)}
    found.problem_type = PROBLEMS[head.kind]
    return found


def without(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` that describes the language model below its head."""
    found = copy.deepcopy(config)
    found.architectures = None
    return found


def refuse(config: PretrainedConfig, name: str) -> None:
    """InputError for a model with a head, where one that writes words is wanted."""
    if head := of(config):
        message = "{name} tells {labels} and writes no words; measure it with weitiao eval --task classify"
        raise InputError(t(message, name=name, labels=", ".join(head.labels)))


def scores(model: nn.Module, ids: Tensor, attention: Tensor) -> Tensor:
    """What the head says of every row, float32 [B, labels]; ``ids`` and ``attention`` [B, T] are padded on either side.

    A causal model is read at a row's last token that ``attention`` marks, whatever token fills the rest: where the
    padding is the end token, as with GPT-2, a look at the ids alone could not tell. An encoder reads as its family
    does.
    """
    import torch

    from weitiao.models import modules, shape
    from weitiao.models.block import layout

    inner = modules.inner(model)
    if shape.kind_of(inner.config) != "causal":
        return inner(input_ids=ids, attention_mask=attention).logits.float()
    places = torch.arange(ids.shape[1], device=ids.device)
    last = (attention * (places + 1)).argmax(1)
    if not bool((attention.sum(1) == last + 1).all()):
        given = {"attention_mask": attention, "position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
    else:
        given = layout(model, ids, attention.sum(1))
    hidden = modules.backbone(model)(input_ids=ids, use_cache=False, **given).last_hidden_state[:, -ids.shape[1] :]
    (name,) = shape.read(inner.config).head_modules
    return inner.get_submodule(name)(hidden[torch.arange(len(ids), device=ids.device), last]).float()
