"""Files as programs write them, by seed: all of these must open."""

from __future__ import annotations

import json
import random
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.hostile import raw
from tests.hostile.case import OPENED, Case
from tests.hostile.folders import edited, folder_of
from weitiao.models import tiny
from weitiao.weights import gguf


def _state(draw: random.Random) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    kinds = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.int32,
    ]
    state: dict[str, Any] = OrderedDict()
    for number in range(draw.randrange(1, 12)):
        shape = [draw.randrange(0, 9) for _ in range(draw.randrange(0, 4))]
        tensor = torch.randn(shape, generator=generator).to(draw.choice(kinds))
        if draw.random() < 0.2 and tensor.ndim > 1:
            tensor = tensor.transpose(0, 1)
        if draw.random() < 0.2 and tensor.is_floating_point():
            tensor = torch.nn.Parameter(tensor)
        state[draw.choice(("层", "layers.", "модель.", "a b ")) + str(number)] = tensor
    if draw.random() < 0.3:
        state["tied"] = next(iter(state.values()))
    return state


def valid(seed: int) -> list[Case]:
    """Files as programs write them: all of these must open."""
    draw, made = random.Random(f"{seed} valid"), []

    def add(name: str, file: str, content: bytes, how: str = "convert") -> None:
        made.append(Case(f"valid, {name}", {file: content}, how, OPENED, file))

    for number in range(16):
        add(f"torch.save {number}", draw.choice(("x.bin", "x.pt", "x.pth")), raw.saved(_state(draw)))
        add(f"torch.save of old {number}", "x.bin", raw.saved(_state(draw), _use_new_zipfile_serialization=False))
    for number in range(10):
        layer = torch.nn.Linear(3, 4)
        optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        tree = {
            "state_dict": layer.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "epoch": number,
            "rng": torch.get_rng_state(),
        }
        tree |= {
            "pytorch-lightning_version": "2.4.0",
            "callbacks": {"a": {"best": torch.tensor(1.0)}},
            "numpy": np.random.get_state()[:1],
        }
        tree |= {
            "score": np.float64(0.5),
            "hyper_parameters": OrderedDict(lr=0.1, sizes=(1, 2), names={"a", "b"}),
            "device": torch.device("cpu"),
        }
        add(
            f"Lightning {number}",
            "x.ckpt",
            raw.saved(tree if number % 2 else {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}),
        )
    for number in range(12):
        state = {name: tensor.detach().contiguous() for name, tensor in _state(draw).items() if name != "tied"}
        from safetensors.torch import save

        add(f"safetensors {number}", "x.safetensors", save(state, {"format": "pt"} if number % 2 else None))
    for dtype in ("F32", "F16", "BF16", *gguf.BLOCKS):
        for number in range(2):
            _, elements, size = next(value for value in gguf.TYPES.values() if value[0] == dtype)
            content = bytes(2 * elements * size * 2) if elements == 1 else raw.blocks(dtype, 4, seed=number).tobytes()
            shape = (2, 2 * elements) if elements > 1 else (4, 1)
            values = {
                "general.architecture": "llama",
                "llama.context_length": 2048,
                "scores": [0.5, 1.5],
                "tokens": ["a", "好"],
                "flag": True,
            }
            add(f"GGUF {dtype} {number}", "x.gguf", raw.gguf_file(values, {"w": (dtype, shape, content[: 4 * size])}))
    for dtype in ("Q2_K", "IQ4_NL", "MXFP4"):
        _, elements, size = next(value for value in gguf.TYPES.values() if value[0] == dtype)
        add(f"GGUF {dtype}", "x.gguf", raw.gguf_file({}, {"w": (dtype, (1, elements), bytes(size))}), "inspect")
    for family in tiny.FAMILIES:
        files = folder_of(family)
        made.append(Case(f"valid, folder {family}", files, "load", OPENED))
        made.append(Case(f"valid, tokenizer {family}", files, "tokenizer", OPENED))
        if "chat_template.jinja" in files:
            made.append(Case(f"valid, template {family}", files, "render", OPENED))
    base = folder_of()
    state = {}
    with tempfile.TemporaryDirectory() as place:
        from safetensors.torch import load_file

        (path := Path(place) / "m").write_bytes(base["model.safetensors"])  # type: ignore[arg-type]
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    rest = {name: content for name, content in base.items() if name != "model.safetensors"}
    names = sorted(state)
    for number in range(3):
        shards = {f"pytorch_model-{part}.bin": names[part :: number + 1] for part in range(number + 1)}
        index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
        files = {file: raw.saved({name: state[name] for name in inside}) for file, inside in shards.items()}
        made.append(
            Case(
                f"valid, {number + 1} shards",
                rest | files | {"pytorch_model.bin.index.json": json.dumps(index).encode()},
                "load",
                OPENED,
            )
        )
    for key, value in (
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}),
        ("_attn_implementation", "flash_attention_2"),
        ("attn_implementation", "sdpa"),
        ("trust_remote_code", True),
        ("_name_or_path", "/home/someone/model"),
        ("transformers_version", "4.31.0"),
        ("tokenizer_file", "/root/x"),
    ):
        made.append(Case(f"valid, config with {key}", edited(base, "config.json", **{key: value}), "load", OPENED))
    return made
