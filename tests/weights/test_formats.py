"""Files of tensors of every form: described as they are, read as torch reads them, and never run."""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hostile import raw
from weitiao.cli import main
from weitiao.errors import InputError
from weitiao.weights import bounded, child, formats, gguf
from weitiao.weights.convert import convert


def state() -> dict[str, torch.Tensor]:
    """Tensors of many types and layouts: views, a tied one, one without elements, a number."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    return {
        "base": base, "turned": base.t(), "tied": base, "window": base[1:3, 2:5], "number": torch.tensor(3.0),
        "wide": torch.ones(3, dtype=torch.float64), "half": torch.randn(2, 2, generator=generator).half(),
        "brain": torch.randn(3, generator=generator).bfloat16(), "ids": torch.arange(5), "none": torch.zeros(0, 4),
        "yes": torch.tensor([True, False]), "small": torch.arange(4, dtype=torch.int8),
    }  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
def test_a_pickled_file_is_read_as_torch_wrote_it(tmp_path: Path, old: bool):
    file = tmp_path / "x.bin"
    torch.save(state(), file, _use_new_zipfile_serialization=not old)
    tensors = formats.Tensors(file)
    assert list(tensors) == list(state())
    for name, tensor in state().items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ""])
@pytest.mark.parametrize("source", ["x.bin", "x.ckpt", "x.safetensors"])
def test_every_form_becomes_every_other(tmp_path: Path, source: str, suffix: str):
    if source.endswith(".safetensors"):
        save_file({name: tensor.clone().contiguous() for name, tensor in state().items()}, tmp_path / source)
    else:
        tree = {"state_dict": state(), "pytorch-lightning_version": "2.1"} if source.endswith(".ckpt") else state()
        torch.save(tree, tmp_path / source)
    made = convert(tmp_path / source, tmp_path / f"out{suffix}")
    found = load_file(made / "model.safetensors") if not suffix else formats.Tensors(made)
    assert set(found) == set(state())
    for name, tensor in state().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    if suffix in (".bin", ".pt", ".pth"):  # and torch's own restricted reader agrees
        assert torch.load(made, weights_only=True).keys() == state().keys()


def test_what_a_checkpoint_holds_beside_its_weights_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    tree = {
        "pytorch-lightning_version": "2.1.0", "state_dict": layer.state_dict(), "epoch": 3,
        "optimizer_states": [optimizer.state_dict()], "hyper_parameters": argparse.Namespace(lr=1e-3, api_key="s3cret"),
    }  # fmt: skip
    torch.save(tree, tmp_path / "epoch=3.ckpt")
    convert(tmp_path / "epoch=3.ckpt", tmp_path / "out.safetensors")
    said = capsys.readouterr().err
    assert "Lightning checkpoint (state_dict)" in said and "epoch (3)" in said
    assert "optimizer_states (6 tensors, 128 bytes)" in said and "hyper_parameters (Namespace, 2 entries)" in said
    assert "s3cret" not in said
    assert torch.equal(load_file(tmp_path / "out.safetensors")["weight"], layer.weight)
    assert main(["inspect", str(tmp_path / "epoch=3.ckpt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"]["epoch"] == "3"


def test_a_bin_folder_becomes_a_folder_of_safetensors(tiny_llama: Path, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            os.link(file, source / file.name)
    tensors = load_file(tiny_llama / "model.safetensors")
    torch.save(tensors, source / "pytorch_model.bin")
    made = convert(source, tmp_path / "made", "float16")
    found = load_file(made / "model.safetensors")
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in tensors.items())
    assert (made / "config.json").is_file() and (made / "tokenizer.json").is_file()


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def numbers(dtype: str, block: bytes) -> list[float]:
    """One block by the definitions of ggml-common.h, number by number."""
    half = lambda place: struct.unpack_from("<e", block, place)[0]  # noqa: E731
    nibble = lambda data, i: data[i % 16] & 15 if i < 16 else data[i - 16] >> 4  # noqa: E731
    if dtype == "Q8_0":
        return [half(0) * code for code in struct.unpack_from("32b", block, 2)]
    if dtype in ("Q4_0", "Q4_1"):
        start = 2 if dtype == "Q4_0" else 4
        codes = [nibble(block[start:], i) for i in range(32)]
        return [half(0) * (code - 8) if start == 2 else half(0) * code + half(2) for code in codes]
    if dtype in ("Q5_0", "Q5_1"):
        start = 2 if dtype == "Q5_0" else 4
        (bits,) = struct.unpack_from("<I", block, start)
        codes = [nibble(block[start + 4 :], i) | (bits >> i & 1) << 4 for i in range(32)]
        return [half(0) * (code - 16) if start == 2 else half(0) * code + half(2) for code in codes]
    if dtype == "Q6_K":
        out = []
        for i in range(256):
            part, row, column = i // 128, i % 128 // 32, i % 32
            low = block[64 * part + 32 * (row % 2) + column]
            low = low & 15 if row < 2 else low >> 4
            code = (low | (block[128 + 32 * part + column] >> 2 * row & 3) << 4) - 32
            scale = struct.unpack_from("16b", block, 192)[i // 16]
            out.append(half(208) * scale * code)
        return out
    out, start = [], 16 if dtype == "Q4_K" else 48
    for i in range(256):
        group, column = i // 32, i % 32
        if group < 4:
            scale, least = block[4 + group] & 63, block[8 + group] & 63
        else:
            scale = block[8 + group] & 15 | block[group] >> 6 << 4
            least = block[8 + group] >> 4 | block[4 + group] >> 6 << 4
        code = block[start + 32 * (group // 2) + column]
        code = code & 15 if group % 2 == 0 else code >> 4
        if dtype == "Q5_K":
            code |= (block[16 + column] >> group & 1) << 4
        out.append(half(0) * scale * code - half(2) * least)
    return out


@pytest.mark.parametrize("dtype", list(gguf.BLOCKS))
def test_blocks_are_the_numbers_they_stand_for(dtype: str):
    blocks = raw.blocks(dtype, 20, seed=3)
    wanted = np.array([numbers(dtype, bytes(block)) for block in blocks])
    np.testing.assert_allclose(gguf.dequantize(dtype, blocks), wanted, rtol=1e-5, atol=1e-5)


def test_a_gguf_file_is_described_and_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    blocks = raw.blocks("Q4_K", 6, seed=5)
    tensors = {
        "plain.weight": ("F32", (4, 64), rows.tobytes()), "half.weight": ("F16", (4, 64), rows.astype("<f2").tobytes()),
        "coded.weight": ("Q4_K", (3, 512), blocks.tobytes()),
    }  # fmt: skip
    values = {"general.architecture": "llama", "llama.block_count": 1, "tokenizer.ggml.tokens": ["<s>", "好"]}
    file = tmp_path / "m.gguf"
    file.write_bytes(raw.gguf_file(values, tensors))
    found = formats.Tensors(file)
    assert found.found.holds == "llama" and found.found.left_out == {"tokenizer.ggml.tokens": "[2]"}
    assert torch.equal(found["plain.weight"], torch.from_numpy(rows)) and found["half.weight"].dtype == torch.float16
    made = load_file(convert(file, tmp_path / "out.safetensors"))
    assert made["coded.weight"].shape == (3, 512)
    assert made["coded.weight"].flatten().tolist() == gguf.dequantize("Q4_K", blocks).flatten().tolist()
    assert "left out: tokenizer.ggml.tokens ([2])" in capsys.readouterr().err
    with pytest.raises(InputError, match="is not written"):
        convert(file, tmp_path / "again.gguf")


# ---- limits --------------------------------------------------------------------------------------------------------


def test_a_pickle_that_takes_for_ever_is_ended(tmp_path: Path):
    doubled = b"\x80\x02)" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
    (tmp_path / "x.bin").write_bytes(
        raw.torch_zip(b"\x80\x02}" + doubled[2:] + b"K\x01s.")
    )  # hashing it takes 2^60 steps
    with pytest.raises(InputError, match="more memory or time"):
        formats.describe(tmp_path / "x.bin")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on a process's memory")
def test_a_pickle_that_takes_all_memory_is_ended(tmp_path: Path):
    grown = b"\x80\x02]q\x00(" + b"]" * 20_000_000 + b"e."
    (tmp_path / "x.bin").write_bytes(raw.torch_zip(grown))
    with pytest.raises(InputError, match="more memory or time"):
        formats.describe(tmp_path / "x.bin")


def test_the_child_sees_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    seen = {}
    monkeypatch.setattr(child.subprocess, "Popen", lambda command, **options: seen.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        child.run(Path(__file__))
    assert "HF_TOKEN" not in seen["env"]


def test_json_that_would_fill_the_memory_is_not_read(tmp_path: Path):
    (tmp_path / "config.json").write_bytes(b'{"a": [' + b"[]," * 4_000_000 + b"[]]}")
    with pytest.raises(InputError, match="of memory"):
        bounded.json_object(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b" " * (17 << 20))
    with pytest.raises(InputError, match="more than such a file has"):
        bounded.json_object(tmp_path / "config.json")
