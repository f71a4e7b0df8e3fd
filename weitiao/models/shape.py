"""The shape of a model from its config.json alone: no weights are read, none are made.

    shape = read("models/qwen2-0.5b")
    shape.parameters                    # exact: every parameter counted once, tied ones too
    [(l.name, l.inputs, l.outputs) for l in shape.linears]

The model is built on torch's meta device, where a tensor has a shape and no memory, so the counts are those of the
real class and not of a formula; a 70-billion-parameter configuration takes well under a second.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weitiao.errors import InputError, t
from weitiao.models import heads, sizes
from weitiao.weights import bounded

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FILE = "config.json"
CLOSE = 0.85  # so that hiden_size is a slip and the older rope_theta is not
OWN = "chatglm"  # the model type of ChatGLM-6B, which transformers lacks
# RWKV's trick for float16 halves weights in place on the way to evaluation, under adapters, codes and what is saved
OVERRIDES: dict[str, dict[str, Any]] = {"rwkv": {"rescale_every": 0}}
# which kernels run is decided by this program: a file that could name one could name code to be fetched and run
KERNEL_CHOICE = re.compile(r"^_?((attn|experts)_implementation|hub_kernels?$|use_kernels?$)")
REPOSITORY = re.compile(r'[^"\s]*/[^"\s]*')  # owner/name, where a published file has sdpa or flash_attention_2
CODE = ("auto_map", "trust_remote_code", "code_revision", "custom_generate", "custom_pipelines")  # left unread
DEEP = 32  # levels of lists and objects in a configuration


@dataclass(frozen=True)
class Linear:
    """One matrix product with ``inputs`` x ``outputs`` weights, by its dotted name in the model."""

    name: str
    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class Experts:
    """The matrices of a mixture's experts that are one tensor [count, …] by this name; no linear is."""

    name: str
    count: int
    inputs: int
    outputs: int
    coded: bool  # whether ``models.quantized`` puts codes in its place


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. ``linears`` leaves out output and task heads; ``tensors`` has every parameter once."""

    model_type: str
    kind: str  # "causal" or "masked"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int | None  # the longest input in tokens, where the configuration says
    tied: bool
    linears: tuple[Linear, ...]
    tensors: Mapping[str, tuple[int, ...]]
    configuration: str  # JSON, what it was read from
    head: frozenset[str] = frozenset()  # names of the tensors of a task's head, which no language model has
    attention: str = "fused"  # or "eager": a T x T matrix for every head; "recurrent": a state instead of a cache
    experts: tuple[Experts, ...] = ()
    experts_per_token: int = 0  # of those of a block
    embedding: str = ""  # the token embedding's dotted name

    def build(self) -> Any:
        """A model of this shape on the meta device: all of its modules, none of its weights."""
        return _skeleton(_checked(json.loads(self.configuration), CONFIG_FILE))

    @cached_property
    def parameters(self) -> int:
        """Exact number of parameters, tied ones once."""
        return sum(math.prod(size) for size in self.tensors.values())

    def parameters_under(self, *modules: str) -> int:
        """Parameters of the modules with these dotted names (and of what they hold)."""
        inside = tuple(name + "." for name in modules)
        return sum(math.prod(size) for name, size in self.tensors.items() if name.startswith(inside) or name in modules)

    @property
    def head_parameters(self) -> int:
        """Parameters of a task's head; 0 without one."""
        return sum(math.prod(self.tensors[name]) for name in self.head)

    @cached_property
    def head_modules(self) -> tuple[str, ...]:
        """Dotted names of the outermost modules of a task's head."""
        return _outermost(self.head, self.tensors)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Dotted names of the repeated layers, in order."""
        best: dict[str, list[str]] = {}
        for name in self.tensors:
            if found := re.match(r"(.*?)\.\d+(?=\.)", name):
                best.setdefault(found[1], []).append(found[0])
        lists = [tuple(dict.fromkeys(names)) for names in best.values()]
        return max(lists, key=lambda names: self.parameters_under(*names), default=())

    @cached_property
    def products(self) -> int:
        """Weights that a token meets: every linear's, and of a mixture those of the experts that it is sent to."""
        chosen = sum(stack.inputs * stack.outputs for stack in self.experts) * self.experts_per_token
        return chosen + sum(linear.inputs * linear.outputs for linear in self.linears)

    @cached_property
    def widths(self) -> int:
        """Numbers that go into and come out of those products, a token, and four hidden states a layer beside them."""
        chosen = sum(stack.inputs + stack.outputs for stack in self.experts) * self.experts_per_token
        around = 4 * self.hidden * self.layers
        return chosen + around + sum(linear.inputs + linear.outputs for linear in self.linears)

    def table(self) -> list[tuple[str, int, int, int]]:
        """(name, inputs, outputs, count) of the linears, layers of the same kind in one line."""
        rows: dict[tuple[str, int, int], int] = {}
        for linear in self.linears:
            key = (re.sub(r"\.\d+\.", ".*.", linear.name), linear.inputs, linear.outputs)
            rows[key] = rows.get(key, 0) + 1
        return [(*key, count) for key, count in rows.items()]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars and log lines; what matters is said by this project."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_config(source: str | Path | Mapping[str, Any]) -> PretrainedConfig:
    """A checked transformers configuration from a folder, a config.json or its content; nothing in it is executed.

    InputError for a file that is missing or no JSON object, a model type unknown to transformers (with what its
    folder would have to run), weights that are already quantised, and sizes that its class refuses. Content given
    directly was written for this program, so that a key close to a known one is taken for a slip of the pen; published
    files hold many keys of their own.
    """
    if not isinstance(source, Mapping):
        return _checked(*_read_json(Path(source)))
    config = _checked(dict(source), "model.config")
    known = [*type(config)().to_dict(), *type(config).attribute_map]
    near = {key: difflib.get_close_matches(key, known, n=1, cutoff=CLOSE) for key in source if key not in known}
    if slips := [(key, found[0]) for key, found in near.items() if found]:
        message = '{file}: {name}: no such key; did you mean "{near}"?'
        raise InputError([t(message, file="model.config", name=name, near=found) for name, found in slips])
    return config


def _checked(values: dict[str, Any], where: str) -> PretrainedConfig:
    """The configuration with these values, or InputError."""
    from transformers import CONFIG_MAPPING

    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise InputError(t('{file}: "model_type" is missing', file=where))
    if model_type == OWN:
        _register(values, where)
    if model_type not in CONFIG_MAPPING:
        code = ", ".join(sorted(_code(values.get("auto_map"))))
        if code:
            message = '{file}: model type "{type}" needs code from its own folder ({code}), which is never run here'
            raise InputError(t(message, file=where, type=model_type, code=code))
        raise InputError(t('{file}: transformers has no model type "{type}"', file=where, type=model_type))
    if quantised := values.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, Mapping) else "?"
        message = "{file}: the weights are already quantised ({method}); take the model they were made from"
        raise InputError(t(message, file=where, method=method))
    kind = CONFIG_MAPPING[model_type]
    values = _without_code(values, where)
    sizes.check(values, kind.attribute_map, where)
    try:
        return kind.from_dict(values | OVERRIDES.get(model_type, {}))
    except Exception as error:  # each class validates in its own way; whatever it says is about this file
        reason = sizes.refusal(error, kind().to_dict() | values, kind.attribute_map)
        raise InputError(t("{file}: {reason}", file=where, reason=reason)) from error


def _register(values: Mapping[str, Any], where: str) -> None:
    """Make ChatGLM-6B known to transformers; InputError for its successors, which go by the same name."""
    if "multi_query_group_num" in values:
        message = "{file}: ChatGLM2 and ChatGLM3 are read once they are rewritten: weitiao convert FOLDER OUT"
        raise InputError(t(message, file=where))
    from weitiao.models import chatglm

    chatglm.register()


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object of a config.json (or of the one in a folder) and its name."""
    path = path / CONFIG_FILE if path.is_dir() else path
    return bounded.json_object(path), str(path)


def _code(auto_map: Any) -> set[str]:
    """The Python modules that an ``auto_map`` names."""
    names = auto_map.values() if isinstance(auto_map, Mapping) else []
    return {str(name).rpartition(".")[0] + ".py" for name in names if isinstance(name, str)}


def _without_code(values: Any, where: str, deep: int = 0) -> Any:
    """The configuration without the keys that choose kernels or name code, at any depth; InputError for a kernel that
    would be fetched (CVE-2026-4372)."""
    if deep > DEEP:
        raise InputError(t("{file}: it nests values more than {depth} deep", file=where, depth=DEEP))
    if isinstance(values, list):
        return [_without_code(value, where, deep + 1) for value in values]
    if not isinstance(values, Mapping):
        return values
    for key, value in values.items():
        if KERNEL_CHOICE.match(str(key)) and (fetched := REPOSITORY.search(json.dumps(value, default=str))):
            message = "{file}: {name} names code to be fetched and run ({value}); it is refused"
            raise InputError(t(message, file=where, name=key, value=fetched[0][:80]))
    kept = {key: value for key, value in values.items() if not (KERNEL_CHOICE.match(str(key)) or key in CODE)}
    return {key: _without_code(value, where, deep + 1) for key, value in kept.items()}


def names_code(folder: Path) -> str:
    """What of a folder's config.json names code of its own, in words; "" for nothing. None of it is ever run."""
    values, _ = _read_json(folder)
    named = [key for key in CODE if values.get(key)]
    modules = ", ".join(sorted(_code(values.get("auto_map"))))
    return ", ".join(named) + (f" ({modules})" if modules else "")


def kind_of(config: PretrainedConfig) -> str:
    """``causal`` (predicts the next token) or ``masked`` (an encoder such as BERT); InputError for anything else."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if getattr(config, "is_encoder_decoder", False):
        raise InputError(t("{type}: encoder-decoder models are not supported", type=config.model_type))
    if config.model_type in MASKED and not getattr(config, "is_decoder", False):
        return "masked"
    if type(config) in CAUSAL:
        return "causal"
    raise InputError(t("{type}: not a language model for text", type=config.model_type))


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' auto class for the configuration's kind, or for its task's head."""
    import transformers

    if heads.has_one(config):
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForMaskedLM if kind_of(config) == "masked" else transformers.AutoModelForCausalLM


def read(source: str | Path | Mapping[str, Any] | PretrainedConfig, vocab_size: int | None = None) -> Shape:
    """The shape of the model that a folder, a config.json, its content or a configuration describes.

    ``vocab_size`` overrides the configuration's, as it does when ``models.load`` builds a new model.
    """
    from transformers import PretrainedConfig

    config = source if isinstance(source, PretrainedConfig) else read_config(source)
    values = config.to_dict() | OVERRIDES.get(config.model_type, {})
    values |= {} if vocab_size is None else {"vocab_size": vocab_size}
    return _measure(config.model_type, json.dumps(values, sort_keys=True, default=str))


@lru_cache(maxsize=32)
def _measure(model_type: str, text: str) -> Shape:
    """Build the model on the meta device and measure it; cached by the configuration's content."""

    from weitiao.models import modules

    values = {**json.loads(text), "model_type": model_type}
    config = _checked(dict(values), CONFIG_FILE)
    model = _skeleton(config)
    names = [name for name, _ in model.named_parameters()]
    plain = _skeleton(heads.without(config)).state_dict() if heads.has_one(config) else names
    head = frozenset(name for name in names if name not in plain)
    vocab, hidden = modules.embedding(model).weight.shape
    query_heads = _size(config, "num_attention_heads") or 1
    output = modules.output_linear(model)
    return Shape(
        model_type=model_type,
        kind=kind_of(config),
        layers=len(modules.blocks(model)),
        hidden=hidden,
        heads=query_heads,
        kv_heads=_size(config, "num_key_value_heads") or query_heads,
        head_dim=_size(config, "head_dim") or hidden // query_heads,
        intermediate=_size(config, "intermediate_size") or _size(config, "n_inner") or 4 * hidden,
        vocab=vocab,
        positions=modules.positions(model),
        tied=output is not None and output.weight is modules.embedding(model).weight,
        linears=tuple(
            Linear(name, *modules.in_out(module), bias=getattr(module, "bias", None) is not None)
            for name, module in modules.linears(model, _outermost(head, names)).items()
        ),
        tensors={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        configuration=json.dumps(values),
        head=head,
        attention=_attention(model),
        experts=tuple(_experts(model)),
        experts_per_token=_size(config, "num_experts_per_tok") or _size(config, "num_experts") or 0,
        embedding=next(name for name, module in model.named_modules() if module is modules.embedding(model)),
    )


def _attention(model: Any) -> str:
    from weitiao.models import modules

    if model._is_stateful and not modules.takes(model, "past_key_values"):
        return "recurrent"
    return "fused" if model._supports_sdpa else "eager"


def _experts(model: Any) -> Iterator[Experts]:
    """A mixture's tensors of three dimensions; modules say whether they hold them as [count, inputs, outputs]."""
    from torch import nn

    from weitiao.models import experts

    coded = {name for name, _ in experts.mixtures(model)}
    for name, module in model.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and weight.shape[0] > 1 and not isinstance(module, nn.Conv1d):
                count, outputs, inputs = weight.shape
                if getattr(module, "is_transposed", False):
                    inputs, outputs = outputs, inputs
                yield Experts(f"{name}.{own}", count, inputs, outputs, name in coded)


def _outermost(head: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """The largest modules that hold nothing but tensors of ``head``."""
    others, found = [name for name in names if name not in head], []
    for name in head:
        words = name.split(".")
        parents = (".".join(words[:end]) for end in range(1, len(words) + 1))
        found.append(next(part for part in parents if not any(other.startswith(part + ".") for other in others)))
    return tuple(sorted(set(found)))


def _skeleton(config: PretrainedConfig) -> Any:
    """The model of ``config`` on the meta device."""
    import torch

    try:
        with torch.device("meta"), quiet():
            return auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="eager")
    except InputError:
        raise
    except Exception as error:  # sizes that do not fit together fail somewhere inside the model's class
        reason = sizes.refusal(error, config.to_dict(), config.attribute_map)
        raise InputError(t("{file}: {reason}", file=CONFIG_FILE, reason=reason)) from error


def _size(config: PretrainedConfig, name: str) -> int | None:
    """A size of the configuration's text model; None where it has none, or (RuntimeError) a different one per layer."""
    try:
        value = getattr(config.get_text_config(), name, None)
    except RuntimeError:
        return None
    return value if type(value) is int else None
