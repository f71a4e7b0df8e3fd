"""Tiny models: complete folders, the same bytes every time, each family's own traits."""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from weitiao.errors import InputError
from weitiao.models import tiny

USER = {"role": "user", "content": "你好"}
ANSWER = {"role": "assistant", "content": "您好！"}
TOOLS: Any = [{"type": "function", "function": {"name": "search_hotels", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folder_is_complete_and_the_same_every_time(family, tmp_path):
    first, again = tiny.make(family, tmp_path / "a", seed=3), tiny.make(family, tmp_path / "b", seed=3)
    names = sorted(path.name for path in first.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    assert ("chat_template.jinja" in names) == (tiny.FAMILIES[family].template is not None)
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    other = tiny.make(family, tmp_path / "c", seed=4)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokenizer_keeps_any_text(family, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.make(family, tmp_path))
    text = "酒店 hotel 😀\n\t~ naïve 12.5%"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == (text.lower() if family == "bert" else text)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "mistral", "glm", "glm4", "qwen3_moe"])
def test_tools_are_in_the_prompt(family):
    tokenizer = tiny.make_tokenizer(family)
    text = tokenizer.apply_chat_template([USER], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert "search_hotels" in text and "你好" in text


def test_llama_has_no_tools_and_gemma_no_system_turn():
    llama, gemma = tiny.make_tokenizer("llama"), tiny.make_tokenizer("gemma")
    assert "search_hotels" not in llama.apply_chat_template([USER], tools=TOOLS, tokenize=False)
    with pytest.raises(Exception, match="no system turn"):
        gemma.apply_chat_template([{"role": "system", "content": "x"}, USER], tokenize=False)


def test_qwen3_thinks_in_the_last_turn_only():
    text: Any = tiny.make_tokenizer("qwen3").apply_chat_template([USER, ANSWER, USER, ANSWER], tokenize=False)
    assert text.count("<think>\n\n</think>") == 1
    assert text.index("<think>") > text.rindex("<|im_start|>user")


def test_phi3_closes_a_finished_conversation_only():
    tokenizer = tiny.make_tokenizer("phi3")
    assert str(tokenizer.apply_chat_template([USER, ANSWER], tokenize=False)).endswith("<|end|>\n<|endoftext|>")
    prompt = str(tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True))
    assert prompt.endswith("<|end|>\n<|assistant|>\n")


def test_sizes_can_be_chosen_and_unknown_families_are_named(tmp_path):
    folder = tiny.make("llama", tmp_path, num_hidden_layers=4)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4
    assert tiny.make("bert").config.model_type == "bert"
    with pytest.raises(InputError, match="qwen2, qwen3"):
        tiny.make("lama")
