"""No secret reaches a message, a run folder or a saved model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hostile.planted import journey, secrets
from weitiao.errors import redact, say
from weitiao.runs import Run
from weitiao.weights.folders import whole

PLACES = (
    "{}",
    "api_key={}",
    '{{"api_key": "{}"}}',
    "password: {}",
    "Authorization: Bearer {}",
    "https://me:{}@example.org/x",
    "https://example.org/x?token={}&a=1",
    "error: {}: no such file",
    "access_token='{}',",
    '["{}"]',
    "hf_token={}\n",
    "a={}",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", list(secrets(0)))
def test_a_secret_is_hidden_by_its_shape_or_its_place(shape: str, place: str, monkeypatch: pytest.MonkeyPatch):
    value = secrets(1)[shape]
    for name in ("HF_TOKEN", "WEITIAO_TEST_API_KEY"):
        monkeypatch.setenv(name, secrets(1)[name])
    known = shape not in ("URL", "QUERY", "NESTED", "BEARER")  # words without a shape: their place tells
    if known or place not in ("{}", "error: {}: no such file", '["{}"]', "a={}"):
        assert value not in redact(place.format(value))


@pytest.mark.parametrize(
    "text",
    [
        "train.micro_batch_tokens: auto",
        "eos_token: </s>, pad_token: <unk>",
        '{"added_tokens": [{"content": "<|im_start|>"}]}',
        "https://huggingface.co/Qwen/Qwen2.5-0.5B/resolve/main/config.json",
        "tokens_per_second: 1234567890",
        "model.path=/models/hf_model",
        "sha256: " + "0123456789abcdef" * 4,
        "secret",
        "password",
        "mail me@example.org",
        "sk-learn",
        "transformer.encoder.layers.0.self_attention.query_key_value.weight",
        "data.tokenizer.special_tokens=[a]",
    ],
)
def test_what_is_no_secret_stays(text: str):
    assert redact(text) == text


def test_json_stays_json(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    values = {
        "api_key": "abc,def}ghi",
        "nested": [{"password": "x" * 20, "url": "https://a:b@c/d"}],
        "n": 1,
        "t": "hf_" + "a" * 30,
    }
    clean = json.loads(redact(json.dumps(values)))
    assert (
        clean["n"] == 1 and clean["t"] == "***" and clean["nested"][0] == {"password": "***", "url": "https://***@c/d"}
    )


def test_a_run_and_a_saved_folder_hold_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    value = secrets(2)["GITHUB"]
    run = Run.create(tmp_path / "run", {"model": {"config": {"api_key": "Ab" * 10}}, "note": value})
    run.log({"step": 1, "said": value})
    run.write("report.md", f"# {value}\n")
    with whole(tmp_path / "model", 0) as folder:
        (folder / "config.json").write_text(json.dumps({"token": value, "hidden_size": 8}))
    say("no such file: {path}", path=value)
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert value.encode() not in written and b"Ab" * 10 not in written and value not in capsys.readouterr().err
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {"token": "***", "hidden_size": 8}


def test_a_journey_through_training_a_crash_and_merging_leaves_none(tmp_path: Path):
    assert not journey(tmp_path, seed=7, failures=1)
