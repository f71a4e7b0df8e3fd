"""Converted models against references written from the published architectures, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weitiao.data.crosswoz import SEARCH_HOTELS
from weitiao.data.render import Renderer
from weitiao.data.rows import Call, Chat, Message
from weitiao.errors import InputError
from weitiao.models.load import ModelOptions, load, load_tokenizer
from weitiao.weights.convert import convert

CHATGLM = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "num_layers": 3,
    "padded_vocab_size": 96,
    "hidden_size": 64,
    "ffn_hidden_size": 88,
    "kv_channels": 16,
    "num_attention_heads": 4,
    "seq_length": 128,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "torch_dtype": "float32",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
}


def chatglm_tensors(sizes: dict, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * shape[-1] ** -0.5

    hidden, width = sizes["hidden_size"], sizes["kv_channels"]
    rows = (sizes["num_attention_heads"] + 2 * sizes["multi_query_group_num"]) * width
    found = {
        "transformer.embedding.word_embeddings.weight": some(sizes["padded_vocab_size"], hidden) * hidden**0.5,
        "transformer.rotary_pos_emb.inv_freq": some(width // 4),
        "transformer.encoder.final_layernorm.weight": 1 + some(hidden),
        "transformer.output_layer.weight": some(sizes["padded_vocab_size"], hidden),
    }
    for number in range(sizes["num_layers"]):
        layer = f"transformer.encoder.layers.{number}."
        found |= {
            layer + "input_layernorm.weight": 1 + some(hidden),
            layer + "self_attention.query_key_value.weight": some(rows, hidden) * 2,
            layer + "self_attention.query_key_value.bias": some(rows),
            layer + "self_attention.dense.weight": some(hidden, sizes["num_attention_heads"] * width),
            layer + "post_attention_layernorm.weight": 1 + some(hidden),
            layer + "mlp.dense_h_to_4h.weight": some(2 * sizes["ffn_hidden_size"], hidden),
            layer + "mlp.dense_4h_to_h.weight": some(hidden, sizes["ffn_hidden_size"]),
        }
    return found


def chatglm(tensors: dict[str, Tensor], sizes: dict, ids: list[int]) -> Tensor:
    """Logits [T, V] in float64: one head, one position and one pair of numbers after another."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    width, heads, groups = sizes["kv_channels"], sizes["num_attention_heads"], sizes["multi_query_group_num"]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + sizes["layernorm_epsilon"]).sqrt() * weight

    def turned(vector: Tensor, place: int) -> Tensor:
        out = vector.clone()
        half = width // 2  # the second half of a head knows no position
        for pair in range(half // 2):
            angle = place * (10000 * sizes.get("rope_ratio", 1)) ** (-2 * pair / half)
            x, y = vector[2 * pair], vector[2 * pair + 1]
            out[2 * pair] = x * math.cos(angle) - y * math.sin(angle)
            out[2 * pair + 1] = y * math.cos(angle) + x * math.sin(angle)
        return out

    x = tensors["transformer.embedding.word_embeddings.weight"][ids]
    for number in range(sizes["num_layers"]):
        layer = {
            name.split(f"layers.{number}.")[1]: tensor
            for name, tensor in tensors.items()
            if f"layers.{number}." in name
        }
        mixed = norm(x, layer["input_layernorm.weight"]) @ layer["self_attention.query_key_value.weight"].T
        mixed = mixed + layer["self_attention.query_key_value.bias"]
        parts = mixed.split((heads * width, groups * width, groups * width), dim=-1)
        q, k, v = (part.view(len(ids), -1, width) for part in parts)
        context = torch.zeros(len(ids), heads, width, dtype=torch.float64)
        for head in range(heads):
            group = head // (heads // groups)
            for place in range(len(ids)):
                query = turned(q[place, head], place)
                scores = torch.stack([query @ turned(k[past, group], past) for past in range(place + 1)])
                context[place, head] = (scores / math.sqrt(width)).softmax(0) @ v[: place + 1, group]
        x = x + context.flatten(1) @ layer["self_attention.dense.weight"].T
        gate, up = (norm(x, layer["post_attention_layernorm.weight"]) @ layer["mlp.dense_h_to_4h.weight"].T).chunk(
            2, -1
        )
        x = x + (gate * gate.sigmoid() * up) @ layer["mlp.dense_4h_to_h.weight"].T
    x = norm(x, tensors["transformer.encoder.final_layernorm.weight"])
    return x @ tensors["transformer.output_layer.weight"].T


@pytest.mark.parametrize("shape", [{}, {"rope_ratio": 50}, {"multi_query_group_num": 1, "kv_channels": 32}])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_chatglm_computes_what_its_architecture_says(tmp_path, shape, kind):
    sizes, source = CHATGLM | shape, tmp_path / "source"
    source.mkdir()
    tensors = chatglm_tensors(sizes)
    (source / "config.json").write_text(json.dumps(sizes))
    (source / "modeling_chatglm.py").write_text("raise SystemExit('this must never run')")
    if kind == "bin":
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = load(ModelOptions(path=str(convert(source, tmp_path / "out")), dtype="float32"))
    assert model.config.model_type == "glm" and not (tmp_path / "out" / "modeling_chatglm.py").exists()
    ids = torch.randint(0, 96, (14,), generator=torch.Generator().manual_seed(3)).tolist()
    found = model(input_ids=torch.tensor([ids])).logits[0].double()
    torch.testing.assert_close(found, chatglm(tensors, sizes, ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize("option", [{"add_bias_linear": True}, {"rmsnorm": False}, {"quantization_bit": 4}])
def test_what_glm_cannot_say_is_refused(tmp_path, option):
    (tmp_path / "config.json").write_text(json.dumps(CHATGLM | option))
    save_file(chatglm_tensors(CHATGLM), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=next(iter(option))):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}


def llama_tensors(params: dict, inner: int = 96, vocabulary: int = 80) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * shape[-1] ** -0.5

    hidden, width = params["dim"], params["dim"] // params["n_heads"]
    keys = params["n_kv_heads"] * width
    found = {
        "tok_embeddings.weight": some(vocabulary, hidden) * 8,
        "norm.weight": 1 + some(hidden),
        "output.weight": some(vocabulary, hidden),
    }
    for number in range(params["n_layers"]):
        layer = f"layers.{number}."
        found |= {
            layer + "attention.wq.weight": some(hidden, hidden) * 2,
            layer + "attention.wk.weight": some(keys, hidden) * 2,
            layer + "attention.wv.weight": some(keys, hidden),
            layer + "attention.wo.weight": some(hidden, hidden),
            layer + "feed_forward.w1.weight": some(inner, hidden),
            layer + "feed_forward.w2.weight": some(hidden, inner),
            layer + "feed_forward.w3.weight": some(inner, hidden),
            layer + "attention_norm.weight": 1 + some(hidden),
            layer + "ffn_norm.weight": 1 + some(hidden),
        }
    return found


def llama(tensors: dict[str, Tensor], params: dict, ids: list[int]) -> Tensor:
    """Logits [T, V] in float64 as the published code has it: pairs of neighbours are complex numbers that turn."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    heads, keys = params["n_heads"], params["n_kv_heads"]
    width = params["dim"] // heads
    angles = torch.arange(len(ids), dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).rsqrt() * weight

    def turned(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * turn).flatten(
            -2
        )

    x = tensors["tok_embeddings.weight"][ids]
    later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for number in range(params["n_layers"]):
        w = {name.removeprefix(f"layers.{number}."): tensor for name, tensor in tensors.items()}
        normed = norm(x, w["attention_norm.weight"])
        q = turned((normed @ w["attention.wq.weight"].T).view(len(ids), heads, width))
        k = turned((normed @ w["attention.wk.weight"].T).view(len(ids), keys, width)).repeat_interleave(
            heads // keys, 1
        )
        v = (normed @ w["attention.wv.weight"].T).view(len(ids), keys, width).repeat_interleave(heads // keys, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
        shares = scores.masked_fill(later, float("-inf")).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", shares, v).flatten(1) @ w["attention.wo.weight"].T
        normed = norm(x, w["ffn_norm.weight"])
        gate = normed @ w["feed_forward.w1.weight"].T
        x = x + (gate * gate.sigmoid() * (normed @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(x, tensors["norm.weight"]) @ tensors["output.weight"].T


CUT = {"wo": 1, "w2": 1, "tok_embeddings": 1}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("embedding", [0, 1])  # Llama 3 cut its embedding along the vocabulary, Llama 2 along the width
def test_llama_in_parts_computes_what_its_architecture_says(tmp_path, parts, embedding):
    source, tensors = tmp_path / "source", llama_tensors(PARAMS)
    source.mkdir()
    (source / "params.json").write_text(json.dumps(PARAMS))
    for part in range(parts):
        held = {}
        for name, tensor in tensors.items():
            word = name.split(".")[-2]
            dimension = CUT.get(word, 0) if word != "tok_embeddings" else embedding
            held[name] = tensor if tensor.ndim == 1 else tensor.chunk(parts, dimension)[part].clone()
        torch.save(held | {"rope.freqs": torch.ones(8)}, source / f"consolidated.{part:02d}.pth")
    model = load(ModelOptions(path=str(convert(source, tmp_path / "out")), dtype="float32"))
    assert model.config.num_key_value_heads == 2 and model.config.intermediate_size == 96
    ids = torch.randint(0, 80, (12,), generator=torch.Generator().manual_seed(5)).tolist()
    found = model(input_ids=torch.tensor([ids])).logits[0].double()
    torch.testing.assert_close(found, llama(tensors, PARAMS, ids), rtol=0, atol=2e-4)


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    torch.save({"tok_embeddings.weight": Path("x")}, tmp_path / "consolidated.00.pth")
    with pytest.raises(InputError, match="refused"):
        convert(tmp_path, tmp_path / "out")


def test_an_unknown_layout_is_said(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="neither"):
        convert(tmp_path, tmp_path / "out")


ROLES = {name: number for number, name in enumerate(("system", "user", "assistant", "observation"), 5)}
TALK = [
    {"role": "system", "content": "你帮客人订房。"},
    {"role": "user", "content": "philosophy of 酒店 [sop]\n有停车场吗？"},
    {"role": "assistant", "content": "请稍等。"},
    {"role": "user", "content": "300 元以内"},
]


@pytest.fixture(scope="module")
def glm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatGLM folder with a SentencePiece model of its own and the code of its tokenizer."""
    library = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("chatglm")
    (folder / "text").write_text("\n".join(message["content"] for message in TALK) * 40, encoding="utf-8")
    library.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=330, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    pieces = library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    sizes = CHATGLM | {"padded_vocab_size": pieces + 9, "num_layers": 1}
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file(chatglm_tensors(sizes), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_chatglm3_talks_as_its_own_code_does(glm_folder: Path, tmp_path: Path):
    """Its published code encodes role, line break and words apart; a call is Python, a tool list is indented JSON."""
    library = pytest.importorskip("sentencepiece")
    (glm_folder / "tokenization_chatglm.py").write_text('raise SystemExit("<|user|>")')
    tokenizer = load_tokenizer(convert(glm_folder, tmp_path / "three"))
    theirs = library.SentencePieceProcessor(model_file=str(glm_folder / "tokenizer.model"))
    first = theirs.get_piece_size()
    expected = [first + 1, first + 3]  # [gMASK] sop
    for message in TALK:
        expected += [first + ROLES[message["role"]], *theirs.encode("\n"), *theirs.encode(message["content"])]
    expected.append(first + ROLES["assistant"])
    assert tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False) == expected
    assert tokenizer("philosophy").input_ids == [first + 1, first + 3, *theirs.encode("philosophy")]


def test_chatglm3_calls_tools_in_python(glm_folder: Path, tmp_path: Path):
    (glm_folder / "tokenization_chatglm.py").write_text("<|user|>")
    renderer = Renderer.of(load_tokenizer(convert(glm_folder, tmp_path / "three")), tools=True)
    assert renderer.syntax == "chatglm3" and not renderer.said
    calls = (Call("search_hotels", {"name": "长城", "price": 300, "pets": True}), Call("search_hotels", {"name": "x"}))
    messages = (
        Message("user", "找酒店"),
        Message("assistant", calls=calls[:1]),
        Message("tool", '{"count": 0}', name="search_hotels"),
        Message("assistant", "没有。"),
    )
    rendered = renderer.render(Chat(messages, (SEARCH_HOTELS,)))
    words = renderer.decode([one for one, trained in zip(rendered.ids, rendered.mask, strict=True) if trained])
    assert 'search_hotels\n ```python\ntool_call(name="长城", price=300, pets=True)\n```' in words
    assert renderer.parse(words.partition("<|observation|>")[0]).calls == calls[:1]
    assert '"description"' in rendered.text and "You have access to the following tools:" in rendered.text


def test_chatglm2_counts_rounds(glm_folder: Path, tmp_path: Path):
    (glm_folder / "tokenization_chatglm.py").write_text("class ChatGLMTokenizer: ...")
    tokenizer = load_tokenizer(convert(glm_folder, tmp_path / "two"))
    shown = tokenizer.apply_chat_template(TALK[1:], tokenize=False, add_generation_prompt=True)
    start = "[gMASK]<sop>[Round 1]\n\n问：" + TALK[1]["content"] + "\n\n答：请稍等。\n\n[Round 2]\n\n问："
    assert shown == start + TALK[3]["content"] + "\n\n答："
