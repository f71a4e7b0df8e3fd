"""Shared by every test: one thread per process, no network, English messages, and a tiny model folder."""

from __future__ import annotations

import os
from pathlib import Path

# Set before torch and huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", LC_ALL="C.UTF-8")

import pytest
from hypothesis import settings

settings.register_profile("weitiao", deadline=None)  # no test fails because the machine is slow
settings.load_profile("weitiao")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, its tokenizer and a chat template; tests only read it."""
    from weitiao.models import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.make("llama", folder)
    return folder


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages in Chinese for one test."""
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
