"""Secrets of twelve shapes planted where people have them, through fetching, training, a crash, resuming, merging and
exporting; then every byte that was written or printed, and every command line of a child, is searched for them.

    python -m tests.hostile.planted runs/soak-secrets 5     # seeds; resumable, results in results.jsonl

What is fetched is byte for byte what its owner published, so that is not searched: only what is written beside it.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.hub.server import Fault, serving
from weitiao.models import tiny

ROWS = 24


def secrets(seed: int) -> dict[str, str]:
    """Twelve secrets by their shape."""
    draw = random.Random(seed)

    def word(count: int, signs: str = string.ascii_letters + string.digits) -> str:
        return "".join(draw.choice(signs) for _ in range(count))

    hexadecimal = "0123456789abcdef"
    parts = "-".join(word(count, hexadecimal) for count in (8, 4, 4, 4, 12))
    jwt = ".".join(base64.urlsafe_b64encode(b'{"' + word(20).encode() + b'":1}').decode().rstrip("=") for _ in range(3))
    return {
        "HF_TOKEN": "hf_" + word(34),
        "WEITIAO_TEST_API_KEY": "plain" + word(24),
        "OPENAI": "sk-proj-" + word(40),
        "GITHUB": "ghp_" + word(36),
        "AWS": "AKIA" + word(16, string.ascii_uppercase + string.digits),
        "MODELSCOPE": "ms-" + parts,
        "JWT": jwt,
        "URL": "Pa" + word(14),
        "QUERY": "Qy" + word(20),
        "NESTED": "Ne" + word(20),
        "BEARER": "Be" + word(24),
        "SLACK": "xoxb-" + word(24, string.digits),
    }


def plant(folder: Path, planted: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
    """A base, rows and a recipe with the secrets in them: the recipe's path, and the environment."""
    published, base = folder / "given" / "base", folder / "given" / "fetched"
    tiny.make("llama", published)
    for name, values in {
        "config.json": {"api_key": planted["NESTED"], "origin": f"https://me:{planted['URL']}@example.org/model"},
        "tokenizer_config.json": {
            "hub_token": planted["OPENAI"],
            "extra": {"authorization": f"Bearer {planted['BEARER']}"},
        },
        "generation_config.json": {"source": f"https://example.org/x?token={planted['QUERY']}"},
    }.items():
        file = published / name
        old = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(old | values))
    rows = [{"prompt": f"问题 {n} {planted['JWT']}", "answer": f"回答 {planted['SLACK']}"} for n in range(ROWS)]
    (folder / "given" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": str(base)},
        "data": {"train": str(folder / "given" / "rows.jsonl"), "validation": 0.25, "max_length": 512},
        "method": {"name": "lora", "rank": 2},
        "train": {"epochs": 2, "batch_size": 2, "save_every": 2, "learning_rate": 1e-3},
        "output": str(folder / "run"),
    }
    text = f"# {planted['GITHUB']} {planted['AWS']}\n" + yaml.safe_dump(recipe)
    (folder / "given" / "recipe.yaml").write_text(text)
    environment = {"HF_TOKEN": planted["HF_TOKEN"], "WEITIAO_TEST_API_KEY": planted["WEITIAO_TEST_API_KEY"]}
    return folder / "given" / "recipe.yaml", os.environ | environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def journey(folder: Path, seed: int, failures: int | None = None) -> list[str]:
    """Fetch, train, be killed, resume, merge, export, and fail (so many times) on what holds a secret; where one was
    found then."""
    planted = secrets(seed)
    recipe, environment = plant(folder, planted)
    lines: list[str] = []
    program = [sys.executable, "-m", "weitiao"]
    fetched = fetch(folder, planted, [*program, "fetch"], environment)
    train = subprocess.Popen(
        [*program, "train", str(recipe)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 1800
    while train.poll() is None and time.monotonic() < end and not list((folder / "run").glob("checkpoints/step-*")):
        lines += children(train.pid)
        time.sleep(0.02)
    train.send_signal(signal.SIGKILL)
    printed = fetched + b"".join(train.communicate())
    url = f"https://me:{planted['URL']}@example.org/rows.jsonl?token={planted['QUERY']}"
    wrong: list[list[object]] = [
        ["train", f"data.train={url}", f"output={folder / 'none'}"],
        [
            "train",
            f"data.train={folder}/{planted['OPENAI']}",
            f"train.token={planted['GITHUB']}",
            f"output={folder / 'none'}",
        ],
        ["inspect", folder / planted["MODELSCOPE"]],
        ["inspect", folder / planted["AWS"]],
        ["eval", f"Authorization: Bearer {planted['BEARER']}"],
        ["chat", f"{planted['JWT']}", "--once", "hi"],
        ["inspect", folder / "merged"],
    ]
    for words in (
        ["train", "--resume", folder / "run"],
        ["merge", folder / "run", folder / "merged"],
        ["convert", folder / "merged" / "model.safetensors", folder / "exported.bin"],
        *wrong[:failures],
    ):
        done = subprocess.run([*program, *map(str, words)], env=environment, capture_output=True)
        printed += done.stdout + done.stderr
        if words[0] in ("merge", "convert") or words[:2] == ["train", "--resume"]:
            assert done.returncode == 0, done.stderr.decode()
    return found(folder, planted, printed, lines)


def fetch(folder: Path, planted: Mapping[str, str], program: list[str], environment: Mapping[str, str]) -> bytes:
    """Fetch the base from a hub that wants a token, behind a mirror with a password in its address, where a connection
    is cut and the first client killed; what was printed. The hub must have seen the token, and the mirror must not."""
    given = folder / "given"
    files = {file.name: file.read_bytes() for file in (given / "base").iterdir() if file.is_file()}
    with serving({"org/base": files}) as hub, serving({"org/base": files}) as mirror:
        hub.faults.extend([Fault("cut", 5000), Fault("status", value=503)])
        address = mirror.url.replace("://", f"://me:{planted['URL']}@")
        words = [*program, "org/base", "--to", str(given / "fetched"), "--mirror", address]
        own = {**environment, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        first = subprocess.Popen(words, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        end = time.monotonic() + 600
        while first.poll() is None and not hub.sent and time.monotonic() < end:
            time.sleep(0.01)
        first.kill()
        printed = b"".join(first.communicate())
        done = subprocess.run(words, env=own, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        keys = {key for _, _, key in hub.seen}, {key for _, _, key in mirror.seen}
    assert keys[0] == {f"Bearer {planted['HF_TOKEN']}"} and not any("Bearer" in key for key in keys[1]), "keys"
    (folder / "beside").mkdir()
    shutil.copytree(given / "fetched" / ".weitiao", folder / "beside" / "weitiao")
    return printed + done.stdout + done.stderr


def children(pid: int) -> list[str]:
    """The command lines of what a process started (nothing where there is no /proc)."""
    said = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                said.append((file.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except (OSError, ValueError, IndexError):
            continue
    return said


def found(folder: Path, planted: Mapping[str, str], printed: bytes, lines: list[str]) -> list[str]:
    """Where a secret is: in a file that was written, in what was printed, or on a command line."""
    hits = []
    for name, secret in planted.items():
        raw = secret.encode()
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and "given" not in path.parts):
            content = file.read_bytes()
            if zipfile.is_zipfile(file):
                content += b"".join(zipfile.ZipFile(file).read(entry) for entry in zipfile.ZipFile(file).namelist())
            hits += [f"{name} in {file.relative_to(folder)}"] if raw in content else []
        hits += [f"{name} printed"] if raw in printed else []
        hits += [f"{name} on a command line"] if any(secret in line for line in lines) else []
    return hits


def main(folder: Path, seeds: int) -> int:
    """Every seed that has no result yet; 1 if anything was found."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    with results.open("a") as file:
        for seed in range(seeds):
            if seed not in [row["seed"] for row in done]:
                done.append({"seed": seed, "hits": journey(folder / str(seed), seed)})
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
    hits = [hit for row in done for hit in row["hits"]]
    print(*hits, f"{len(done)} journeys, 12 shapes each: {len(hits)} hits", sep="\n")
    return 1 if hits else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/soak-secrets"), int((sys.argv[2:] or [3])[0])))
