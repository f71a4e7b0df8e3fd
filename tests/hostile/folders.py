"""Hostile model folders: configurations, tokenizers, chat templates, adapters, links and code."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.hostile import raw
from tests.hostile.case import EITHER, Case
from tests.hostile.pickled import GADGETS, argument, call
from weitiao.models import tiny


def folder_of(family: str = "llama") -> dict[str, bytes | Path]:
    """The files of a tiny model."""
    with tempfile.TemporaryDirectory() as place:
        tiny.make(family, Path(place) / "m")
        return {file.name: file.read_bytes() for file in sorted((Path(place) / "m").iterdir()) if file.is_file()}


def edited(files: dict[str, bytes | Path], name: str, **values: Any) -> dict[str, bytes | Path]:
    """The files with other values in one of them."""
    old = files.get(name, b"{}")
    assert isinstance(old, bytes)
    return files | {name: json.dumps(json.loads(old) | values).encode()}


def configurations(draw: random.Random) -> Iterator[Case]:
    """Model folders whose config.json, index, links or code would lead elsewhere."""
    base = folder_of()
    evil = b"open('CANARY', 'w')\n"
    for key in (
        "_attn_implementation_internal",
        "_attn_implementation",
        "attn_implementation",
        "_experts_implementation",
    ):
        for value in ("someone/kernels", "someone/kernels:evil.run", {"": "someone/kernels@main"}):
            yield Case(f"config, {key}={value}", edited(base, "config.json", **{key: value}), "load")
    yield Case(
        "config, a kernel within", edited(base, "config.json", text_config={"attn_implementation": "a/b"}), "load"
    )
    for kind in ("evil", "../evil", "llama/../evil", "chatglm", ["llama"], {"a": 1}, None, 7):
        values = {
            "model_type": kind,
            "auto_map": {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
        }
        files = edited(base, "config.json", **values) | {"modeling_evil.py": evil, "configuration_evil.py": evil}
        yield Case(f"config, model_type {kind}", files, "load")
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1 << 40,
        "hidden_size": -1,
        "vocab_size": 0,
        "num_attention_heads": "many",
    }
    for key, value in (sizes | {"quantization_config": {"quant_method": "evil"}, "hidden_size ": 1}).items():
        if key.strip() == key:
            yield Case(f"config, {key}={value}", edited(base, "config.json", **{key: value}), "load")
    texts = {
        "no JSON": b"{",
        "a list": b"[]",
        "brackets": b'{"a":' + b"[" * 100_000,
        "lists": b'{"a":[' + b"[]," * 4_000_000 + b"0]}",
        "17 MiB": b" " * (17 << 20),
        "UTF-16": b"\xff\xfe{\0}\0",
        "digits": b'{"a":' + b"9" * 100_000 + b"}",
        "nothing": b"",
    }
    for name, text in texts.items():
        yield Case(f"config, {name}", base | {"config.json": text}, "load")
    nested: Any = {}
    for _ in range(300):
        nested = {"a": nested}
    yield Case("config, nested", edited(base, "config.json", text_config=nested), "load")
    weights = base["model.safetensors"]
    rest = {name: content for name, content in base.items() if name != "model.safetensors"}
    for name in (
        "../out.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "C:\\x",
        "a\\..\\b",
        "~/x",
        "x\0y",
    ):
        index = json.dumps({"weight_map": {"lm_head.weight": name}}).encode()
        for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            yield Case(f"index, {name!r} in {file}", rest | {file: index}, "load")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        for target in ("/etc/passwd", "../../secret", "/proc/self/environ"):
            yield Case(f"link, {name} to {target}", {**base, name: Path(target)}, "load")
    for file in ("pytorch_model.bin",):
        for name in draw.sample(GADGETS, 6):
            yield Case(f"folder with gadget {name}", rest | {file: raw.torch_zip(call(name, argument(name)))}, "load")
    code = dict.fromkeys(
        (
            "modeling_llama.py",
            "configuration_llama.py",
            "tokenization_llama.py",
            "custom_generate/generate.py",
            "__init__.py",
            "conftest.py",
            "sitecustomize.py",
            "setup.py",
            "modeling_evil.py",
        ),
        evil,
    )
    remote = {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "other/repo--modeling_evil.Evil"},
        "trust_remote_code": True,
    }
    yield Case("code beside known classes", edited(base, "config.json", **remote) | code, "load", EITHER)
    own = edited(
        base, "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]}, tokenizer_class="Evil"
    )
    yield Case("code of a tokenizer", own | code, "tokenizer", EITHER)
    without = {name: content for name, content in own.items() if name != "tokenizer.json"}
    yield Case("code of a tokenizer without a file", without | code, "tokenizer")
    assert isinstance(weights, bytes)
    yield Case("a folder cut short", base | {"model.safetensors": weights[:-4]}, "load")


def tokenizers(draw: random.Random) -> Iterator[Case]:
    """tokenizer.json and its neighbours."""
    base = folder_of()
    text = base["tokenizer.json"]
    assert isinstance(text, bytes)
    values = json.loads(text)
    model = values["model"]
    split = lambda pattern: {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}  # noqa: E731
    replace = lambda content: {"type": "Replace", "pattern": {"String": "a"}, "content": content}  # noqa: E731
    token = {
        "id": 0,
        "content": "x",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    nested: Any = {"type": "Lowercase"}
    for _ in range(120):
        nested = {"type": "Sequence", "normalizers": [nested]}
    pad = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x", "pad_to_multiple_of": None}
    wrong: dict[str, Any] = {
        "padding to 10^9": {"padding": pad | {"strategy": {"Fixed": 10**9}}},
        "padding to -1": {"padding": pad | {"strategy": {"Fixed": -1}}},
        "padding to multiples of 10^9": {"padding": pad | {"strategy": "BatchLongest", "pad_to_multiple_of": 10**9}},
        "cut to 10^12": {
            "truncation": {"max_length": 10**12, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        },
        "(a+)+": {"pre_tokenizer": split("(a+)+$")},
        "(.*)*": {"pre_tokenizer": split("(.*)*x")},
        "(a|a)+ in +": {"normalizer": replace("b") | {"pattern": {"Regex": "(x+x+)+y"}}},
        "a long pattern": {"pre_tokenizer": split("a|" * 20_000)},
        "growing": {"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 1000)] * 3}},
        "a megabyte for a letter": {"normalizer": replace("a" * (1 << 20))},
        "nested": {"normalizer": nested},
        "an id of 2^40": {"added_tokens": [token | {"id": 1 << 40}]},
        "a negative id": {"added_tokens": [token | {"id": -1}]},
        "tokens that are texts": {"added_tokens": ["x"]},
        "tokens that are a table": {"added_tokens": {"a": 1}},
        "an id of words": {"model": model | {"vocab": {"a": "b"}}},
        "ids of 2^63": {"model": model | {"vocab": {"a": 1 << 63}}},
        "no model": {"model": None},
        "a model that is a list": {"model": []},
        "words of 10^12": {"model": model | {"max_input_chars_per_word": 10**12}},
        "an unknown model": {"model": {"type": "Evil"}},
        "a template of 10^5 parts": {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100_000,
                "pair": [],
                "special_tokens": {},
            }
        },
    }
    for name, value in wrong.items():
        yield Case(
            f"tokenizer.json, {name}", base | {"tokenizer.json": json.dumps(values | value).encode()}, "tokenizer"
        )
    texts = {
        "no JSON": b"{",
        "a list": b"[]",
        "brackets": b'{"model":' + b"[" * 200_000,
        "lists": b'{"model":[' + b"[]," * 4_000_000 + b"0]}",
        "too large": b" " * ((128 << 20) + 1),
    }
    for name, content in texts.items():
        yield Case(f"tokenizer.json, {name}", base | {"tokenizer.json": content}, "tokenizer")
    for key, value in (
        ("fast_tokenizer_files", ["../tokenizer.9.json"]),
        ("vocab_file", "../../etc/passwd"),
        ("added_tokens_decoder", {"-1": {}}),
        ("added_tokens_decoder", {"9" * 30: {}}),
        ("added_tokens_decoder", ["a"]),
    ):
        yield Case(
            f"tokenizer_config.json, {key}={value}", edited(base, "tokenizer_config.json", **{key: value}), "tokenizer"
        )
    rest = {name: content for name, content in base.items() if name != "tokenizer.json"}
    for _ in range(6):
        content = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 2000)))
        yield Case(f"tokenizer.model, {len(content)} random bytes", rest | {"tokenizer.model": content}, "tokenizer")


def templates(draw: random.Random) -> Iterator[Case]:
    """Chat templates that run on, fill the memory, or try to get out."""
    from tests.data.test_sandbox import BAD

    base = folder_of()
    way_out = (
        "{{ self._TemplateReference__context.environment }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ range.__self__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('touch CANARY') }}",
        "{{ joiner.__init__ }}",
        "{{ dict.__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ namespace(a=1).__class__.__mro__ }}",
        "{{ ((''|string).format).__globals__ }}",
        "{{ raise_exception.__closure__ }}",
        "{% set x = namespace() %}{% set x.__class__ = 1 %}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% macro m() %}{{ m.__globals__ }}{% endmacro %}{{ m() }}",
        "{{ strftime_now.__self__ }}",
        "{{ {}.__class__.__bases__ }}",
    )
    for name, text in BAD.items():
        yield Case(f"template, {name}", base | {"chat_template.jinja": text.encode()}, "render")
    for text in way_out:
        yield Case(f"template, {text[:60]}", base | {"chat_template.jinja": text.encode()}, "render", EITHER)


def adapters(draw: random.Random) -> Iterator[Case]:
    """Adapter folders whose description would import, or run on."""
    base = {"peft_type": "LORA", "base_model_name_or_path": "weitiao-tiny-zh", "r": 4, "target_modules": ["q_proj"]}
    weights = raw.safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    for name, values in {
        "megatron": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        "a pattern": {"target_modules": "(.*)*x"},
        "a pattern of ranks": {"rank_pattern": {"(a+)+$": 4}},
        "no kind": {"peft_type": None},
        "another kind": {"peft_type": "EVIL"},
        "no base": {"base_model_name_or_path": None},
        "a base outside": {"base_model_name_or_path": "../../../nothing/here"},
        "a base that is a command": {"base_model_name_or_path": "; touch CANARY"},
    }.items():
        files = {"adapter_config.json": json.dumps(base | values).encode(), "adapter_model.safetensors": weights}
        yield Case(f"adapter, {name}", files, "open")
    pickled = raw.torch_zip(call("os.system", "touch CANARY"))
    yield Case(
        "adapter, a pickle", {"adapter_config.json": json.dumps(base).encode(), "adapter_model.bin": pickled}, "open"
    )
    cut = {"adapter_config.json": json.dumps(base).encode(), "adapter_model.safetensors": weights[:-1]}
    yield Case("adapter, cut", cut, "open")
