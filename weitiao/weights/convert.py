"""Foreign layouts of weights to the one that transformers' own classes read; no code from a folder is ever run.

    weitiao convert chatglm3-6b/ glm3/
    weitiao convert llama-2-7b/ llama2/                 # consolidated.*.pth, params.json, tokenizer.model
    weitiao convert epoch=3.ckpt model.safetensors      # and between the other forms: rewrite.py

ChatGLM2-6B and ChatGLM3-6B (config.json: chatglm with multi_query_group_num) become Glm, with q, k and v apart, and get
the chat template that they were trained with; the first ChatGLM-6B needs no rewriting. Llama as first published
(params.json beside consolidated.*.pth) becomes Llama, its parts joined, rotary pairs put as halves.

One tensor is in memory at a time, and files of the result hold at most 2 GiB.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao.errors import InputError, say, t
from weitiao.weights import sentencepiece, tensors
from weitiao.weights.folders import whole
from weitiao.weights.inspect import read_json, weight_files
from weitiao.weights.rewrite import DTYPES, rewrite
from weitiao.weights.tensors import Tensors

if TYPE_CHECKING:
    from torch import Tensor


def convert(source: str | Path, folder: str | Path, dtype: str | None = None) -> Path:
    """The model in ``source`` rewritten into ``folder``, or a file of tensors into a file or folder of another form,
    its floats as ``dtype``; InputError for a layout that is not known."""
    source, folder = Path(source), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(t("{path}: exists already; name a new folder", path=folder))
    layout = next((layout for known, layout in LAYOUTS if known(source)), None)
    if layout is None:
        pickled = any(file.suffix != ".safetensors" for file in weight_files(source, [])) and not _is_first(source)
        if source.is_file() or pickled or (folder.suffix and source.is_dir()):
            return rewrite(source, folder, dtype)
        message = (
            "{path}: neither a ChatGLM2 or ChatGLM3 folder nor Llama's own files (params.json, consolidated.*.pth)"
        )
        if _is_first(source):
            message = "{path}: the first ChatGLM-6B opens as it is; name the folder itself (model.path={path})"
        raise InputError(t(message, path=source))
    if dtype is not None:
        raise InputError(t("--dtype: a model in its first layout keeps its own"))
    config, found = layout(source)
    size = sum(
        file.stat().st_size for file in (*source.glob("*.bin"), *source.glob("*.safetensors"), *source.glob("*.pth"))
    )
    with whole(folder, size) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (model := source / "tokenizer.model").is_file():  # first: what is wrong with it is said before the long part
            sentencepiece.convert(model, temporary, SPECIAL.get(config["model_type"], {}))
        if config["model_type"] == "glm":
            name = _chatglm_template(source)
            shutil.copy(str(files("weitiao.models") / "templates" / name), temporary / "chat_template.jinja")
            say("chat template: {name}", name=name.removesuffix(".jinja"))
        tensors.write(temporary, found)
    return folder


def _is_first(folder: Path) -> bool:
    """Whether this is a ChatGLM that is neither the second nor the third."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "chatglm"


# ---- ChatGLM2 and ChatGLM3 -----------------------------------------------------------------------------------------


def _is_chatglm(folder: Path) -> bool:
    file = folder / "config.json"
    values = read_json(file) if file.is_file() else {}
    return values.get("model_type") == "chatglm" and "multi_query_group_num" in values


def _chatglm(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """GLM's configuration and tensors. The published architecture: RMSNorm before attention and MLP, queries in
    ``num_attention_heads`` heads of ``kv_channels`` and keys in ``multi_query_group_num``, rotary positions on pairs
    in the first half of a head, SwiGLU, an output layer of its own (github.com/THUDM/ChatGLM3)."""
    old = read_json(folder / "config.json")
    fixed = {
        "rmsnorm": True,
        "post_layer_norm": True,
        "multi_query_attention": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
        "original_rope": True,
        "quantization_bit": 0,
        "pre_seq_len": None,
    }
    wrong = [f"{name} = {old[name]}" for name, value in fixed.items() if old.get(name, value) not in (value, None)]
    if wrong:
        raise InputError(t("{path}: cannot be written as GLM: {values}", path=folder, values=", ".join(wrong)))
    width, groups = old["kv_channels"], old["multi_query_group_num"]
    config = {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "vocab_size": old["padded_vocab_size"],
        "hidden_size": old["hidden_size"],
        "intermediate_size": old["ffn_hidden_size"],
        "num_hidden_layers": old["num_layers"],
        "num_attention_heads": old["num_attention_heads"],
        "num_key_value_heads": groups,
        "head_dim": width,
        "hidden_act": "silu",
        "max_position_embeddings": old["seq_length"],
        "rms_norm_eps": old["layernorm_epsilon"],
        "attention_bias": old.get("add_qkv_bias", True),
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 * old.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        },
        "pad_token_id": old.get("pad_token_id", 0),
        "eos_token_id": old.get("eos_token_id", 2),
        "bos_token_id": None,
        "torch_dtype": old.get("torch_dtype", "float16"),
    }
    return config, _glm_tensors(folder, old["num_attention_heads"] * width, groups * width)


def _chatglm_template(folder: Path) -> str:
    """Which of the two wrote the folder: only ChatGLM3's tokenizer has tokens for roles. Its code is read, not run."""
    code, settings = folder / "tokenization_chatglm.py", folder / "tokenizer_config.json"
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in (code, settings) if file.is_file()]
    named = "chatglm2" in f"{folder.name} {read_json(folder / 'config.json').get('_name_or_path')}".lower()
    second = not any("<|user|>" in text for text in texts) and (code.is_file() or named)
    return "chatglm2.jinja" if second else "chatglm3.jinja"


GLM_NAMES = (
    (r"transformer\.embedding\.word_embeddings\.weight", "model.embed_tokens.weight"),
    (r"transformer\.encoder\.final_layernorm\.weight", "model.norm.weight"),
    (r"transformer\.output_layer\.weight", "lm_head.weight"),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attention\.dense\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
    (r"transformer\.encoder\.layers\.(\d+)\.mlp\.dense_h_to_4h\.weight", r"model.layers.\1.mlp.gate_up_proj.weight"),
    (r"transformer\.encoder\.layers\.(\d+)\.mlp\.dense_4h_to_h\.weight", r"model.layers.\1.mlp.down_proj.weight"),
    (r"transformer\.encoder\.layers\.(\d+)\.(\w+_layernorm)\.weight", r"model.layers.\1.\2.weight"),
)
GLM_QKV = re.compile(r"transformer\.encoder\.layers\.(\d+)\.self_attention\.query_key_value\.(weight|bias)")


def _glm_tensors(folder: Path, queries: int, keys: int) -> Tensors:
    for name, tensor in tensors.read(folder):
        if found := GLM_QKV.fullmatch(name):
            for letter, part in zip("qkv", tensor.split((queries, keys, keys)), strict=True):
                yield f"model.layers.{found[1]}.self_attn.{letter}_proj.{found[2]}", part
        elif not name.endswith("rotary_pos_emb.inv_freq"):  # computed anew from the configuration
            yield _renamed(name, folder), tensor


def _renamed(name: str, folder: Path) -> str:
    for pattern, new in GLM_NAMES:
        if found := re.fullmatch(pattern, name):
            return found.expand(new)
    raise InputError(t("{path}: the tensor {name} has no place in the new layout", path=folder, name=name))


# ---- Llama's own files ---------------------------------------------------------------------------------------------


def _is_llama(folder: Path) -> bool:
    return (folder / "params.json").is_file() and any(folder.glob("consolidated.*.pth"))


LLAMA_NAMES = {  # name -> its new name, and the dimension along which the parts were cut (None: each has it whole)
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}


def _llama(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Llama's configuration and tensors. The parts of tensor parallelism are joined, and the rows of each query and key
    head go from pairs (x₀ y₀ x₁ y₁ …) to halves (x₀ x₁ … y₀ y₁ …), which is how transformers turns them."""
    params = read_json(folder / "params.json")
    parts = [tensors.load(file) for file in sorted(folder.glob("consolidated.*.pth"))]
    one = parts[0]
    heads = params["n_heads"]
    key_heads = params.get("n_kv_heads") or heads
    vocabulary = one["tok_embeddings.weight"].shape[0]
    split_rows = vocabulary * len(parts) == sum(part["output.weight"].shape[0] for part in parts) and len(parts) > 1
    vocabulary *= len(parts) if split_rows and one["tok_embeddings.weight"].shape[1] == params["dim"] else 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": params["dim"],
        "intermediate_size": sum(part["layers.0.feed_forward.w1.weight"].shape[0] for part in parts),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 8192 if vocabulary > 100_000 else 4096,
        "rms_norm_eps": params["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10000.0))},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return config, _llama_tensors(folder, parts, {"q": heads, "k": key_heads}, params["dim"])


def _llama_tensors(folder: Path, parts: list[Mapping[str, Tensor]], heads: Mapping[str, int], hidden: int) -> Tensors:
    import torch

    for name in parts[0]:
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        known = LLAMA_NAMES.get(layer[2] if layer else name)
        if name == "rope.freqs":
            continue
        if known is None:
            raise InputError(t("{path}: the tensor {name} has no place in the new layout", path=folder, name=name))
        new, dimension = known
        if name == "tok_embeddings.weight" and parts[0][name].shape[1] == hidden:
            dimension = 0 if len(parts) > 1 else None
        tensor = parts[0][name] if dimension is None else torch.cat([part[name] for part in parts], dim=dimension)
        letter = new.removeprefix("self_attn.")[:1] if new.startswith("self_attn.") else ""
        if letter in heads:
            rows, columns = tensor.shape
            tensor = (
                tensor.view(heads[letter], rows // heads[letter] // 2, 2, columns)
                .transpose(1, 2)
                .reshape(rows, columns)
            )
        yield f"model.layers.{layer[1]}.{new}" if layer else new, tensor


# ---- files ---------------------------------------------------------------------------------------------------------

LAYOUTS: tuple[tuple[Callable[[Path], bool], Callable[[Path], tuple[dict[str, Any], Tensors]]], ...] = (
    (_is_chatglm, _chatglm),
    (_is_llama, _llama),
)
SPECIAL: dict[str, dict[str, Any]] = {
    # ChatGLM's own names for <sop> and <eop> are sop and eop, which would cut philosophy in three
    "glm": {"tokens": ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
                       "<|observation|>"), "prefix": ("[gMASK]", "<sop>"), "pad": "<unk>", "eos": "</s>"},
    "llama": {"prefix": ("<s>",), "pad": "<unk>", "bos": "<s>", "eos": "</s>"},
}  # fmt: skip


def verb(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="a model in another layout, or a file of tensors")],
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="the new model folder, or a file: .safetensors .bin .pt .pth .ckpt")
    ],
    dtype: Annotated[
        str | None, typer.Option(help="what floats become: float32, bfloat16 or float16; as they are if absent")
    ] = None,
) -> None:
    """Rewrite a model into the layout that every other verb reads, or tensors into another form of file."""
    if dtype not in (None, *DTYPES):
        raise InputError(t("--dtype: {name} is none of {known}", name=dtype, known=", ".join(DTYPES)))
    say("done: {path}", path=convert(source, folder, dtype))
