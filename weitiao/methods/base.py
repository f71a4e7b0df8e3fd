"""What a tuning method answers. The defaults do nothing; a method overrides what it needs.

model = method.attach(model)     # the same code when training and when loading
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from weitiao.config import Options
from weitiao.errors import InputError, t

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from weitiao.models.shape import Shape


class Method(Options):
    """Base of every method; frozen options with the answers of the design's section 3."""

    saves: ClassVar[Literal["adapter", "model"]] = "model"
    adds: ClassVar[bool] = False  # whether what trains comes on top of the base's own parameters
    fuses: ClassVar[bool] = True  # ``models.block`` knows what it makes of a block
    learning_rate: ClassVar[float] = 2e-4  # a recipe's, where it names none
    peft_type: ClassVar[str] = ""  # PEFT's name of the method, for one whose folders are PEFT's

    @classmethod
    def described(cls, values: Mapping[str, Any]) -> Method:
        """The method of an ``adapter_config.json``, as far as these options can say it."""
        return cls()

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze and wrap ``model`` for tuning; what trains is float32 afterwards."""
        raise NotImplementedError

    def count(self, shape: Shape) -> int:
        """Trainable parameters, exactly, before anything is loaded; a task's head is among them."""
        raise NotImplementedError

    def base_names(self, shape: Shape) -> set[str]:
        """Names of the base's own parameters that train; what a method adds is not among them."""
        return set()

    def begin(self, model: nn.Module, total_steps: int) -> None:
        """Called once before the first step of a run, and before :meth:`restore` when one is resumed."""

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What the method keeps between steps beside the parameters, for the checkpoint."""
        return {}

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Go on with what :meth:`state` gave."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after the optimiser's step while gradients are still there."""

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Added to the loss of a step."""
        return 0.0

    def training(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Held open around the loop's forward passes and their backward passes, which may compute layers again."""
        return nullcontext()

    def outcome(self, model: nn.Module) -> dict[str, str]:
        """What a run's report says of the method's own result, by name."""
        return {}

    def parameter_groups(self, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """Optimiser groups: matrices decay, vectors (biases, norms) do not; ``linear`` marks the weights of linears."""
        trained, linear = trainable(model).values(), _linear_weights(model)
        groups = [
            {"params": [p for p in trained if p.ndim >= 2 and id(p) in linear], "lr": learning_rate, "linear": True},
            {"params": [p for p in trained if p.ndim >= 2 and id(p) not in linear], "lr": learning_rate},
            {"params": [p for p in trained if p.ndim < 2], "lr": learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def disabled(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside the block ``model`` is the base as it was; InputError for a method that changes the base itself."""
        message = "method.name={name} changes the base itself and cannot be switched off; load the base beside it"
        raise InputError(t(message, name=type(self).model_fields["name"].default))

    def merge(self, model: nn.Module) -> nn.Module:
        """A plain model with the same outputs; InputError if the method cannot be merged."""
        return model

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write the tuned weights into ``folder``, which exists and is empty."""
        raise NotImplementedError

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """``model`` (the base) with what :meth:`save` wrote."""
        raise NotImplementedError


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name, each once (tied weights have one name)."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def result_bytes(model: nn.Module, method: Method) -> int:
    """What the tensors that ``method`` saves of ``model`` take on disk."""
    if method.saves == "adapter":
        return sum(parameter.nbytes for parameter in trainable(model).values())
    return sum(parameter.numel() for parameter in model.parameters()) * compute_dtype(model).itemsize


def _linear_weights(model: nn.Module) -> set[int]:
    """Ids of the weights of all linears but the output head's, which may be the embedding."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from weitiao.models import modules

    head = modules.output_linear(model)
    found = (m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return {id(module._parameters.get("weight")) for module in found}


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What matrix products are computed in: the dtype the model was loaded with, however its trainables are held."""
    import torch

    dtype = getattr(model.config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype or next(model.parameters()).dtype


def computing(model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to the model's compute dtype; nothing where that is float32."""
    import torch

    device, dtype = next(model.parameters()).device.type, compute_dtype(model)
    return torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)


def train_only(model: nn.Module, names: set[str]) -> None:
    """Freeze everything but the parameters called ``names`` and a task's head, which become float32."""
    from weitiao.models import modules

    head = tuple(part + "." for part in modules.task_head(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or name.startswith(head))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_plain(model: Any, folder: Path) -> None:
    """Write ``model`` as a plain model folder in its compute dtype, however its trainables are held."""
    from weitiao.models.quantized import plain_state
    from weitiao.models.shape import quiet

    dtype = compute_dtype(model)
    cast: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay one tensor and are written once
    state = {
        name: cast.setdefault(tensor.data_ptr(), tensor.to(dtype) if tensor.is_floating_point() else tensor)
        for name, tensor in plain_state(model, dtype).items()
    }
    try:
        with quiet():
            model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = dtype  # it notes the parameters' dtype instead
    model.config.save_pretrained(folder)
