"""A folder becomes a model in memory: the only place that calls ``from_pretrained`` or ``from_config``.

    model = load(ModelOptions(path="models/qwen2-0.5b"))
    tokenizer = load_tokenizer("models/qwen2-0.5b")
    fresh = load(ModelOptions(config={"model_type": "llama", ...}), tokenizer=tokenizer, seed=0)

Nothing is fetched here (``weights.fetch`` does that) and no code from a folder is run. A checkpoint that lacks a
tensor is an error: transformers would fill it with random numbers and say so in a log line.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from weitiao import machine
from weitiao.config import Options
from weitiao.errors import InputError, redact, say, t
from weitiao.models import heads, shape, sizes
from weitiao.models.heads import Head
from weitiao.models.shape import quiet
from weitiao.weights import bounded, fetch, icetext, inspect, tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DEFAULT_MODEL = "weitiao-tiny-zh"
# families whose head is checked by this project's own tests; any other is checked by a forward when it is loaded
CHECKED = frozenset({"gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "glm", "chatglm", "bert"})
NAMES_SHOWN = 5


class ModelOptions(Options):
    """The base model: where it comes from and how it is held in memory."""

    path: str = Field(default=DEFAULT_MODEL, description="a folder, a hub repository, or the embedded weitiao-tiny-zh")
    revision: str | None = Field(default=None, description="commit, tag or branch of a hub repository")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="type of the frozen weights; auto takes what this machine multiplies fastest"
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        default="none",
        description="the frozen linears in 4 (nf4) or 8 bits; any method then trains above them (int8: with products "
        "in 8 bits where the processor has AVX-512 VNNI)",
    )
    double_quantization: bool = Field(default=False, description="for nf4: the scales of its blocks in 8 bits as well")
    config: dict[str, Any] | str | None = Field(
        default=None, description="a config.json or its content: a new model with random weights, for pretraining"
    )
    tokenizer: str | dict[str, Any] | None = Field(
        default=None, description="a folder with the tokenizer, or how to train one; the model's own if absent"
    )
    initialize: Literal["normal", "copying"] = Field(
        default="normal",
        description="weights of a new model: normal: random; copying: random, with heads that find and repeat what "
        "stood before already in place (Llama with rope_theta 1e6), for small models and little text",
    )


def choose_dtype(wanted: str, new: bool = False) -> str:
    """The name of the dtype that ``wanted`` means here: a new model trains whole and so is float32.

    InputError for float16 without a GPU: CPUs convert it in software, ten times slower than float32.
    """
    if wanted == "auto":
        return "float32" if new else machine.best_dtype()
    if wanted == "float16" and machine.device() == "cpu":
        raise InputError(t("model.dtype: float16 is not for CPUs; take float32, bfloat16 or auto"))
    return wanted


def load(
    options: ModelOptions,
    *,
    new: bool | None = None,
    vocab_size: int | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    training: Collection[str] = (),
    head: Head | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """The model that the options describe, in evaluation mode, on ``device`` or the machine's best.

    ``new`` (by default: whether ``options.config`` is given) builds it with random weights from ``seed``; then
    ``vocab_size``, or the tokenizer's, overrides the configuration's, and the tokenizer's special ids are written
    into it. An existing model must have a row for every token of ``tokenizer``.
    Linears with a parameter among ``training`` are not quantised. ``head`` puts a task's head on the model, new where
    the folder has none, drawn from ``seed``. InputError names what is missing.
    """
    import torch

    from weitiao.models.modules import check_head, embedding

    new = options.config is not None if new is None else new
    dtype = getattr(torch, choose_dtype(options.dtype, new))
    if new:
        model = _build(options, vocab_size, tokenizer, dtype, seed, head)
        if options.dtype == "auto":  # its weights are float32; its products, and what is saved, are as everywhere
            model.config.dtype = getattr(torch, machine.best_dtype())
    else:
        model = _open(fetch.resolve(options.path, options.revision), dtype, head, seed)
        size = len(tokenizer) if tokenizer is not None else vocab_size or 0
        if size > (rows := embedding(model).weight.shape[0]):
            message = "{path}: the tokenizer has {size} tokens and the model embeds {rows}"
            raise InputError(t(message, path=options.path, size=size, rows=rows))
    if model.config.model_type not in CHECKED and not heads.has_one(model.config):
        check_head(model)
    if options.quantize != "none":
        from weitiao.models.quantized import quantize

        quantize(model, options.quantize, options.double_quantization, training)
    return model.to(torch.device(device or machine.device()))  # type: ignore[arg-type]


def _open(folder: Path, dtype: Any, head: Head | None, seed: int) -> PreTrainedModel:
    """The model in a folder, with every tensor from its files, but for a head that they do not have."""
    import torch

    inspect.check_folder(folder)
    config = shape.read_config(folder)
    if code := shape.names_code(folder):
        say("{path}: config.json names code of its own: {code}; it is not run", path=folder, code=code)
    sizes.check_tensors(folder, shape.read(config))
    plain = not heads.has_one(config)
    config = config if head is None else heads.put_on(config, head)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, found = _opened(folder, config, dtype)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(t("{path}: {reason}", path=folder, reason=" ".join(str(error).split()))) from error
    if found["mismatched_keys"]:
        raise sizes.unfit(folder, sorted(found["mismatched_keys"]))
    new = shape.read(config).head if head is not None and plain else frozenset()
    if missing := sorted(found["missing_keys"] - new):
        message = "{path}: the weights lack {count} tensors that the model needs: {names}"
        raise InputError(t(message, path=folder, count=len(missing), names=_some(missing)))
    own = shape.read(heads.without(config)).tensors if new else {}  # the language model's own head is not needed
    if extra := sorted(name for name in found["unexpected_keys"] if name not in own):
        say("{path}: {count} tensors of the file have no place in the model: {names}",
            path=folder, count=len(extra), names=_some(extra))  # fmt: skip
    return model.eval()


def _opened(folder: Path, config: PretrainedConfig, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' own model, and what it says of the loading. Pickled tensors are given to it as they are mapped
    here: it would call torch.load."""
    from transformers import GenerationConfig

    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "attn_implementation": attention(config),
        "trust_remote_code": False,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are told below, each with its sizes
    }
    auto = shape.auto_class(config)
    if any(file.suffix == ".safetensors" for file in inspect.weight_files(folder, [])):
        return auto.from_pretrained(folder, **options)
    config.name_or_path = str(folder)
    kind = auto._model_mapping[type(config)]
    model, found = kind.from_pretrained(None, state_dict=dict(tensors.read(folder)), **options)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, found


def _some(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")


def attention(config: PretrainedConfig) -> str:
    """``sdpa`` where the model's class has it, on a CPU in the form that is fast there; else ``eager``."""
    if not shape.auto_class(config)._model_mapping[type(config)]._supports_sdpa:
        return "eager"
    if machine.device() != "cpu":
        return "sdpa"
    from weitiao.models.attention import register

    return register()


def _build(
    options: ModelOptions,
    vocab_size: int | None,
    tokenizer: PreTrainedTokenizerFast | None,
    dtype: Any,
    seed: int,
    head: Head | None,
) -> PreTrainedModel:
    """A new model with random weights; the global random state is left as it was."""
    import torch

    source = options.config if options.config is not None else fetch.resolve(options.path, options.revision)
    config = shape.read_config(source)
    if tokenizer is not None:
        vocab_size = vocab_size or len(tokenizer)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    if vocab_size is not None:
        config.vocab_size = vocab_size
    config = config if head is None else heads.put_on(config, head)
    shape.read(config)  # sizes that do not fit together are said before any memory is taken
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = shape.auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention(config))
    if options.initialize == "copying":
        from weitiao.models.circuits import copying

        copying(model, seed)
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, exactly as its tokenizer.json has it, with a pad and an end token.

    A missing pad becomes unk, else eos (padding is masked everywhere, so which token it is changes nothing); a
    missing eos is taken from the model's configuration, or is sep for an encoder. Each repair is said aloud and
    made in memory only. InputError where there is no end token to be found.
    """
    path = Path(folder)
    inspect.check_tokenizer(path)
    tokenizer = _tokenizer(path)
    if tokenizer.eos_token is None:
        token = _end_token(path, tokenizer)
        if token is None:
            raise InputError(t("{path}: the tokenizer has no eos_token; name one in tokenizer_config.json", path=path))
        tokenizer.eos_token = token
        say("{path}: the tokenizer has no eos_token; using {token}", path=path, token=token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        say("{path}: the tokenizer has no pad_token; using {token}", path=path, token=tokenizer.pad_token)
    return tokenizer


def _tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """tokenizer.json as it is: a class chosen by model type would put its own pre-tokenizer in the file's place."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (path / icetext.FILE).is_file() and not (path / "tokenizer.json").is_file():
        return icetext.load(path)
    try:
        with quiet():
            if (path / "tokenizer.json").is_file():
                return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True, **_hidden(path))
            return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust parser raises plain Exception
        if "trust_remote_code" in str(error):
            raise InputError(
                t("{path}: the tokenizer needs code from its folder, which is never run", path=path)
            ) from error
        raise InputError(t("{path}: the tokenizer cannot be read ({reason})", path=path, reason=error)) from error


def _hidden(path: Path) -> dict[str, Any]:
    """The keys of tokenizer_config.json that hold a secret: transformers makes a token of whatever ends in _token, and
    saves it."""
    file = path / "tokenizer_config.json"
    pairs = {key: f'"{key}": "{value}"' for key, value in (bounded.json_object(file) if file.is_file() else {}).items()}
    return {key: None for key, pair in pairs.items() if key.endswith("_token") and redact(pair) != pair}


def _end_token(path: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The end token that the model's own configuration names, or an encoder's separator."""
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((path / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and 0 <= first < len(tokenizer):
            return str(tokenizer.convert_ids_to_tokens(first))
    return tokenizer.sep_token  # type: ignore[return-value]
