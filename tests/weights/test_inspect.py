"""Headers without loading, and what is said of folders that are not whole."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from weitiao.cli import main
from weitiao.errors import InputError
from weitiao.models import tiny
from weitiao.weights import inspect
from weitiao.weights.header import read_header


@pytest.fixture
def folder(tmp_path):
    return tiny.make("llama", tmp_path / "llama")


@pytest.fixture
def sharded(folder):
    """The same model in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:8], "model-00002-of-00002.safetensors": names[8:]}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / file, {"format": "pt"})
    where = {name: file for file, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_headers_are_what_is_stored(folder, sharded):
    found = {tensor.name: tensor for tensor in inspect.headers(sharded)}
    model = tiny.make("llama")
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in found.items()
    }
    assert sum(tensor.parameters for tensor in found.values()) == sum(p.numel() for p in model.parameters())
    one = found["model.layers.0.mlp.up_proj.weight"]
    data = (sharded / one.file).read_bytes()[one.start : one.start + one.bytes]
    values = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(one.shape)
    assert torch.equal(values, model.state_dict()[one.name])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "header is said"),
        (b"\x00" * 4, "header is said"),
        (raw({}, length=2**62), "header is said"),
        (raw({}, length=200_000_000), "header is said"),
        (raw(b"not json"), "not JSON"),
        (raw(b"[" * 100_000), "not JSON"),
        (raw([1]), "not a JSON object"),
        (raw({"a": {"dtype": "F32", "shape": [2]}}), "a: dtype, shape"),
        (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "4 bytes are not F32"),
        (raw({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "cannot be"),
        (raw({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "cannot be"),
        (raw({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"), "cannot be"),
        (raw({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}), "cut short"),
        (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"), "4 bytes follow"),
        (
            raw(
                {n: {"dtype": "U8", "shape": [4], "data_offsets": [b, b + 4]} for n, b in (("a", 0), ("b", 2))},
                b"123456",
            ),
            "overlap",
        ),
        (
            raw({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, b"1234"),
            "overlap another tensor's or leave a gap",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
    ],
)
def test_a_file_that_contradicts_itself(content, said, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_header(path)


def test_an_empty_tensor_is_sound(tmp_path):
    save_file({"none": torch.zeros(0, 4), "one": torch.ones(1)}, tmp_path / "x.safetensors")
    assert [tensor.shape for tensor in read_header(tmp_path / "x.safetensors")] == [(0, 4), (1,)]


def test_a_whole_folder_passes(folder):
    inspect.check_folder(folder, with_tokenizer=True)


def test_everything_that_is_missing_is_named_at_once(sharded):
    (sharded / "model-00001-of-00002.safetensors").unlink()
    (sharded / "config.json").unlink()
    (sharded / "tokenizer.json").unlink()
    second = sharded / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-100])
    (sharded / "model-00001-of-00002.safetensors.incomplete").write_bytes(b"x")
    with pytest.raises(InputError) as error:
        inspect.check_folder(sharded, with_tokenizer=True)
    said = "\n".join(error.value.problems)
    assert len(error.value.problems) == 5
    for part in (
        "config.json: missing",
        "no tokenizer",
        "00001-of-00002.safetensors: missing",
        "cut short",
        ".incomplete",
    ):
        assert part in said


def test_no_folder_no_weights_an_adapter(folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        inspect.check_folder(tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        inspect.check_folder(folder)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(InputError, match="an adapter of some/base"):
        inspect.check_folder(tmp_path)


def test_an_index_cannot_name_files_outside(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="outside its folder"):
        inspect.check_folder(sharded)


def test_torch_files_that_are_cut_short(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    inspect.check_folder(folder)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cut short"):
        inspect.check_folder(folder)


def test_the_verb(sharded, capsys):
    assert main(["inspect", str(sharded), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = tiny.make("llama")
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) and found["tensors"] == 21
    assert found["parameters_by_dtype"] == {"F32": found["parameters"]} and found["tied_embeddings"] is False
    assert len(found["files"]) == 2 and not found["missing"] and not found["duplicates"] and not found["unlisted"]
    assert found["largest"][0]["shape"] == [448, 64]
    (sharded / "model-00001-of-00002.safetensors").unlink()
    (sharded / "tokenizer.json").unlink()
    assert main(["inspect", str(sharded), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["missing"]) == 2 and found["unlisted"]
    assert main(["inspect", str(sharded)]) == 0
    assert "00001-of-00002" in capsys.readouterr().out
    assert main(["inspect", str(sharded / "nothing")]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_verb_on_an_adapter(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny.make("llama"), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert main(["inspect", str(tmp_path), "--json"]) == 0  # a run's folder
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "adapter" and found["parameters"] == 2 * (64 * 4 + 4 * 64) and found["missing"] == []


def test_the_bytes_of_weights_are_known_for_bin_files_too(folder):
    wanted = sum(tensor.bytes for tensor in inspect.headers(folder))
    assert inspect.weight_bytes(folder) == wanted
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert inspect.weight_bytes(folder) == pytest.approx(wanted, rel=0.1)
