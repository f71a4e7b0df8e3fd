"""Tuned models to folders and back.

    save(model, method, tokenizer, renderer, run.path / "adapter", base="weitiao-tiny-zh")
    tuned = open_model("runs/hotel-lora")       # or an adapter folder, a model folder, the name of a model
    tuned = open_several({"hotel": "runs/hotel-lora", "chat": "runs/chat-lora"})

An adapter folder is PEFT's format with the tokenizer and the chat template beside it; methods that change the base
itself leave a plain model folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weitiao.config import build
from weitiao.errors import InputError, t
from weitiao.methods import METHODS, adapters, of
from weitiao.methods.adapter import CONFIG as BOTTLENECK
from weitiao.methods.adapter import read_config as read_bottleneck
from weitiao.methods.base import Method, result_bytes, trainable
from weitiao.models import heads, shape
from weitiao.models.load import DEFAULT_MODEL, ModelOptions, load, load_tokenizer
from weitiao.runs import Run, is_run
from weitiao.weights import fetch, shards, tensors
from weitiao.weights.folders import problems, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from weitiao.data.render import Renderer

RECORD = "weitiao.json"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Tuned:
    """A model ready to answer. ``method`` is None for one that was not tuned here; ``base`` names what was tuned."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    renderer: Renderer
    method: Method | None
    base: str


def save(
    model: Any, method: Method, tokenizer: PreTrainedTokenizerFast, renderer: Renderer, folder: str | Path, base: str
) -> Path:
    """Write the tuned model into ``folder``, whole or not at all, in place of what was there.

    ``base`` is what was tuned: a name stays a name, a folder is recorded by its absolute path, "" is a new model.
    """
    from weitiao.models.quantized import kind_of

    folder = Path(folder)
    base = str(Path(base).expanduser().resolve()) if base and Path(base).expanduser().is_dir() else base
    with whole(folder, result_bytes(model, method)) as temporary:
        method.save(model, temporary, base)
        tokenizer.save_pretrained(str(temporary))
        renderer.save(temporary)
        record = {"base": base, "method": method.model_dump(mode="json"), "quantized": kind_of(model)}
        if head := heads.of(model.config):
            record["head"] = asdict(head)
        if base and method.saves == "adapter":
            record["base_fingerprint"] = tensors.fingerprint(fetch.resolve(base))
        (temporary / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return folder


def open_model(path: str | Path, dtype: Dtype = "auto", checkpoint: int | None = None) -> Tuned:
    """The model at ``path``, in evaluation mode: a run folder, an adapter folder (PEFT's own too), a model folder, the
    embedded model or a hub repository. ``checkpoint`` takes the weights of that step of a run instead of its result.

    InputError for a folder that is none of these, and for an adapter whose base is not where it was.
    """
    if is_run(path) and checkpoint is not None:
        return _open_checkpoint(Run.open(path), dtype, checkpoint)
    if checkpoint is not None:
        raise InputError(t("{path}: only a run has checkpoints", path=path))
    name = str(Run.open(path).final if is_run(path) else path)
    folder = fetch.resolve(name)
    if any((folder / name).is_file() for name in (adapters.CONFIG, BOTTLENECK)):
        return _open_adapter(folder, dtype)
    if not (folder / "config.json").is_file():
        raise InputError(t("{path}: neither a run, an adapter nor a model (no config.json)", path=path))
    model = load(_options(name, dtype))
    return _tuned(model, folder, _recorded(folder), _record(folder).get("base", name))


def open_several(paths: Mapping[str, str | Path], dtype: Dtype = "auto") -> Tuned:
    """One base with several LoRA adapters (runs or folders) under names; ``adapters.use`` switches between them and
    weights them, and at first the first is in use. Tokenizer and template are the first's.

    InputError for another method's result, and for adapters of different bases.
    """
    folders = {name: fetch.resolve(str(Run.open(path).final if is_run(path) else path)) for name, path in paths.items()}
    problems = [t("{name}: an adapter's name is a word", name=name) for name in paths if not name.isidentifier()]
    problems += [
        t("{path}: not a LoRA adapter; only those can be loaded side by side", path=folder)
        for folder in folders.values()
        if not (folder / adapters.CONFIG).is_file() or adapters.read_config(folder)["peft_type"] != "LORA"
    ]
    if problems:
        raise InputError(problems)
    (first, start), *others = folders.items()
    base, base_folder = base_of(start)
    for folder in folders.values():
        _check_base(folder, base, base_folder)
        if base_of(folder)[1] != base_folder:
            message = "{path}: made for the base {other}, the first one for {base}; adapters are summed on one base"
            raise InputError(t(message, path=folder, other=base_of(folder)[0], base=base))
    method = _recorded(start) or of(start)
    model: Any = load(_options(str(base_folder), dtype, _record(start).get("quantized")))
    model = adapters.load(model, start, "LORA", name=first)
    for name, folder in others:
        adapters.load(model, folder, "LORA", name=name)
    adapters.use(model, {first: 1.0})
    return _tuned(model, start if (start / "tokenizer.json").is_file() else base_folder, method, base)


def _check_base(folder: Path, base: str, base_folder: Path) -> None:
    """InputError if the weights of an adapter's base are not those that it was tuned on."""
    then = _record(folder).get("base_fingerprint")
    if then and then != (now := tensors.fingerprint(base_folder)):
        message = (
            "{path}: tuned on {base} when its weights were others (fingerprint {then}); {folder} holds {now}, on which "
            "the adapter means nothing. Give it its own base, or, if only the files differ, remove base_fingerprint "
            "from {file}"
        )
        raise InputError(t(message, path=folder, base=base, then=then, folder=base_folder, now=now, file=RECORD))


def _options(path: str, dtype: Dtype, quantized: Mapping[str, Any] | None = None) -> ModelOptions:
    """``quantized``: how the base was held while an adapter was trained on it."""
    return ModelOptions.model_validate({"path": path, "dtype": dtype, **(quantized or {})})


def _tuned(model: Any, tokenizer_folder: Path, method: Method | None, base: str) -> Tuned:
    """``model`` with the tokenizer and the template of a folder."""
    from weitiao.data.render import Renderer

    tokenizer = load_tokenizer(tokenizer_folder)
    return Tuned(model.eval(), tokenizer, Renderer.of(tokenizer), method, base)


def _open_adapter(folder: Path, dtype: Dtype) -> Tuned:
    """An adapter on its base; the tokenizer is the adapter's own, or else the base's."""
    base, base_folder = base_of(folder)
    method = _recorded(folder) or of(folder)
    record = _record(folder)
    _check_base(folder, base, base_folder)
    held = load(_options(str(base_folder), dtype, record.get("quantized")), head=heads.described(record.get("head")))
    model = method.load(held, folder)
    return _tuned(model, folder if (folder / "tokenizer.json").is_file() else base_folder, method, base)


def base_of(folder: Path) -> tuple[str, Path]:
    """The name of an adapter's base and its folder; a relative path is looked for from here, then from the adapter."""
    read = read_bottleneck if (folder / BOTTLENECK).is_file() else adapters.read_config
    base = read(folder).get("base_model_name_or_path")
    if not base:
        raise InputError(t("{path}: base_model_name_or_path is missing", path=folder))
    beside = folder / base
    try:
        return base, fetch.resolve(beside if not Path(base).is_dir() and beside.is_dir() else base)
    except InputError as error:
        message = (
            "{path}: its base model {base} is not there: {reason}; if it has moved, put its new place into "
            "base_model_name_or_path in {file}"
        )
        raise InputError(t(message, path=folder, base=base, reason=error, file=adapters.CONFIG)) from error


def _open_checkpoint(run: Run, dtype: Dtype, step: int) -> Tuned:
    """The base that a run tuned, with the method attached anew and the weights of a checkpoint."""
    import torch
    from safetensors.torch import load_file

    path = run.checkpoints / f"step-{step:08d}"
    if not path.is_dir():
        known = ", ".join(sorted(found.name for found in run.checkpoints.glob("step-*")))
        raise InputError(t("{path}: no such checkpoint ({known})", path=path, known=known))
    if wrong := problems(path):
        raise InputError([f"{path}: {problem}" for problem in wrong])
    recipe = run.recipe()
    method = build_method(recipe.get("method") or {})
    base = (recipe.get("model") or {}).get("path") or DEFAULT_MODEL
    options = ModelOptions.model_validate({**(recipe.get("model") or {}), "dtype": dtype})
    final = next((folder for folder in (run.adapter, run.model, run.tokenizer) if folder.is_dir()), None)
    tokenizer_folder = final or fetch.resolve(base)
    # A new model has as many rows as the tokenizer that was trained with it.
    task = recipe.get("task") or {}
    head = heads.described(task if task.get("name") == "classify" else None)
    config = shape.read_config(options.config or fetch.resolve(base))
    training = method.base_names(shape.read(config if head is None else heads.put_on(config, head)))
    training = training if options.quantize != "none" else ()
    model = method.attach(load(options, tokenizer=load_tokenizer(tokenizer_folder), training=training, head=head))
    weights, parameters = shards.parameters(path), trainable(model)
    if weights.keys() != parameters.keys():
        raise InputError(t("{path}: its parameters are not those of the recipe's method", path=path))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    method.begin(model, total_steps=1)
    method.restore(model, load_file(path / "method.safetensors"))
    return _tuned(model, tokenizer_folder, method, base)


def _record(folder: Path) -> dict[str, Any]:
    """What :func:`save` noted beside the weights; empty for a folder from elsewhere."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and {"base", "method"} <= record.keys() else {}


def _recorded(folder: Path) -> Method | None:
    """The method that :func:`save` noted."""
    values = _record(folder).get("method")
    return build_method(values) if values else None


def build_method(values: Mapping[str, Any]) -> Method:
    """The method that ``values["name"]`` names, with the other values as its options; InputError for any problem."""
    name = values.get("name", "lora")
    if name not in METHODS:
        raise InputError(t('no method "{name}" ({names})', name=name, names=", ".join(METHODS)))
    return build(METHODS[name], values)
