"""One matrix of properties that every method passes on every tiny family."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from tests.train.support import method_of, rows, train
from weitiao.data.batch import collate
from weitiao.data.render import Renderer
from weitiao.errors import InputError
from weitiao.methods.adapters import short_names
from weitiao.methods.base import trainable
from weitiao.methods.freeze import matched
from weitiao.methods.io import RECORD, open_model, save
from weitiao.models import modules, shape, tiny
from weitiao.models.load import ModelOptions, load, load_tokenizer
from weitiao.models.quantized import quantize
from weitiao.recipe import Recipe, run
from weitiao.train.logps import token_logps

METHODS = {
    "full": {"name": "full"},
    "freeze blocks": {"name": "freeze", "blocks": 1},
    "freeze rest": {"name": "freeze", "blocks": 0, "embeddings": True, "norms": True, "head": True},
    "lora": {"name": "lora", "rank": 4},
    "lora rs": {"name": "lora", "rank": 2, "alpha": 3, "rslora": True, "dropout": 0.1},
    "adalora": {"name": "adalora", "rank": 4, "target_rank": 2, "every": 1},
    "expand": {"name": "expand", "blocks": 1},
    "expand tail": {"name": "expand", "blocks": 2, "where": "tail"},
    "prompt": {"name": "prompt_tuning", "tokens": 4},
    "prompt random": {"name": "prompt_tuning", "tokens": 3, "start": "random"},
    "p mlp": {"name": "p_tuning", "tokens": 4, "encoder_hidden": 8},
    "p lstm": {"name": "p_tuning", "tokens": 4, "encoder": "lstm", "encoder_hidden": 8},
    "prefix": {"name": "prefix_tuning", "tokens": 4},
    "prefix projected": {"name": "prefix_tuning", "tokens": 4, "projection": 8},
    "adapter": {"name": "adapter", "size": 4},
    "adapter houlsby": {"name": "adapter", "size": 4, "style": "houlsby", "activation": "gelu"},
    "adapter parallel": {"name": "adapter", "size": 4, "style": "parallel"},
    "peft ia3": {"name": "peft", "kind": "IA3"},
    "peft vera": {"name": "peft", "kind": "VERA", "config": {"r": 2}},
}
WIDE = {
    **{"model_type": "llama", "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
matrix = pytest.mark.parametrize("values", METHODS.values(), ids=METHODS)
# one of each architecture; make matrix takes every family
DAILY = ("gpt2", "llama", "gemma", "glm", "phi3", "qwen2_moe", "bloom", "rwkv")
CAUSAL = [name for name in tiny.FAMILIES if "bert" not in name] if os.environ.get("WEITIAO_MATRIX") == "1" else DAILY
every_family = pytest.mark.parametrize("family", [*CAUSAL, "bert", "roberta"])
causal = pytest.mark.parametrize("family", CAUSAL)


@pytest.fixture(scope="module", params=CAUSAL)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(request.param, tmp_path_factory.mktemp("tiny") / request.param)


NO_CACHE = "no cache of keys and values"
REFUSED = {  # (method, family): what the error says
    ("prefix_tuning", "rwkv"): NO_CACHE,
    **{("expand", encoder): "norms what its blocks add up" for encoder in ("bert", "roberta")},
    **{("prefix_tuning", encoder): NO_CACHE for encoder in ("bert", "roberta")},
}


@every_family
@matrix
def test_count_is_exact_and_trainables_are_float32(family, values):
    model, method = tiny.make(family).to(torch.bfloat16), method_of(values)
    if reason := REFUSED.get((values["name"], family)):
        for refused in (lambda: method.count(shape.read(model.config)), lambda: method.attach(model)):
            with pytest.raises(InputError, match=reason):
                refused()
        return
    attached = method.attach(model)
    trained = trainable(attached).values()
    assert method.count(shape.read(model.config)) == sum(parameter.numel() for parameter in trained)
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    frozen = {name: parameter for name, parameter in attached.named_parameters() if not parameter.requires_grad}
    others = {parameter.dtype for name, parameter in frozen.items() if ".ranknum." not in name}  # PEFT's own count
    assert others <= {torch.bfloat16}
    grouped = [id(p) for group in method.parameter_groups(attached, 1e-3) for p in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in trained)


@causal
@matrix
def test_only_what_should_train_changes(tmp_path, family, values):
    if (values["name"], family) in REFUSED:
        return
    model, method = tiny.make(family), method_of(values)
    attached = method.attach(model)
    before = {name: parameter.detach().clone() for name, parameter in attached.named_parameters()}
    train(tmp_path / "run", rows(4), values, model=(attached, method), options={"max_steps": 2, "learning_rate": 0.01})
    trained = trainable(attached)
    changed = {name for name, parameter in attached.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed <= trained.keys()
    used = {name for name in trained if not name.endswith("k_proj.bias")}  # shifts every score alike: no gradient
    assert used - changed <= {name for name in used if "wpe" in name or "c_attn.bias" in name or ".lora_E." in name}


@matrix
def test_saved_and_opened_gives_the_same_outputs(tmp_path, folder, values):
    if (values["name"], folder.name) in REFUSED:
        return
    base = open_model(folder, dtype="float32")
    method = method_of(values)
    _, model, _ = train(
        tmp_path / "run", rows(4), values, model=(method.attach(base.model), method), options={"learning_rate": 0.05}
    )
    out = tmp_path / "run" / ("adapter" if method.saves == "adapter" else "model")
    save(model, method, base.tokenizer, base.renderer, out, str(folder))
    batch = collate(rows(3, seed=4), 0)
    model.eval()
    wanted = token_logps(model, batch.ids, None, batch.mask)
    for path in (out, tmp_path / "run"):
        tuned = open_model(path, dtype="float32")
        torch.testing.assert_close(token_logps(tuned.model, batch.ids, None, batch.mask), wanted, rtol=0, atol=1e-5)
        assert tuned.method == method and Path(tuned.base) == folder.resolve()
        assert tuned.renderer.template == base.renderer.template and not tuned.model.training


@causal
@pytest.mark.parametrize("values", [METHODS["lora"], METHODS["lora rs"], METHODS["freeze blocks"]])
def test_merged_is_the_same_model(tmp_path, family, values):
    method = method_of(values)
    model = method.attach(tiny.make(family))
    train(tmp_path / "run", rows(4), values, model=(model, method), options={"learning_rate": 0.05})
    model.eval()
    ids = torch.randint(5, 300, (2, 9))
    wanted = model(input_ids=ids).logits
    merged = method.merge(model)
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=0, atol=1e-5)
    assert type(merged) is type(tiny.make(family))


@causal
def test_an_untouched_lora_is_the_base(family):
    ids = torch.randint(5, 300, (2, 9))
    model = tiny.make(family).eval()
    wanted = model(input_ids=ids).logits
    torch.testing.assert_close(method_of({"name": "lora"}).attach(model)(input_ids=ids).logits, wanted, rtol=0, atol=0)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "lora", "target_modules": ["q_prj"]}, 'did you mean "q_proj"'),
        ({"name": "lora", "modules_to_save": ["nomr"]}, 'did you mean "norm"'),
        ({"name": "freeze", "modules": ["*.mlp.donw_proj"]}, 'did you mean "down_proj"'),
        ({"name": "freeze", "modules": ["re:("]}, "method.modules"),
        ({"name": "freeze", "blocks": 99}, "layers, not 99"),
        ({"name": "freeze", "blocks": 0}, "nothing would train"),
    ],
)
def test_names_that_mean_nothing_are_said_before_loading(values, message):
    sizes = shape.read(tiny.make("llama").config)
    with pytest.raises(InputError, match=message):
        method_of(values).count(sizes)
    with pytest.raises(InputError, match=message):
        method_of(values).attach(tiny.make("llama"))


def test_a_tied_embedding_is_not_copied_into_an_adapter():
    assert tiny.make("gemma").config.tie_word_embeddings
    with pytest.raises(InputError, match="both embedding and head"):
        method_of({"name": "lora", "modules_to_save": ["embed_tokens"]}).attach(tiny.make("gemma"))


def test_patterns():
    names = ["m.layers.0.mlp.up.weight", "m.layers.1.mlp.up.weight", "m.layers.1.norm.weight"]
    assert matched(["layers.1"], names) == ["m.layers.1"]
    assert matched(["layers.*.mlp"], names) == ["m.layers.0.mlp", "m.layers.1.mlp"]
    assert matched([r"re:.*\.[01]\.norm"], names) == ["m.layers.1.norm"]
    with pytest.raises(InputError) as raised:
        matched(["nrom", "upp"], names)
    assert len(raised.value.problems) == 2


def test_target_names_are_short_where_that_means_the_same():
    assert short_names(["a.0.q", "a.1.q"], ["a.0.q", "a.1.q", "a.0.k"]) == ["q"]
    assert short_names(["a.0.q"], ["a.0.q", "a.1.q"]) == ["a.0.q"]


def test_frozen_base_is_held_once():
    model = tiny.make("llama").to(torch.bfloat16)
    before = {id(parameter) for parameter in model.parameters()}
    attached = method_of({"name": "lora"}).attach(model)
    assert before == {id(parameter) for parameter in attached.parameters() if not parameter.requires_grad}


@every_family
def test_head_and_blocks_are_found_through_the_wrapper(family):
    attached = method_of({"name": "lora"}).attach(tiny.make(family))
    assert modules.blocks(attached) is not None


def test_renderer_travels(tmp_path, folder):
    tokenizer = load_tokenizer(folder)
    renderer = Renderer.of(tokenizer)
    method = method_of({"name": "lora"})
    save(method.attach(tiny.make(folder.name)), method, tokenizer, renderer, tmp_path / "adapter", str(folder))
    again = load_tokenizer(tmp_path / "adapter")
    assert again.encode("您好 hello") == tokenizer.encode("您好 hello")
    assert Renderer.of(again).template == renderer.template


@pytest.mark.parametrize("values", [METHODS["lora"], METHODS["prefix"], METHODS["adapter"]], ids=lambda v: v["name"])
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, values: dict):
    """Other weights are found out by their fingerprint, another shape by its tensors; both bases are named."""
    base = tiny.make("llama", tmp_path / "base")
    opened, method = open_model(base), method_of(values)
    save(method.attach(opened.model), method, opened.tokenizer, opened.renderer, tmp_path / "adapter", str(base))
    open_model(tmp_path / "adapter")
    tiny.make("llama", base, seed=1)
    with pytest.raises(InputError, match=f"tuned on {base.resolve()} when its weights were others"):
        open_model(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / RECORD).read_text())
    del record["base_fingerprint"]
    (tmp_path / "adapter" / RECORD).write_text(json.dumps(record))
    open_model(tmp_path / "adapter")
    load(ModelOptions(config=WIDE), tokenizer=opened.tokenizer).save_pretrained(base)
    with pytest.raises(InputError, match=f"made for {base.resolve()} and does not fit"):
        open_model(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_a_rank_above_the_matrix_is_refused(name: str):
    wide = shape.read(tiny.make("llama", hidden_size=256, intermediate_size=512).config)  # k_proj has 128 outputs
    method = method_of({"name": name, "rank": 129, **({"target_rank": 64} if name == "adalora" else {})})
    with pytest.raises(InputError, match=r"129 is above .* 4 .*k_proj: 256 x 128\); take 128 or less"):
        method.count(wide)
    with pytest.raises(InputError, match="129 is above"):
        method.attach(tiny.make("llama", hidden_size=256, intermediate_size=512))
    others = {"target_modules": ["q_proj", "o_proj"]}
    assert method_of(method.model_dump() | others).count(wide) > 0
    method_of({"name": "lora"}).attach(tiny.make("qwen2_moe"))  # with a gate of one output


def test_a_block_that_its_family_would_not_make_there_is_not_copied():
    rwkv = shape.read(tiny.make("rwkv").config)  # its first block has a norm that the others lack
    with pytest.raises(InputError, match="block 0 as block 1; take method"):
        method_of({"name": "expand", "blocks": 2}).count(rwkv)
    method_of({"name": "expand", "blocks": 2, "where": "tail"}).attach(tiny.make("rwkv"))


@pytest.mark.parametrize(("family", "name"), [("llama", "embed_tokens"), ("gpt2", "wte"), ("bloom", "word_embeddings")])
def test_an_embedding_can_be_adapted(family: str, name: str, tmp_path: Path):
    values = {"name": "lora", "rank": 3, "target_modules": [name, r"q_proj" if family == "llama" else "mlp.c_fc"]}
    values["target_modules"] = values["target_modules"][: 1 if family == "bloom" else 2]
    folder, method = tiny.make(family, tmp_path / "base"), method_of(values)
    start = open_model(folder, dtype="float32")
    batch = collate(rows(3, seed=4), 0)
    untouched = token_logps(start.model, batch.ids, None, batch.mask)
    model = method.attach(start.model)
    assert method.count(shape.read(folder)) == sum(parameter.numel() for parameter in trainable(model).values())
    _, model, _ = train(tmp_path / "run", rows(4), values, model=(model, method), options={"learning_rate": 0.05})
    wanted = token_logps(model.eval(), batch.ids, None, batch.mask)
    assert not torch.allclose(wanted, untouched, atol=1e-3)
    with method.disabled(model):
        assert torch.equal(token_logps(model, batch.ids, None, batch.mask), untouched)
    out = save(model, method, start.tokenizer, start.renderer, tmp_path / "out", str(folder))
    again = open_model(out, dtype="float32")
    torch.testing.assert_close(token_logps(again.model, batch.ids, None, batch.mask), wanted, rtol=0, atol=1e-5)
    if shape.read(folder).tied:
        with pytest.raises(InputError, match="are one weight"):
            method.merge(model)
        return
    torch.testing.assert_close(token_logps(method.merge(model), batch.ids, None, batch.mask), wanted, rtol=0, atol=1e-4)


def test_an_embedding_takes_plain_lora():
    with pytest.raises(InputError, match="neither dora nor pissa"):
        method_of({"name": "lora", "target_modules": ["embed_tokens"], "dora": True}).attach(tiny.make("llama"))


def test_the_report_tells_the_final_ranks(tiny_llama: Path, tmp_path: Path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q{n}", "answer": f"a{n}"}) + "\n" for n in range(12)))
    values = {
        "model": {"path": str(tiny_llama)},
        "data": {"train": str(data), "validation": None},
        "output": str(tmp_path / "run"),
    }
    values |= {"method": METHODS["adalora"], "train": {"max_steps": 8, "batch_size": 4, "warmup_steps": 0}}
    run(Recipe.model_validate(values))
    (told,) = re.findall(r"\| *final ranks *\| (.*) \|", (tmp_path / "run" / "report.md").read_text(encoding="utf-8"))
    opened = open_model(tmp_path / "run")
    assert opened.method is not None and opened.method.outcome(opened.model) == {"final ranks": told.strip()}
    means = [float(number) for number in re.findall(r"\w+_proj ([\d.]+) \(\d–\d\)", told)]
    assert len(means) == 7 and abs(sum(means) / 7 - 2) < 0.05  # as many linears of every kind


def test_a_name_in_capitals_is_suggested_too():
    with pytest.raises(InputError, match='did you mean "VERA"'):
        method_of({"name": "peft", "kind": "VEERA"}).attach(tiny.make("llama"))


# ---- a mixture's experts -------------------------------------------------------------------------------------------

EXPERTS = {"name": "lora", "rank": 3, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_experts_can_be_adapted(family, tmp_path):
    folder, method = tiny.make(family, tmp_path / "base"), method_of(EXPERTS)
    start = open_model(folder, dtype="float32")
    batch = collate(rows(3, seed=4), 0)
    untouched = token_logps(start.model, batch.ids, None, batch.mask)
    model = method.attach(start.model)
    assert method.count(shape.read(folder)) == sum(parameter.numel() for parameter in trainable(model).values())
    _, model, _ = train(tmp_path / "run", rows(4), EXPERTS, model=(model, method), options={"learning_rate": 0.05})
    wanted = token_logps(model.eval(), batch.ids, None, batch.mask)
    with method.disabled(model):
        assert torch.equal(token_logps(model, batch.ids, None, batch.mask), untouched)
    out = save(model, method, start.tokenizer, start.renderer, tmp_path / "out", str(folder))
    again = open_model(out, dtype="float32")
    assert again.method == method
    torch.testing.assert_close(token_logps(again.model, batch.ids, None, batch.mask), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(token_logps(method.merge(model), batch.ids, None, batch.mask), wanted, rtol=0, atol=1e-4)


def test_experts_that_cannot_be_adapted_are_named():
    with pytest.raises(InputError, match='llama keeps no experts in "mlp'):
        method_of(EXPERTS).count(shape.read(tiny.make("llama").config))
    with pytest.raises(InputError, match="gate_up_proj, mlp"):
        method_of({"name": "lora", "target_parameters": ["experts.up"]}).attach(tiny.make("qwen3_moe"))
    with pytest.raises(InputError, match="holds experts in codes"):
        method_of(EXPERTS).attach(quantize(tiny.make("qwen3_moe"), "nf4"))
    with pytest.raises(ValueError, match="neither dora"):
        method_of(EXPERTS | {"dora": True})


def test_dora_says_which_output_has_no_direction():
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3] = 0
    with pytest.raises(InputError, match=r"1 outputs of model.layers.1.self_attn.k_proj"):
        method_of({"name": "lora", "dora": True}).attach(model)
    method_of({"name": "lora"}).attach(model)
