"""LoRA (Hu et al., arXiv 2106.09685): small matrices beside the frozen linears, in PEFT's layers and folder format.

LoRA(rank=8, alpha=16).attach(model)

The base is held once, in the compute dtype; the small matrices are float32.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from weitiao.errors import InputError, t
from weitiao.methods.base import Method, trainable

if TYPE_CHECKING:
    from torch import nn

    from weitiao.models.shape import Shape

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER = "default"


class LoRA(Method):
    """Low-rank adaptation: y = Wx + (alpha / rank) · B A dropout(x), with W frozen."""

    saves: ClassVar[Literal["adapter", "model"]] = "adapter"

    name: Literal["lora"] = Field(default="lora", description="small matrices beside frozen linears")
    rank: int = Field(default=8, ge=1, description="inner width of the added matrices")
    alpha: float = Field(default=16, gt=0, description="strength: what is added is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of inputs to the added matrices that is dropped")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear",
        description="linears that get one: all-linear (the output head apart), or ends of dotted names",
    )
    rslora: bool = Field(default=False, description="scale by alpha / √rank (arXiv 2312.03732), steadier at high ranks")
    modules_to_save: tuple[str, ...] = Field(
        default=(), description="further modules that train whole and are saved in the adapter, by ends of dotted names"
    )

    def attach(self, model: Any) -> nn.Module:
        """Wrap the chosen linears of ``model``; only what is added trains, in float32."""
        from peft import LoraConfig, get_peft_model

        from weitiao.models import modules, shape

        linears = modules.linears(model)
        targets = modules.pick(linears, self._wanted, "method.target_modules")
        self._saved(shape.read(model.config))
        config = LoraConfig(
            task_type="CAUSAL_LM" if shape.kind_of(model.config) == "causal" else None,
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType] (PEFT divides by it, any number will do)
            lora_dropout=self.dropout,
            target_modules=short_names(targets, [name for name, _ in model.named_modules()]),
            use_rslora=self.rslora,
            modules_to_save=list(self.modules_to_save) or None,
            fan_in_fan_out=all(type(linears[name]).__name__ == "Conv1D" for name in targets),
        )
        with _without_future_warnings():
            return _float32(get_peft_model(model, config))

    @property
    def _wanted(self) -> str | Sequence[str]:
        return self.target_modules

    def _saved(self, shape: Shape) -> set[str]:
        """Names of the base's parameters that train whole; InputError for an unknown module or a tied one."""
        from weitiao.models import modules

        names = {name.rpartition(".")[0] for name in shape.tensors}
        names = sorted(names | {above for name in names for above in _parents(name)})
        chosen = modules.pick(names, self.modules_to_save, "method.modules_to_save")
        found = {name for name in shape.tensors if any(name.startswith(module + ".") for module in chosen)}
        tied = [name for name in found if shape.tied and shape.tensors[name] == (shape.vocab, shape.hidden)]
        if tied:
            message = "method.modules_to_save: {name} is both embedding and head here; method.name=freeze trains it"
            raise InputError(t(message, name=tied[0]))
        return found

    def count(self, shape: Shape) -> int:
        """rank · (inputs + outputs) for every chosen linear, and what trains whole."""
        from weitiao.models import modules

        linears = {linear.name: linear for linear in shape.linears}
        targets = modules.pick(linears, self._wanted, "method.target_modules")
        added = sum(self.rank * (linears[name].inputs + linears[name].outputs) for name in targets)
        return added + sum(math.prod(shape.tensors[name]) for name in self._saved(shape))

    def training(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Autocast brings inputs to the right dtype by itself; PEFT would copy each to float32 before."""
        import torch
        from peft.helpers import disable_input_dtype_casting

        return disable_input_dtype_casting(model, torch.is_autocast_enabled(next(model.parameters()).device.type))

    def merge(self, model: Any) -> nn.Module:
        """The base with the product of the small matrices added to its weights; the wrapped model is used up."""
        return model.merge_and_unload(safe_merge=True)

    def save(self, model: Any, folder: Path, base: str) -> None:
        """``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        config = copy.copy(model.peft_config[ADAPTER])
        config.inference_mode, config.base_model_name_or_path = True, base
        # the embedding is saved where it trains; PEFT's own guess would ask the hub about the base
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))

    def load(self, model: Any, folder: Path) -> nn.Module:
        """``model`` with the adapter in ``folder``, ours or PEFT's own; InputError unless it fits exactly."""
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        read_config(folder)
        try:
            with _without_future_warnings():
                tuned = PeftModel.from_pretrained(model, str(folder), ADAPTER, is_trainable=True)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise InputError(t("{path}: {reason}", path=folder, reason=" ".join(str(error).split()))) from error
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            written = set(file.keys())
        if wrong := sorted(
            written ^ get_peft_model_state_dict(tuned, adapter_name=ADAPTER, save_embedding_layers=False).keys()
        ):
            message = "{path}: the adapter does not fit its base: {count} tensors differ, {name} first"
            raise InputError(t(message, path=folder, count=len(wrong), name=wrong[0]))
        return _float32(tuned)

    @classmethod
    def of(cls, folder: Path) -> LoRA:
        """The method that an adapter folder was made with, as far as these options can say it."""
        values = read_config(folder)
        targets = values.get("target_modules") or cls.model_fields["target_modules"].default
        options = {
            "rank": values["r"],
            "alpha": values["lora_alpha"],
            "dropout": values.get("lora_dropout", 0.0),
            "target_modules": targets,
            "rslora": values.get("use_rslora", False),
            "modules_to_save": values.get("modules_to_save") or (),
        }
        return cls.model_validate(options)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's own description; InputError for what is missing, or an adapter of another kind."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            t("{path}: not an adapter's description ({reason})", path=folder / CONFIG, reason=error)
        ) from None
    if kind != "LORA":
        raise InputError(t("{path}: adapters of the kind {kind} are not offered (LORA)", path=folder, kind=kind))
    if not (folder / WEIGHTS).is_file():
        raise InputError(t("{path}: {file} is missing", path=folder, file=WEIGHTS))
    return values


def short_names(targets: Sequence[str], names: Iterable[str]) -> list[str]:
    """``targets`` by their last words (``q_proj``) where those mean exactly the same modules, as other programs expect;
    otherwise in full."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    meant = {name for name in names if name.rpartition(".")[2] in ends}
    return ends if meant == set(targets) else list(targets)


def _parents(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``."""
    words = name.split(".")
    return [".".join(words[:end]) for end in range(1, len(words))]


def _float32(model: nn.Module) -> nn.Module:
    """Hold what trains in float32."""
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


@contextmanager
def _without_future_warnings() -> Iterator[None]:
    """PEFT calls names that transformers has since renamed; that is nothing a person here can mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
