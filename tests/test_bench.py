"""The common job: real runs on tiny models, and what bounds them counted by hand."""

from __future__ import annotations

import json
import statistics

import psutil
import pytest

from weitiao import bench, cli
from weitiao.errors import InputError
from weitiao.methods import METHODS
from weitiao.models import shape, tiny


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [{"role": "user", "content": "想找一家酒店"}, {"role": "assistant", "content": "好的，为您找到三家。"}]
    path.write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8") * 24, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    tiny.make("qwen2", folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "freeze", "full"])
def test_training_is_measured(capsys, rows, model, method):
    words = ["--shape", str(model), "--method", method, "--data", str(rows), "--steps", "4", "--json"]
    assert cli.main(["bench", "train", *words, "method.blocks=1" if method == "freeze" else "train.seed=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["losses"]) == found["steps"] == 4
    assert found["losses"][-1] < found["losses"][0]
    assert found["trained_tokens"] > 0 and found["tokens_per_second"] > 0
    assert found["peak_rss_bytes"] > 1 << 27
    assert found["first_step_after_seconds"] > 0
    part = found["tokens_per_second"] / found["roofline_tokens_per_second"]
    assert found["of_roofline"] == pytest.approx(part, abs=2e-3)


def test_busy_processes_end_with_the_block():
    before = set(psutil.Process().children())
    with bench.busy_beside(2):
        beside = set(psutil.Process().children()) - before
        assert len(beside) == 2 and all(one.is_running() for one in beside)
    assert not any(one.is_running() for one in beside)


def test_generation_is_measured(capsys, model):
    words = ["--shape", str(model), "--batch", "3", "--prompt-tokens", "9", "--new-tokens", "5", "--json"]
    assert cli.main(["bench", "generate", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == 3
    assert min(found[name] for name in ("tokens_per_second", "roofline_tokens_per_second", "peak_rss_bytes")) > 0


def test_the_limit_is_what_it_takes():
    """SmolLM2-135M: 30 blocks of 576 x (576 + 192 + 192 + 576) + 3 x 576 x 1536 weights, 49,152 tokens."""
    of = shape.read(bench.SHAPES["smollm2-135m"])
    block = 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536
    head = 576 * 49152

    def flops(method: str, **options: object) -> float:
        chosen = METHODS[method].model_validate({"name": method} | bench.JOB.get(method, {}) | options)
        return bench.flops_per_token(of, chosen, 0.5)

    assert flops("lora") == 4 * 30 * block + 4 * head / 2  # 481 million
    assert flops("freeze") == 6 * 2 * block + 4 * head / 2  # 99 million
    assert flops("full") == 6 * 30 * block + 6 * head / 2


def test_the_named_shapes_are_the_published_ones():
    sizes = {name: shape.read(config).parameters for name, config in bench.SHAPES.items()}
    assert sizes == {"smollm2-135m": 134_515_008, "qwen2.5-0.5b": 494_032_768}


def test_rows_are_as_long_as_chats_are():
    chats = list(bench.chats())
    lengths = [bench.TEMPLATE_TOKENS + sum(len(message.content) for message in chat.messages) for chat in chats]
    assert len(chats) == 1024
    assert statistics.median(lengths) == pytest.approx(175, rel=0.1)
    assert statistics.fmean(lengths) == pytest.approx(230, rel=0.1)
    assert max(lengths) <= 1020
    assert len({chat.messages[0].content for chat in chats}) > 1000


def test_a_named_shape_is_made_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = bench.SHAPES["smollm2-135m"] | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setitem(bench.SHAPES, "small", small | {"num_attention_heads": 4, "num_key_value_heads": 2})
    made = bench.folder("small")
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert bench.folder("small") == made and (made / "model.safetensors").stat().st_mtime_ns == stamp
    assert "random weights" in capsys.readouterr().err
    assert bench.training("small", steps=3, data=None)["steps"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--method", "lorra"], "lorra"), (["--shape", "no/such-folder/here"], "no/such-folder"), (["--steps", "2"], "3")],
)
def test_what_cannot_be_is_said(capsys, words, said):
    assert cli.main(["bench", "train", *words]) == 2
    assert said in capsys.readouterr().err


def test_another_trainer_runs_the_same_job(capsys, rows, model):
    pytest.importorskip("accelerate")
    words = ["--peer", "trainer", "--shape", str(model), "--data", str(rows), "--steps", "4", "--rounds", "1"]
    assert cli.main(["bench", "peers", *words, "--micro-batches", "8", "--json"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)
    assert [ours["engine"], theirs["engine"]] == ["weitiao", "trainer, 8"]
    assert theirs["runs"][0]["losses"][0] == pytest.approx(ours["runs"][0]["losses"][0], rel=0.02)


def test_a_peer_that_fails_says_why(rows, model):
    from weitiao.errors import RunError

    with pytest.raises(RunError, match="trainer, 8: "):
        bench.side_by_side(["trainer=/bin/false"], str(model), "lora", rows, 4, 1, ["8"])
    with pytest.raises(InputError) as found:
        bench.side_by_side(["nothere"], str(model), "lorra", rows, 4, 1, ["8", "three"])
    assert [word in str(found.value) for word in ("nothere", "lorra", "three")] == [True] * 3
