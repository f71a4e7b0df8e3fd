"""The page without abstractions and the real loop are the same training."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.support import losses, train
from weitiao.data.batch import Example
from weitiao.data.render import Renderer
from weitiao.data.rows import Chat, Message
from weitiao.methods import METHODS
from weitiao.methods.io import open_model
from weitiao.models import tiny

PAGE = Path(__file__).parents[2] / "examples" / "sft_loop.py"


def test_the_page_and_the_loop_agree(tmp_path):
    folder = tiny.make("qwen2", tmp_path / "base")
    chats = [
        [{"role": "user", "content": f"酒店 {n}?"}, {"role": "assistant", "content": "好的。" * (n + 1)}]
        for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    page = runpy.run_path(str(PAGE))
    there = page["main"](str(folder), str(tmp_path / "rows.jsonl"), str(tmp_path / "out"))

    base = open_model(folder, dtype="float32")
    renderer = Renderer.of(base.tokenizer)
    rendered = [renderer.render(Chat(tuple(Message(**message) for message in chat))) for chat in chats]
    examples = [
        Example(torch.tensor(r.ids).int().numpy(), torch.tensor(r.mask).numpy(), str(n)) for n, r in enumerate(rendered)
    ]
    options = {
        "epochs": page["EPOCHS"],
        "batch_size": page["BATCH_SIZE"],
        "learning_rate": page["LEARNING_RATE"],
        "warmup_steps": page["WARMUP_STEPS"],
        "max_grad_norm": page["MAX_GRAD_NORM"],
        "seed": page["SEED"],
    }
    method = METHODS["full"]()
    _, model, run = train(tmp_path / "run", examples, model=(method.attach(base.model), method), options=options)
    assert losses(run) == pytest.approx(there, rel=1e-4)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in saved:
            torch.testing.assert_close(tensor, saved[name], rtol=1e-3, atol=1e-5)
