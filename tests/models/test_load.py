"""Loading: what is refused, what is repaired aloud, what comes out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weitiao import machine
from weitiao.errors import InputError
from weitiao.models import attention, shape, sizes, tiny
from weitiao.models.load import ModelOptions, choose_dtype, load, load_tokenizer
from weitiao.models.modules import embedding


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


def edit(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_saved_is_loaded(family, tmp_path):
    folder = tiny.make(family, tmp_path)
    model = load(ModelOptions(path=str(folder), dtype="float32"))
    own = "eager" if family in ("bloom", "rwkv") else attention.NAME  # what their class has
    assert not model.training and model.config._attn_implementation == own
    made = tiny.make(family).state_dict()
    assert made.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name].cpu(), tensor) for name, tensor in made.items())


def test_experts_lie_in_files_one_by_one_as_they_are_published(tmp_path):
    names = load_file(tiny.make("qwen3_moe", tmp_path) / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names


def test_dtypes(llama):
    assert load(ModelOptions(path=str(llama), dtype="bfloat16")).dtype == torch.bfloat16
    assert str(load(ModelOptions(path=str(llama))).dtype) == f"torch.{machine.best_dtype()}"
    assert choose_dtype("auto", new=True) == "float32"
    if machine.device() == "cpu":
        assert choose_dtype("auto") in ("float32", "bfloat16")
        with pytest.raises(InputError, match="float16 is not for CPUs"):
            load(ModelOptions(path=str(llama), dtype="float16"))


def test_a_new_model_is_its_seed_s(llama):
    tokenizer = load_tokenizer(llama)
    config = json.loads((llama / "config.json").read_text())
    before = torch.get_rng_state()
    one, same, other = (
        load(ModelOptions(config=config), tokenizer=tokenizer, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert one["lm_head.weight"].shape == (len(tokenizer), 64)
    fresh = load(ModelOptions(config=str(llama / "config.json")), tokenizer=tokenizer, vocab_size=512)
    assert embedding(fresh).weight.shape[0] == 512
    assert fresh.config.eos_token_id == tokenizer.eos_token_id and fresh.config.pad_token_id == tokenizer.pad_token_id
    assert load(ModelOptions(path=str(llama)), new=True).dtype == torch.float32


def test_sizes_that_do_not_fit_are_said_before_memory_is_taken():
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 3}
    with pytest.raises(InputError):
        load(ModelOptions(config={**config, "head_dim": -1}))


def test_missing_and_short_files_are_named(copy):
    (copy / "config.json").unlink()
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError) as error:
        load(ModelOptions(path=str(copy)))
    assert "config.json: missing" in str(error.value) and "model.safetensors: cut short" in str(error.value)


def test_a_tensor_that_is_missing_is_an_error_and_one_too_many_is_said(copy, capsys):
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.ones(2)}, copy / "model.safetensors", {"format": "pt"})
    load(ModelOptions(path=str(copy)))
    assert "extra.weight" in capsys.readouterr().err
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensor .*up_proj"):
        load(ModelOptions(path=str(copy)))


SLIPS = {
    "hidden_size": (32, r"embed_tokens\.weight is \[\d+, 64\] in the file of weights; by config\.json .* \[\d+, 32\]"),
    "intermediate_size": (96, r"layers\.0\.mlp\.\w+\.weight is \[\d+, \d+\].*\b96\b"),
    "vocab_size": (77, r"embed_tokens\.weight is .* \[77, 64\]"),
    "num_key_value_heads": (1, r"layers\.0\.self_attn\.k_proj\.weight"),
}


@pytest.mark.parametrize("key", SLIPS)
def test_weights_of_another_size_are_named_before_any_is_read(copy, key, monkeypatch):
    value, said = SLIPS[key]
    edit(copy, "config.json", **{key: value})
    monkeypatch.setattr("weitiao.models.load._opened", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=said) as error:
        load(ModelOptions(path=str(copy)))
    assert len(error.value.problems) <= 8 and "from one place" in error.value.problems[-1]


def test_a_size_that_only_transformers_finds_wrong_is_named_alike(copy, monkeypatch):
    edit(copy, "config.json", intermediate_size=96)
    monkeypatch.setattr("weitiao.models.sizes.check_tensors", lambda *_: None)
    with pytest.raises(InputError, match=r"mlp\.down_proj\.weight is \[64, 128\] .* \[64, 96\]") as error:
        load(ModelOptions(path=str(copy)))
    assert "report" not in str(error.value) and "ignore_mismatched" not in str(error.value)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "qwen3", "gemma", "glm", "bert", "qwen3_moe", "rwkv", "bloom", "phi3"]
)
def test_sound_folders_of_every_family_pass(tmp_path, family):
    folder = tiny.make(family, tmp_path / family)
    sizes.check_tensors(folder, shape.read(folder))
    load(ModelOptions(path=str(folder), dtype="float32"))


def test_code_in_a_folder_is_never_run(copy):
    canary = copy / "ran"
    (copy / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    edit(copy, "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    edit(copy, "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]})
    with pytest.raises(InputError, match=r"modeling_evil\.py"):
        load(ModelOptions(path=str(copy)))
    load_tokenizer(copy)
    assert not canary.exists()


def test_an_adapter_is_not_laid_over_a_model_unasked(copy):
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "other/base"}')
    with pytest.raises(InputError, match="an adapter of other/base"):
        load(ModelOptions(path=str(copy)))


def test_a_pickle_that_would_run_code_is_refused(copy):
    class Evil:
        def __reduce__(self):
            return (open, (str(copy / "ran"), "w"))

    (copy / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="could run code"):
        load(ModelOptions(path=str(copy)))
    assert not (copy / "ran").exists()


def test_bin_weights_load(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    model = load(ModelOptions(path=str(copy), dtype="float32"))
    assert torch.equal(model.get_parameter("lm_head.weight").cpu(), tensors["lm_head.weight"])


def test_more_tokens_than_the_model_embeds(copy):
    tokenizer = load_tokenizer(copy)
    tokenizer.add_tokens([f"<new{index}>" for index in range(100)])
    with pytest.raises(InputError, match="embeds 448"):
        load(ModelOptions(path=str(copy)), tokenizer=tokenizer)


def test_an_unknown_family_has_its_head_checked(tmp_path, monkeypatch):
    from transformers import StableLmConfig

    from weitiao.models import modules, shape

    config = StableLmConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    checked = []
    monkeypatch.setattr(modules, "check_head", lambda model: checked.append(model))
    load(ModelOptions(config=config.to_dict()))
    assert checked and shape.read(config).layers == 2


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def test_pad_becomes_unk_or_eos_and_that_is_said(copy, capsys):
    assert load_tokenizer(copy).pad_token == "<unk>"
    assert "no pad_token; using <unk>" in capsys.readouterr().err
    edit(copy, "tokenizer_config.json", unk_token=None)
    assert load_tokenizer(copy).pad_token == "</s>"


def test_eos_comes_from_the_model_or_is_an_error(copy, capsys):
    edit(copy, "tokenizer_config.json", eos_token=None)
    assert load_tokenizer(copy).eos_token == "</s>"
    assert "no eos_token; using </s>" in capsys.readouterr().err
    edit(copy, "config.json", eos_token_id=None)
    edit(copy, "generation_config.json", eos_token_id=None)
    with pytest.raises(InputError, match="no eos_token"):
        load_tokenizer(copy)


def test_an_encoder_ends_with_its_separator(tmp_path):
    assert load_tokenizer(tiny.make("bert", tmp_path)).eos_token == "[SEP]"


def test_rwkv_is_not_rescaled_on_the_way_to_evaluation(tmp_path):
    """Its class halves weights in place, by layer, when it leaves training: under an adapter, codes, or a save."""
    model = load(ModelOptions(path=str(tiny.make("rwkv", tmp_path, rescale_every=1)), dtype="float32"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.tensor([[5, 9, 11]])
    wanted = model.train()(input_ids=ids).logits
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, wanted)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_tokenizer_json_is_taken_as_it_is(tmp_path):
    """transformers' own class for qwen2 would split "12345" into digits whatever the file says."""
    folder = tiny.make("llama", tmp_path)
    expected = load_tokenizer(folder)("12345 apples").input_ids
    edit(folder, "config.json", model_type="qwen2")
    assert load_tokenizer(folder)("12345 apples").input_ids == expected


def test_the_chat_template_comes_along(copy):
    assert load_tokenizer(copy).chat_template == tiny.FAMILIES["llama"].template


def test_a_tokenizer_that_needs_code_is_refused(copy):
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    (copy / "evil.py").write_text("raise SystemExit(3)")
    edit(copy, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    edit(copy, "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(InputError, match="never run"):
        load_tokenizer(copy)


def test_a_missing_or_broken_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(copy)


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "attn_implementation", "_experts_implementation"])
def test_a_kernel_from_elsewhere_is_refused_and_a_known_one_is_not(copy, key):
    edit(copy, "config.json", text_config={key: "someone/kernels"})
    with pytest.raises(InputError, match="names code to be fetched"):
        load(ModelOptions(path=str(copy)))
    edit(copy, "config.json", text_config=None, **{key: "flash_attention_2"})
    load(ModelOptions(path=str(copy)))


def test_code_beside_known_classes_is_said_and_left_alone(copy, capsys):
    edit(copy, "config.json", auto_map={"AutoModel": "modeling_evil.Evil"}, trust_remote_code=True)
    assert not hasattr(load(ModelOptions(path=str(copy))).config, "auto_map")
    assert "modeling_evil.py); it is not run" in capsys.readouterr().err


def test_links_out_of_a_folder_are_refused(copy, tmp_path):
    (copy / "config.json").rename(tmp_path / "elsewhere.json")
    (copy / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="a link out of its folder"):
        load(ModelOptions(path=str(copy)))


def test_the_hubs_own_links_are_inside(copy, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in copy.iterdir():
        file.rename(tmp_path / "models--a--b" / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    load(ModelOptions(path=str(snapshot)))
    load_tokenizer(snapshot)
