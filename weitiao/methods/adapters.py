"""PEFT's wrapper and folder format, for every method that stands on it.

    tuned = wrap(model, LoraConfig(r=8, ...))
    save(tuned, folder, base="weitiao-tiny-zh")
    tuned = load(model, folder, "LORA")
    use(tuned, {"hotel": 0.7, "chat": 0.3})      # of several that were loaded under these names

The folder is PEFT's own in both directions: ``adapter_config.json`` and ``adapter_model.safetensors``.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.errors import InputError, t
from weitiao.methods.base import compute_dtype, trainable
from weitiao.weights import bounded, header, inspect, tokenizer

if TYPE_CHECKING:
    from torch import nn

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER = "default"
CODE = ("megatron_config",)  # PEFT would import what megatron_core beside it names
PATTERNS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
NARROW = 64  # below this a matrix is no sublayer of a model that people tune


def wrap(model: Any, config: Any) -> nn.Module:
    """``model`` in PEFT's wrapper; only what is added trains, in float32."""
    from peft import get_peft_model

    with _without_warnings():
        return _float32(get_peft_model(model, config))


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """Under autocast inputs come to the right dtype by themselves; PEFT would copy each to float32 before."""
    import torch

    casting: list[Any] = []
    if compute_dtype(model) != torch.float32:  # then there is autocast, and not every layer of PEFT's casts
        casting = [module for module in model.modules() if getattr(module, "cast_input_dtype_enabled", False)]
    for module in casting:
        module.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for module in casting:
            module.cast_input_dtype_enabled = True


def task_of(model: Any, also: Sequence[str] = ()) -> dict[str, Any]:
    """What PEFT's configurations say of the task, and which modules are saved beside what a method adds: a task's head,
    and ``also``."""
    from weitiao.models import modules, shape

    head = [name.rpartition(".")[2] for name in modules.task_head(model)]
    kind = "CAUSAL_LM" if shape.kind_of(modules.inner(model).config) == "causal" else None
    return {"task_type": "SEQ_CLS" if head else kind, "modules_to_save": [*also, *head] or None}


def check_ranks(ranks: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]) -> None:
    """InputError where a rank is above any that its matrix, of these inputs and outputs, can have. Narrow ones, which a
    mixture's routers and gates are, count for nothing."""
    tops = {name: min(sizes[name]) for name in ranks}
    if wrong := [name for name, rank in ranks.items() if rank > max(tops[name], NARROW)]:
        least = min(wrong, key=lambda name: tops[name])
        message = (
            "method.rank: {rank} is above what {count} of the matrices can have ({name}: {inputs} x {outputs}); "
            "take {top} or less, or others as method.target_modules"
        )
        inputs, outputs = sizes[least]
        raise InputError(
            t(message, rank=ranks[least], count=len(wrong), name=least, inputs=inputs, outputs=outputs, top=tops[least])
        )


def save(model: Any, folder: Path, base: str) -> None:
    """The adapter as PEFT writes it."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode, config.base_model_name_or_path = True, base
    # the embedding is saved where it trains; PEFT's own guess would ask the hub about the base
    with _without_warnings():
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load(model: Any, folder: Path, *kinds: str, name: str = ADAPTER) -> nn.Module:
    """``model``, or the wrapped model beside its other adapters, with the adapter in ``folder``, ours or PEFT's own,
    called ``name``; InputError unless it fits exactly."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    base = read_config(folder, *kinds).get("base_model_name_or_path")
    try:
        with _without_warnings():
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, is_trainable=True)
                tuned = model
            else:
                tuned = PeftModel.from_pretrained(model, str(folder), name, is_trainable=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        if wrong := re.findall(r"size mismatch for (\S+):", str(error)):
            raise misfit(folder, base, model, wrong) from None
        raise InputError(t("{path}: {reason}", path=folder, reason=" ".join(str(error).split()))) from error
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        written = set(file.keys())
    with _without_warnings():
        state = get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False)
    if wrong := sorted(written ^ state.keys()):
        raise misfit(folder, base, model, wrong)
    return _float32(tuned)


def misfit(folder: Path, base: object, model: Any, wrong: Sequence[str]) -> InputError:
    """What to say where the tensors ``wrong`` of an adapter made for ``base`` are not those that ``model`` takes."""
    message = "{path}: the adapter was made for {base} and does not fit {model}: {count} tensors differ, {name} first"
    return InputError(t(message, path=folder, base=base, model=model.name_or_path, count=len(wrong), name=wrong[0]))


def merge(model: Any) -> nn.Module:
    """The base with the adapters in use added to its weights, plain where it was codes; the wrapper is used up."""
    from weitiao.models.quantized import dequantize

    return dequantize(model).merge_and_unload(safe_merge=True)  # type: ignore[operator]


def use(model: Any, weights: Mapping[str, float]) -> None:
    """From now on the model computes with these adapters, each times its weight: one to switch to it, several for their
    weighted sum. InputError for a name that is not loaded, and for a weight that DoRA cannot take."""
    from peft.tuners.lora import LoraLayer

    if unknown := [name for name in weights if name not in model.peft_config]:
        known = ", ".join(model.peft_config)
        raise InputError(t('no adapter "{name}" is loaded ({known})', name=unknown[0], known=known))
    mixed = len(weights) != 1 or any(weight != 1 for weight in weights.values())
    if mixed and any(getattr(model.peft_config[name], "use_dora", False) for name in weights):
        raise InputError(t("a DoRA adapter scales its base's weights and cannot be weighted or summed; use it alone"))
    model.base_model.set_adapter(list(weights))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, weight in weights.items():
                layer.set_scale(name, weight)


def read_config(folder: Path, *kinds: str) -> dict[str, Any]:
    """The adapter's own description; InputError for what is missing, or an adapter of none of ``kinds``."""
    inspect.refuse_links(folder)
    try:
        values = bounded.json_object(folder / CONFIG)
        kind = values["peft_type"]
        if not isinstance(kind, str):
            raise KeyError("peft_type")
    except (InputError, OSError, KeyError) as error:
        raise InputError(
            t("{path}: not an adapter's description ({reason})", path=folder / CONFIG, reason=error)
        ) from None
    if kinds and kind not in kinds:
        message = "{path}: an adapter of the kind {kind}, not {wanted}"
        raise InputError(t(message, path=folder, kind=kind, wanted=", ".join(kinds)))
    if named := [key for key in CODE if values.get(key)]:
        message = "{path}: {name} names a module to be imported ({value}); it is refused"
        raise InputError(t(message, path=folder / CONFIG, name=named[0], value=str(values[named[0]])[:80]))
    for key in PATTERNS:
        texts = [values.get(key)] if isinstance(values.get(key), str) else list(values.get(key) or ())
        if any(isinstance(text, str) and tokenizer.REPEATED.search(text) for text in texts):
            raise InputError(t("{path}: {name}: a pattern could take for ever", path=folder / CONFIG, name=key))
    if not (folder / WEIGHTS).is_file():
        raise InputError(t("{path}: {file} is missing", path=folder, file=WEIGHTS))
    header.read_header(folder / WEIGHTS)
    return values


def layers(model: Any, kind: type) -> dict[str, Any]:
    """PEFT's layers of a ``kind`` by the name of the linear that each wraps."""
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, kind)}


def short_names(targets: Sequence[str], names: Iterable[str]) -> list[str]:
    """``targets`` by their last words (``q_proj``) where those mean exactly the same modules, as other programs expect;
    otherwise in full."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    meant = {name for name in names if name.rpartition(".")[2] in ends}
    return ends if meant == set(targets) else list(targets)


def _float32(model: nn.Module) -> nn.Module:
    """Hold what trains in float32."""
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


@contextmanager
def _without_warnings() -> Iterator[None]:
    """PEFT calls names that transformers has since renamed, and wonders at its own AdaLoRA files, also where a rank has
    gone to zero; that is nothing a person here can mend. Whether an adapter fits is checked by ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
