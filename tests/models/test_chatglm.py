"""ChatGLM-6B against a reference written from the published architecture, in float64, and in everything that is done
with it: its files, its cache, its tokenizer, training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from tests.train.support import method_of, train
from weitiao.data.batch import Example, collate
from weitiao.data.render import Renderer
from weitiao.data.rows import Chat, Message
from weitiao.errors import InputError
from weitiao.export.merge import merge, stored_dtype
from weitiao.generate.engine import generate
from weitiao.generate.sample import SampleOptions
from weitiao.methods.io import open_model, save
from weitiao.methods.virtual import leading
from weitiao.models import shape, tiny
from weitiao.models.chatglm import ChatGLMBlock, ChatGLMConfig, _turn
from weitiao.models.load import ModelOptions, load
from weitiao.train.logps import token_logps
from weitiao.weights.convert import convert

PAD, SOP, EOP, MASK, GMASK = range(5)
SIZES = {"hidden_size": 64, "inner_hidden_size": 96, "num_layers": 3, "num_attention_heads": 4, "vocab_size": 80}
IDS = {"pad_token_id": PAD, "bos_token_id": SOP, "eos_token_id": EOP, "mask_token_id": MASK, "gmask_token_id": GMASK}
ASKED = [7, 8, 9, 10, 11, GMASK, SOP, 20, 21, 22, EOP]
LONGER = [*range(30, 47), GMASK, SOP, 50, 51, EOP]
INFILLED = [7, 8, MASK, 10, 11, SOP, 20, 21, EOP]
BOTH = [7, MASK, 9, GMASK, SOP, 20, SOP, 22]
TEXT = [40, 41, 42, 43, 44, 45]
ROWS = [ASKED, LONGER, INFILLED, BOTH, TEXT, [GMASK, SOP, 7, 8]]


# ---- the reference -------------------------------------------------------------------------------------------------


def places(ids: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Both positions of every token, and how many are context."""
    if not {MASK, GMASK} & set(ids):  # plain text follows an empty context
        return [0] * len(ids), list(range(1, len(ids) + 1)), 0
    start = list(ids).index(SOP)
    mask = list(ids).index(GMASK if GMASK in ids else MASK)
    first = [place if place < start else mask for place in range(len(ids))]
    return first, [max(place - start + 1, 0) for place in range(len(ids))], start


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].double().T + w[f"{name}.bias"].double()


def turned(x: Tensor, place: Sequence[int]) -> Tensor:
    """One half of the heads [T, heads, width / 2]: pairs half of it apart."""
    half = x.shape[-1] // 2
    frequency = np.float16(1 / np.float32(10000) ** (np.arange(half, dtype=np.float32) / half)).astype(np.float64)
    angle = torch.tensor(np.outer(place, frequency))[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def block(x: Tensor, w: dict[str, Tensor], heads: int, number: int, depth: int, at: Any, past: Any = None) -> Tensor:
    """A block of [T, H] in float64; ``at``: both positions and the size of the context; ``past``: prefix tuning's keys
    and values [k, heads, width]."""
    first, second, context = at
    length, width, alpha = len(x), x.shape[1] // heads, math.sqrt(2 * depth)
    normed = norm(x, w, "input_layernorm")
    q, k, v = linear(normed, w, "attention.query_key_value").view(length, heads, 3, width).unbind(2)
    q, k = (
        torch.cat((turned(part[..., : width // 2], first), turned(part[..., width // 2 :], second)), -1)
        for part in (q, k)
    )
    if past is not None:
        k, v = torch.cat((past[0], k)), torch.cat((past[1], v))
    scores = torch.einsum("qhd,khd->hqk", q / (math.sqrt(width) * (number + 1)), k) * (number + 1)
    front = len(k) - length
    for query in range(length):
        for key in range(length):
            if key > query and key >= context:
                scores[:, query, front + key] = -10000.0
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    x = normed * alpha + linear(mixed, w, "attention.dense")
    normed = norm(x, w, "post_attention_layernorm")
    inner = linear(normed, w, "mlp.dense_h_to_4h")
    inner = 0.5 * inner * (1 + torch.tanh(0.7978845608028654 * inner * (1 + 0.044715 * inner * inner)))
    return normed * alpha + linear(inner, w, "mlp.dense_4h_to_h")


def reference(tensors: dict[str, Tensor], ids: Sequence[int], past: Any = None) -> Tensor:
    """Logits [T, V]."""
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors.items()}
    x = w["word_embeddings.weight"][list(ids)]
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    for number in range(depth):
        own = {name.removeprefix(f"layers.{number}."): tensor for name, tensor in w.items()}
        x = block(x, own, SIZES["num_attention_heads"], number, depth, places(ids), past and past[number])
    return norm(x, w, "final_layernorm") @ w["lm_head.weight"].T


# ---- the model -----------------------------------------------------------------------------------------------------


def tensors(seed: int = 0, **changes: int) -> dict[str, Tensor]:
    """A checkpoint with the published names, its buffers included."""
    sizes, draw = SIZES | changes, torch.Generator().manual_seed(seed)
    hidden, inner = sizes["hidden_size"], sizes["inner_hidden_size"]

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * shape[-1] ** -0.5

    found = {"transformer.word_embeddings.weight": some(sizes["vocab_size"], hidden) * 8}
    for number in range(sizes["num_layers"]):
        layer = f"transformer.layers.{number}."
        for name, rows, columns in (
            ("attention.query_key_value", 3 * hidden, hidden),
            ("attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", inner, hidden),
            ("mlp.dense_4h_to_h", hidden, inner),
        ):
            found[f"{layer}{name}.weight"] = some(rows, columns) * 2
            found[f"{layer}{name}.bias"] = some(rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"], found[f"{layer}{name}.bias"] = 1 + some(hidden), some(hidden)
        found[f"{layer}attention.rotary_emb.inv_freq"] = some(8).half()
    found["transformer.final_layernorm.weight"] = 1 + some(hidden)
    found["transformer.final_layernorm.bias"] = some(hidden)
    return found | {"lm_head.weight": found["transformer.word_embeddings.weight"].clone()}


def published(folder: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    """A folder as it was published: two .bin shards with their index, and code that must not run."""
    folder.mkdir(exist_ok=True)
    values = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "torch_dtype": "float16", "use_cache": True}
    values |= {"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}, **SIZES, **IDS, **config}
    values |= {"layernorm_epsilon": 1e-5, "max_sequence_length": 128, "position_encoding_2d": True}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('this must never run')")
    names, index = sorted(weights), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return tensors()


@pytest.fixture(scope="module")
def model(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = published(tmp_path_factory.mktemp("chatglm"), weights)
    return load(ModelOptions(path=str(folder), dtype="float32"))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("ids", ROWS)
def test_a_row_is_what_the_architecture_says(model: Any, weights: dict[str, Tensor], ids: list[int]):
    wanted = reference(weights, ids)
    close(model(input_ids=torch.tensor([ids])).logits[0], wanted)
    embedded = model.get_input_embeddings()(torch.tensor([ids]))  # what prompt tuning hands on
    close(model(inputs_embeds=embedded).logits[0], wanted)
    close(model(input_ids=torch.tensor([ids]), logits_to_keep=2).logits[0], wanted[-2:])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(model: Any, weights: dict[str, Tensor], side: str):
    width = max(map(len, ROWS)) + 2
    ids = torch.full((len(ROWS), width), SOP)  # the worst token to pad with
    real = torch.zeros_like(ids)
    spans = [slice(width - len(row), width) if side == "left" else slice(0, len(row)) for row in ROWS]
    for number, (row, span) in enumerate(zip(ROWS, spans, strict=True)):
        ids[number, span], real[number, span] = torch.tensor(row), 1
    found = model(input_ids=ids, attention_mask=real).logits
    assert found.isfinite().all()
    unmasked = model(input_ids=ids).logits if side == "right" else found
    for number, (row, span) in enumerate(zip(ROWS, spans, strict=True)):
        close(found[number, span], reference(weights, row))
        close(unmasked[number, span], reference(weights, row))


@torch.no_grad()
@pytest.mark.parametrize("ids", ROWS)
def test_step_by_step_with_a_cache_is_the_whole(model: Any, weights: dict[str, Tensor], ids: list[int]):
    cache, start = DynamicCache(), max(places(ids)[2] + 1, 2)
    wanted = reference(weights, ids)
    found = [model(input_ids=torch.tensor([ids[:start]]), past_key_values=cache, use_cache=True).logits[0]]
    for token in ids[start:]:
        found.append(model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0])
    close(torch.cat(found), wanted)
    cache.crop(start - len(ids))
    if start < len(ids):
        close(model(input_ids=torch.tensor([ids[start:]]), past_key_values=cache).logits[0], wanted[start:])


def test_a_context_in_two_pieces_is_refused(model: Any):
    cache = DynamicCache()
    model(input_ids=torch.tensor([ASKED[:3]]), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="one piece"):
        model(input_ids=torch.tensor([ASKED[3:]]), past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_a_prefix_of_keys_and_values_has_no_place(model: Any, weights: dict[str, Tensor]):
    draw, heads = torch.Generator().manual_seed(1), SIZES["num_attention_heads"]
    past = [torch.randn(2, 5, heads, 16, generator=draw) for _ in range(SIZES["num_layers"])]
    for mask in (None, torch.ones(1, 5 + len(ASKED), dtype=torch.long)):
        cache = DynamicCache()
        for number, states in enumerate(past):
            cache.update(*states.transpose(1, 2)[:, None], number)
        found = model(input_ids=torch.tensor([ASKED]), attention_mask=mask, past_key_values=cache).logits[0]
        close(found, reference(weights, ASKED, [states.double() for states in past]))


def test_a_block_of_the_real_size():
    """hidden 4096, 32 heads, inner 16384: float32 against the reference."""
    config, at = ChatGLMConfig(), places([*range(7, 12), GMASK, SOP, 12])
    with torch.device("meta"):
        layer = ChatGLMBlock(config, 5)
    layer, draw = layer.to_empty(device="cpu"), torch.Generator().manual_seed(0)
    own = dict(layer.named_parameters())
    with torch.no_grad():
        for name, weight in own.items():
            weight.uniform_(-0.02, 0.02, generator=draw)
            if "norm.weight" in name:
                weight += 1
        hidden = torch.randn(1, 8, 4096, generator=draw)
        config._attn_implementation = "sdpa"
        seen = torch.tensor([[[[key <= query or key < at[2] for key in range(8)] for query in range(8)]]])
        turn = _turn(torch.tensor([list(zip(*at[:2], strict=True))]), 128, torch.float32)
        found = layer(hidden, turn, seen)[0].double()
        wanted = block(hidden[0].double(), own, 32, 5, 28, at)
    assert (found - wanted).norm() / wanted.norm() < 1e-6


# ---- files ---------------------------------------------------------------------------------------------------------


def test_the_published_size_and_every_key_of_its_config():
    config = {"hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28, "num_attention_heads": 32}
    found = shape.read({"model_type": "chatglm", "vocab_size": 130528, "max_sequence_length": 2048, **config})
    assert found.parameters == 6_173_286_400 and found.tied and found.kind == "causal"
    assert (found.layers, found.heads, found.head_dim, found.intermediate) == (28, 32, 128, 16384)
    assert found.positions == 2048


def test_a_folder_opens_without_its_code_and_what_is_saved_opens_again(
    model: Any, weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = published(tmp_path / "source", weights)
    again = load(ModelOptions(path=str(folder), dtype="float32"))
    (said,) = capsys.readouterr().err.splitlines()
    assert (
        "modeling_chatglm.py" in said
        and "not run" in said
        and again.lm_head.weight is again.transformer.word_embeddings.weight
    )
    again.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "auto_map" not in saved and saved["inner_hidden_size"] == 96
    once_more = load(ModelOptions(path=str(tmp_path / "saved"), dtype="float32"))
    ids = torch.tensor([ASKED])
    assert torch.equal(once_more(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_head_of_its_own_is_kept(weights: dict[str, Tensor], tmp_path: Path):
    own = weights | {"lm_head.weight": weights["lm_head.weight"].flip(0)}
    found = load(ModelOptions(path=str(published(tmp_path, own)), dtype="float32"))
    close(found(input_ids=torch.tensor([ASKED])).logits[0].detach(), reference(own, ASKED))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"multi_query_group_num": 2}, "weitiao convert"),
        ({"quantization_bit": 4}, "quantization_bit = 4"),
        ({"pre_seq_len": 128}, "pre_seq_len"),
        ({"position_encoding_2d": False}, "position_encoding_2d"),
        ({"num_attention_heads": 32}, "four times the 32 heads"),
    ],
)
def test_what_is_not_chatglm_6b_is_said(changes: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        shape.read({"model_type": "chatglm", **SIZES, **changes})


def test_there_is_nothing_to_convert(weights: dict[str, Tensor], tmp_path: Path):
    with pytest.raises(InputError, match="opens as it is"):
        convert(published(tmp_path / "source", weights), tmp_path / "out")


# ---- the chat template, generation, training -----------------------------------------------------------------------


def conversation(*words: str) -> tuple[Message, ...]:
    return tuple(Message("assistant" if place % 2 else "user", text) for place, text in enumerate(words))


def test_the_template_writes_what_the_published_chat_does():
    renderer = Renderer.of(tiny.make_tokenizer("chatglm"))
    assert renderer.text(conversation("你好"), generate=True) == "你好[gMASK]<sop>"
    assert renderer.prompt(conversation("你好"))[-2:] == [GMASK, SOP]
    several = "[Round 0]\n问：你好\n答：您好！\n[Round 1]\n问：几点了\n答：[gMASK]<sop>"
    assert renderer.text(conversation("你好", "您好！", "几点了"), generate=True) == several
    assert renderer.stop_ids == [EOP] and renderer.folds_system and not renderer.can_call


def test_every_turn_is_an_example_of_its_own():
    renderer = Renderer.of(tiny.make_tokenizer("chatglm"))
    (made,) = renderer.renders([Chat(conversation("你好", "您好！", "几点了", "三点。"))])
    assert not isinstance(made, InputError)
    decoded = [renderer.marker.decode(np.array(one.ids)[one.mask].tolist()) for one in made]
    assert decoded == ["您好！<eop>", "三点。<eop>"]
    assert [one.ids.index(SOP) for one in made] == [one.mask.index(True) - 1 for one in made]


def asked(count: int, seed: int = 0, mask: bool = True) -> list[Example]:
    """Rows of a context of mixed length and an answer, which is what trains."""
    draw, found = np.random.default_rng(seed), []
    for number in range(count):
        context, answer = (draw.integers(5, 300, int(draw.integers(2, high))).tolist() for high in (14, 8))
        ids = [*context, GMASK, SOP, *answer, EOP]
        trained = [mask and place > ids.index(SOP) for place in range(len(ids))]
        found.append(Example(np.array(ids, dtype=np.int32), np.array(trained), f"row:{number}"))
    return found


TUNED: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 4},
    "p_tuning": {"name": "p_tuning", "tokens": 4, "encoder_hidden": 16},
    "prefix_tuning": {"name": "prefix_tuning", "tokens": 4},
}
RATES = {"full": 0.01, "p_tuning": 0.02}


@pytest.mark.parametrize("name", TUNED)
def test_it_learns_answers_and_writes_them_with_and_without_a_cache(name: str, tmp_path: Path):
    method, base = method_of(TUNED[name]), tiny.make("chatglm")
    torch.manual_seed(0)
    model = method.attach(base)
    examples = asked(8)
    options: dict[str, Any] = {"epochs": 30, "batch_size": 8, "save_every": 100, "schedule": "constant"}
    options |= {"learning_rate": RATES.get(name, 0.05)}
    done, model, _ = train(tmp_path, examples, TUNED[name], model=(model, method), options=options)
    losses = [line["loss"] for line in done.history]
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    prompts = [example.ids[: example.mask.argmax()].tolist() for example in examples[:4]]
    found = generate(model, [*prompts, prompts[0]], SampleOptions(max_new_tokens=6), stop_ids=[EOP], pad_id=PAD)
    assert found[0].ids == found[-1].ids
    for prompt, answer in zip(prompts, found, strict=False):
        ids = list(prompt)
        for token in answer.ids:
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert scores.max() - scores[token] < 1e-3
            ids.append(token)
    batch = collate(examples, PAD)
    with torch.no_grad():
        together = token_logps(model, batch.ids, None, batch.mask)
        alone = [token_logps(model, one.ids, None, one.mask) for one in (collate([row], PAD) for row in examples)]
    close(torch.cat(alone), together)
    assert leading(model) == TUNED[name].get("tokens", 0)


@pytest.mark.parametrize("name", ["lora", "prefix_tuning"])
def test_recomputing_changes_nothing(name: str, tmp_path: Path):
    losses = {}
    for memory in ("fast", "low"):
        method = method_of(TUNED[name])
        torch.manual_seed(0)
        model, options = (
            (method.attach(tiny.make("chatglm")), method),
            {"max_steps": 3, "save_every": 100, "memory": memory},
        )
        done, _, _ = train(tmp_path / memory, asked(8), TUNED[name], model=model, options=options)
        losses[memory] = [line["loss"] for line in done.history]
    assert losses["fast"] == pytest.approx(losses["low"], abs=1e-5)


@pytest.mark.parametrize("name", ["lora", "p_tuning", "prefix_tuning"])
def test_peft_opens_what_is_saved(name: str, tmp_path: Path):
    base, method = open_model(tiny.make("chatglm", tmp_path / "base"), dtype="float32"), method_of(TUNED[name])
    options = {"max_steps": 2, "save_every": 100, "learning_rate": 0.05}
    _, model, _ = train(tmp_path, asked(4), TUNED[name], model=(method.attach(base.model), method), options=options)
    save(model, method, base.tokenizer, base.renderer, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(tiny.make("chatglm"), str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[7, 8, 9, GMASK, SOP, 20, 21, 22], [*range(30, 36), GMASK, SOP]])
    with torch.no_grad():
        close(theirs(input_ids=ids).logits[:, -ids.shape[1] :], model.eval()(input_ids=ids).logits)


def test_an_adapter_on_the_published_files_is_merged(tmp_path: Path):
    folder = published(tmp_path / "base", tensors(vocab_size=448), vocab_size=448)
    tiny.make_tokenizer("chatglm").save_pretrained(folder)
    base, method = open_model(folder, dtype="float32"), method_of(TUNED["lora"])
    options = {"max_steps": 2, "save_every": 100, "learning_rate": 0.05}
    _, model, _ = train(tmp_path, asked(4), TUNED["lora"], model=(method.attach(base.model), method), options=options)
    save(model, method, base.tokenizer, base.renderer, tmp_path / "adapter", str(folder))
    found = merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert (
        found["saved_difference"] <= 1e-3 * found["largest_logit"] and stored_dtype(tmp_path / "adapter") == "float16"
    )
    merged = open_model(tmp_path / "merged", dtype="float32").model
    ids = torch.tensor([[7, 8, 9, GMASK, SOP, 20, 21, 22]])
    with torch.no_grad():
        close(merged(input_ids=ids).logits / 10, model.eval()(input_ids=ids).logits / 10)


def test_rows_that_train_their_own_context_are_refused(tmp_path: Path):
    whole = [Example(row.ids, np.ones(len(row), dtype=bool), row.id) for row in asked(3)]
    method = method_of({"name": "full"})
    with pytest.raises(InputError, match="3 rows train on what this model reads"):
        train(tmp_path, whole, {"name": "full"}, model=(method.attach(tiny.make("chatglm")), method))


def test_transformers_own_generation_is_the_engine_s():
    model = tiny.make("chatglm", seed=2)
    prompts = [example.ids[: example.mask.argmax()].tolist() for example in asked(3, seed=5)]
    ours = generate(model, prompts, SampleOptions(max_new_tokens=8), stop_ids=(), pad_id=PAD)
    model.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in prompts])
    out = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    assert [list(answer.ids) for answer in ours] == out[:, width:].tolist()


def test_a_long_common_context_is_not_computed_apart():
    model, common = tiny.make("chatglm", seed=2), list(range(10, 40))
    prompts = [[*common, place, GMASK, SOP] for place in (50, 60)]
    options = SampleOptions(max_new_tokens=5)
    together = generate(model, prompts, options, stop_ids=(), pad_id=PAD)
    alone = [generate(model, [prompt], options, stop_ids=(), pad_id=PAD)[0] for prompt in prompts]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]


def test_new_blocks_change_nothing_at_first():
    ids = torch.tensor([[7, 8, 9, GMASK, SOP, 20, 21, 22]])
    base = tiny.make("chatglm")
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
        wanted = base(input_ids=ids).logits
        for where in ("interleaved", "tail"):
            model = method_of({"name": "expand", "blocks": 2, "where": where}).attach(base)
            close(model(input_ids=ids).logits, wanted)
    assert model.config.num_layers == 6 and model.config.residual_layers == 2
