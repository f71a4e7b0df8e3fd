"""Where things are in a model: found by structure (types, sizes, transformers' own accessors), not by tables of names.

    blocks(model)            # the repeated layers, in order
    linears(model)           # name -> every linear except the output head (GPT-2's Conv1D counts as linear)
    head(model)(backbone(model)(input_ids=ids).last_hidden_state)   # the logits

A model wrapped by PEFT is looked through. A family that does more to its logits than its head (a scale, a soft cap)
gets a head that does the same.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from weitiao.errors import InputError, t

ALL_LINEAR = "all-linear"


def inner(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def backbone(model: nn.Module) -> nn.Module:
    """The model without its head: its output has ``last_hidden_state``, after the final norm."""
    body = inner(model).base_model
    if body is inner(model):
        raise InputError(t("{model} has no head above a backbone", model=type(body).__name__))
    return body


def blocks(model: nn.Module) -> nn.ModuleList:
    """The repeated layers in order: the module list that holds the most parameters."""
    lists = [module for module in inner(model).modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise InputError(t("{model} has no list of layers", model=type(inner(model)).__name__))
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))


def embedding(model: nn.Module) -> nn.Embedding:
    """The token embedding [vocabulary, hidden]."""
    return inner(model).get_input_embeddings()


def output_linear(model: nn.Module) -> nn.Module | None:
    """The linear whose rows are the vocabulary, tied to the embedding or not; None for a model without one."""
    return inner(model).get_output_embeddings()


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name: ``past_key_values``, or RWKV's ``state``."""
    return argument in inspect.signature(inner(model).forward).parameters


def positions(model: nn.Module) -> int | None:
    """The longest input in tokens; None where the configuration names none. A family that gives padding a position of
    its own (RoBERTa) counts tokens from the one behind it."""
    limit = getattr(inner(model).config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables: list[Any] = [table for name, table in inner(model).named_modules() if name.endswith("position_embeddings")]
    padding = [index for table in tables if (index := getattr(table, "padding_idx", None)) is not None]
    return limit - max(padding, default=-1) - 1 if type(limit) is int else None


class Head(nn.Module):
    """A head and what its family does to the logits after it. It owns no parameters beside the head's."""

    def __init__(self, linear: nn.Module, scale: float, cap: float | None):
        super().__init__()
        self.linear, self.scale, self.cap = linear, scale, cap

    @property
    def weight(self) -> torch.Tensor:
        """The head's matrix [vocabulary, hidden]."""
        return self.linear.weight  # type: ignore[return-value]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden] to logits [..., vocabulary]."""
        logits = self.linear(hidden) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def head(model: nn.Module) -> nn.Module:
    """What turns the backbone's hidden states into the model's logits, applied to any positions.

    Usually the output linear itself; BERT's whole prediction head; a ``Head`` for a family that scales
    (Cohere ``logit_scale``, Granite ``logits_scaling``) or caps (Gemma 2 ``final_logit_softcapping``) its logits.
    """
    linear = output_linear(model)
    if linear is None:
        raise InputError(t("{model} has no output head", model=type(inner(model)).__name__))
    body, whole = backbone(model), linear
    for child in inner(model).children():  # the outermost module beside the backbone that holds the output linear
        if child is not body and any(module is linear for module in child.modules()):
            whole = child
    config = inner(model).config
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return whole if scale == 1.0 and cap is None else Head(whole, scale, cap)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Forward three tokens and compare ``head(backbone(x))`` with the model's own logits; InputError if they differ.

    Training and scoring rely on that equality; a family that breaks it must be refused, not trained wrongly.
    """
    ids = torch.arange(3, device=embedding(model).weight.device)[None]
    ours = head(model)(backbone(model)(input_ids=ids).last_hidden_state)
    theirs = inner(model)(input_ids=ids).logits
    if not torch.allclose(ours.float(), theirs.float(), atol=1e-3, rtol=1e-2):
        name = inner(model).config.model_type
        raise InputError(t("{family}: its logits are not its head applied to its hidden states", family=name))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product with an optional bias: ``nn.Linear`` or GPT-2's transposed ``Conv1D``; one
    of a mixture's experts in codes is not, as plain experts are not."""
    return isinstance(module, nn.Linear | Conv1D) and not getattr(module, "of_a_stack", False)


def in_out(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear; Conv1D keeps its weight as [in, out]."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def linears(model: nn.Module, head: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Name -> linear, in the model's order, without the output head; before any method is attached. ``head``: the
    modules of a task's head, if they are known already."""
    skip, head = output_linear(model), task_head(model) if head is None else head
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not skip and not any(f"{name}.".startswith(f"{part}.") for part in head)
    }


def task_head(model: nn.Module) -> tuple[str, ...]:
    """Dotted names of the modules of a task's head (``models.heads``); none for a language model."""
    from weitiao.models import heads, shape

    config = inner(model).config
    return shape.read(config).head_modules if heads.has_one(config) else ()


def head_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a task's head by their names in the model, detached."""
    parts = tuple(f"{part}." for part in task_head(model))
    return {name: parameter.detach() for name, parameter in inner(model).named_parameters() if name.startswith(parts)}


def matches(name: str, target: str) -> bool:
    """Whether ``target`` names the module ``name``: its whole path or a dotted end of it (PEFT's rule)."""
    return name == target or name.endswith("." + target)


def pick(names: Iterable[str], wanted: str | Sequence[str], option: str = "target_modules") -> list[str]:
    """Those of ``names`` that ``wanted`` means: ``all-linear``, or ends of dotted names such as ``q_proj``.

    InputError lists every wanted name that matches nothing, each with the nearest that exist.
    """
    names = list(names)
    if wanted == ALL_LINEAR:
        return names
    targets = [wanted] if isinstance(wanted, str) else list(wanted)
    lonely = [target for target in targets if not any(matches(name, target) for name in names)]
    if lonely:
        raise InputError([_unknown(option, target, names) for target in lonely])
    return [name for name in names if any(matches(name, target) for target in targets)]


def _unknown(option: str, target: str, names: list[str]) -> str:
    """The message for a module name that matches nothing."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(target.rpartition(".")[2], ends, n=1, cutoff=0.5)
    here = ", ".join([ALL_LINEAR, *ends])
    if near:
        return t(
            '{option}: no module "{name}"; did you mean "{near}"? ({here})',
            option=option,
            name=target,
            near=near[0],
            here=here,
        )
    return t('{option}: no module "{name}" ({here})', option=option, name=target, here=here)
