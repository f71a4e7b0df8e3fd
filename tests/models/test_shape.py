"""Shapes from config.json alone are those of the real model."""

import json
import time

import pytest
from transformers import AutoConfig

from weitiao.errors import InputError
from weitiao.models import modules, shape, tiny

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
THIRTY_TWO = {"num_hidden_layers": 32, "num_attention_heads": 32}
QWEN3_30B = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_counts_are_those_of_the_loaded_model(family, tmp_path):
    model = tiny.make(family)
    model.config.save_pretrained(tmp_path)
    found = shape.read(tmp_path)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert {line.name: (line.inputs, line.outputs) for line in found.linears} == {
        name: modules.in_out(module) for name, module in modules.linears(model).items()
    }
    blocks = modules.blocks(model)
    assert found.layers == len(blocks) == len(found.blocks)
    assert found.parameters_under(found.blocks[-1]) == sum(p.numel() for p in blocks[-1].parameters())
    assert found.vocab == model.config.vocab_size and found.kind == ("masked" if "bert" in family else "causal")
    output = model.get_output_embeddings()
    assert found.tied == (output.weight is model.get_input_embeddings().weight)
    assert shape.read(model.config) == found == shape.read(json.loads((tmp_path / "config.json").read_text()))


def test_the_sizes_of_published_models():
    published = {
        "gpt2": ({"model_type": "gpt2"}, 124_439_808),
        "llama-3-70b": (LLAMA_70B, 70_553_706_496),
        "qwen2.5-0.5b": (
            {
                "model_type": "qwen2",
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
            494_032_768,
        ),
        "chatglm-6b": ({"model_type": "chatglm"}, 6_173_286_400),
        "bert-base": ({"model_type": "bert"}, 109_514_298),
        "roberta-base": ({"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1}, 124_697_433),
        "phi-2": ({"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240} | THIRTY_TWO, 2_779_683_840),
        "phi-3-mini": ({"model_type": "phi3", "hidden_size": 3072} | THIRTY_TWO, 3_821_079_552),
        "glm-4-9b-0414": ({"model_type": "glm4"}, 9_400_279_040),
        "qwen1.5-moe-a2.7b": ({"model_type": "qwen2_moe"}, 14_315_784_192),
        "qwen3-30b-a3b": (QWEN3_30B, 30_532_122_624),
        "bloom-560m": ({"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16}, 559_214_592),
        "rwkv-4-169m": ({"model_type": "rwkv", "hidden_size": 768, "num_hidden_layers": 12}, 169_342_464),
    }
    assert {name: shape.read(config).parameters for name, (config, _) in published.items()} == {
        name: count for name, (_, count) in published.items()
    }


def test_a_mixture_s_experts_are_matrices_of_which_a_token_meets_a_few():
    found = shape.read(QWEN3_30B)
    assert len(found.experts) == 2 * 48 and found.experts_per_token == 8
    assert found.experts[0] == shape.Experts("model.layers.0.mlp.experts.gate_up_proj", 128, 2048, 1536, coded=True)
    assert not [linear for linear in found.linears if "experts" in linear.name]
    attention = sum(linear.inputs * linear.outputs for linear in found.linears)
    assert found.products == attention + 48 * 8 * 3 * 2048 * 768


def test_positions_are_those_that_a_token_can_have():
    assert shape.read(tiny.make("roberta").config).positions == 512  # of 514: padding's, and the one before it
    assert shape.read(tiny.make("bert").config).positions == 512
    assert shape.read(tiny.make("bloom").config).positions is None
    kinds = {family: shape.read(tiny.make(family).config).attention for family in ("llama", "bloom", "rwkv", "bert")}
    assert kinds == {"llama": "fused", "bloom": "eager", "rwkv": "recurrent", "bert": "fused"}


def test_seventy_billion_parameters_take_a_moment():
    start = time.perf_counter()
    found = shape.read({**LLAMA_70B, "rope_theta": 500000.0})
    assert time.perf_counter() - start < 3  # about 0.1 s where the machine is quiet
    assert len(found.linears) == 560 and found.head_dim == 128
    assert ("model.layers.*.self_attn.k_proj", 8192, 1024, 80) in found.table()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", '"model_type" is missing'),
        ('{"model_type": "internlm"}', 'no model type "internlm"'),
        ('{"model_type": "internlm", "auto_map": {"AutoModel": "modeling_internlm.X"}}', "modeling_internlm.py"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}', "num_attention_heads"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000}', "1000000 layers"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "gptq"),
        ('{"model_type": "gpt2", "n_layer": -1}', "n_layer: -1"),
        ('{"model_type": "t5"}', "encoder-decoder"),
        ('{"model_type": "vit"}', "not a language model"),
    ],
)
def test_a_bad_config_is_named(text, said, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=said):
        shape.read(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        shape.read(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "llama", "hidden_size": 999}, "hidden_size: 999 cannot be shared out evenly among 32 heads"),
        ({"model_type": "gpt2", "n_embd": 999, "n_head": 10}, "n_embd: 999 cannot be shared out evenly among 10 heads"),
        ({"model_type": "llama", "intermediate_size": "wide"}, "intermediate_size"),
        ({"model_type": "llama", "rms_norm_eps": [1]}, "rms_norm_eps"),
    ],
)
def test_a_library_s_own_words_do_not_come_out(values, said):
    with pytest.raises(InputError, match=said) as error:
        shape.read(values)
    text = str(error.value)
    assert text.startswith(("model.config: ", "config.json: ")) and "\n" not in text
    assert not [
        word for word in ("alidation error", "validator", "ValueError", "TypeError", "pydantic") if word in text
    ]


def test_a_config_cannot_choose_kernels(tmp_path):
    def written(**values: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | values))

    written(_attn_implementation_internal="evil/kernel", attn_implementation="a/b")
    with pytest.raises(InputError, match="names code to be fetched"):
        shape.read_config(tmp_path)
    written(_attn_implementation_internal="paged_flash", attn_implementation="flash_attention_2")
    config = shape.read_config(tmp_path)
    assert "flash" not in str(config.to_dict()) and config._attn_implementation in (None, "sdpa", "eager")
    assert isinstance(config, type(AutoConfig.for_model("llama")))


def test_a_slip_in_a_recipe_s_config_is_named_and_older_keys_are_not():
    with pytest.raises(InputError) as error:
        shape.read({"model_type": "llama", "hiden_size": 64, "num_hiden_layers": 2})
    assert len(error.value.problems) == 2 and 'did you mean "hidden_size"?' in error.value.problems[0]
    shape.read_config({"model_type": "llama", "rope_theta": 1e4, "torch_dtype": "float32", "transformers_version": "4"})


def test_the_vocabulary_can_be_the_tokenizer_s():
    config = {**LLAMA_70B, "num_hidden_layers": 1}
    fewer = shape.read(config).parameters - shape.read(config, vocab_size=1000).parameters
    assert fewer == 2 * 8192 * (128256 - 1000)
