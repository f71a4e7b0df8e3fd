"""How fast this machine trains and answers, beside what it could do at most: the common job, one engine at a time.

    weitiao bench train --shape smollm2-135m --steps 32 --json
    weitiao bench generate --shape qwen2.5-0.5b --batch 8
    weitiao bench train --shape runs/mine/model --method freeze --data rows.jsonl train.engine=plain
    weitiao bench peers --peer trainer --peer unsloth=../unsloth/bin/python

The job: LoRA of rank 8 on every linear, AdamW, 8 rows a step, answers only, on rows of the lengths that chats have.
Training goes the way of ``weitiao train``, with nothing left out; named shapes have random weights, which are as fast
as any. What bounds it is counted in the open: multiplications with weights at the measured rate of matrix products.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weitiao import machine
from weitiao.data.messages import as_dicts
from weitiao.data.rows import Chat, Message
from weitiao.errors import InputError, RunError, say, t
from weitiao.evaluate.compare import markdown
from weitiao.machine.speed import cache_folder
from weitiao.methods import METHODS
from weitiao.plan.report import size
from weitiao.runs import write_atomic
from weitiao.weights.fetch import resolve

if TYPE_CHECKING:
    from weitiao.methods.base import Method
    from weitiao.models.shape import Shape

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 1e5}
    | {"tie_word_embeddings": True},
    "qwen2.5-0.5b": _QWEN2
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6}
    | {"tie_word_embeddings": True},
}
JOB: dict[str, dict[str, Any]] = {  # what the common job says of a method beyond its defaults
    "lora": {"rank": 8, "alpha": 16, "target_modules": "all-linear"},
    "freeze": {"blocks": 2},
}
TRAIN = {"batch_size": 8, "learning_rate": 2e-4, "best": None, "evaluate_every": "none", "save_every": "none"}
WARM_STEPS = 2  # not counted: the matrix library makes its code for lengths it has not met
ROWS, MEDIAN, SPREAD, SHORTEST, LONGEST = 1024, 175, 0.74, 24, 1020  # tokens of a row, log-normal: mean 230
TEMPLATE_TOKENS = 12  # of a row, around what is said
PROMPT_TOKENS, NEW_TOKENS = 128, 128
TOKENIZER = "weitiao-tiny-zh"
PEERS = Path(__file__).parents[1] / "bench" / "peers.py"
PEER_NAMES, PEER_METHODS, MICRO_BATCHES = (
    ("trainer", "trl", "unsloth"),
    ("lora", "freeze", "full"),
    ("8", "4", "2", "1"),
)

ShapeName = Annotated[
    str, typer.Option("--shape", metavar=f"{'|'.join(SHAPES)}|MODEL", help="random weights, or a model")
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


def train_verb(
    words: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="recipe options over the job")] = None,
    shape: ShapeName = "smollm2-135m",
    method: Annotated[str, typer.Option(metavar="|".join(METHODS), help="the tuning method")] = "lora",
    data: Annotated[Path | None, typer.Option(help="rows to train on; invented ones of a chat's lengths")] = None,
    steps: Annotated[int, typer.Option(min=WARM_STEPS + 1, help="optimiser steps")] = 32,
    busy: Annotated[int, typer.Option(min=0, help="processes beside it that keep a core busy each")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train for some steps: tokens a second, peak memory, loss, and the limit."""
    found = training(shape, method, data, steps, words or (), busy)
    print(json.dumps(found) if as_json else _table(found))


def generate_verb(
    shape: ShapeName = "smollm2-135m",
    batch: Annotated[int, typer.Option(min=1, help="prompts answered together")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = PROMPT_TOKENS,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens of an answer")] = NEW_TOKENS,
    as_json: AsJson = False,
) -> None:
    """Answer prompts greedily: tokens a second, peak memory, and the limit."""
    found = generation(shape, batch, prompt_tokens, new_tokens)
    print(json.dumps(found) if as_json else _table(found))


def peers_verb(
    peer: Annotated[
        list[str], typer.Option(help="trainer, trl, unsloth or unsloth+compile, with =PYTHON where it is installed")
    ],
    shape: ShapeName = "smollm2-135m",
    method: Annotated[str, typer.Option(help="lora, freeze or full")] = "lora",
    data: Annotated[
        Path | None, typer.Option(help="rows with messages, of which the last is learnt; invented ones")
    ] = None,
    steps: Annotated[int, typer.Option(min=WARM_STEPS + 1, help="optimiser steps")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="times that each runs, in turn")] = 3,
    micro_batches: Annotated[str, typer.Option(help="rows that a peer computes at once, with commas")] = "8,2",
    as_json: AsJson = False,
) -> None:
    """The common job by this project and by others, in turn, each a process of its own."""
    found = side_by_side(peer, shape, method, data, steps, rounds, micro_batches.split(","))
    if as_json:
        print(json.dumps(found))
        return
    ours = found[0]["tokens_per_second"]
    head = ["", t("tokens/s"), t("of ours"), t("peak memory"), t("last loss")]
    print(markdown(head, ([one["engine"], f"{one['tokens_per_second']:,.0f}", f"{one['tokens_per_second'] / ours:.2f}",
                           size(one["peak_rss_bytes"]), f"{one['last_loss']:.3f}"] for one in found)))  # fmt: skip


def side_by_side(
    peers: Sequence[str],
    shape: str,
    method: str,
    data: Path | None,
    steps: int,
    rounds: int,
    micro_batches: Sequence[str],
) -> list[dict[str, Any]]:
    """Medians of every engine, ours first. InputError names all that cannot be; RunError where an engine fails."""
    names = [one.partition("=")[0].partition("+")[0] for one in peers]
    given: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("--peer", names, PEER_NAMES),
        ("--method", [method], PEER_METHODS),
        ("--micro-batches", micro_batches, MICRO_BATCHES),
    ]
    what = '{option}: "{name}" is none of {names}'
    problems = [
        t(what, option=option, name=name, names=", ".join(known))
        for option, words, known in given
        for name in words
        if name not in known
    ]
    if not PEERS.is_file():
        problems.append(t("{path}: not there; peers are measured from a clone of the project", path=PEERS))
    if problems:
        raise InputError(problems)
    rows, model = str(data or invented()), str(folder(shape))
    job = ["--method", method, "--data", rows, "--steps", str(steps)]
    ours = [sys.executable, "-m", "weitiao", "bench", "train", "--shape", model, *job, "--json", "data.train_on=last"]
    commands = {"weitiao": ours}
    for one in peers:
        name, _, python = one.partition("=")
        name, _, compiled = name.partition("+")
        for number in micro_batches:
            more = ["--micro-batch", number, *(["--compile"] if compiled else [])]
            label = f"{one.partition('=')[0]}, {number}"
            commands[label] = [python or sys.executable, str(PEERS), "--peer", name, "--model", model, *job, *more]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    as_found = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}  # the command line's own
    for number in range(rounds):
        for name, command in commands.items():
            done = subprocess.run(command, capture_output=True, text=True, env=as_found)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-5:] or [t("exit code {code}", code=done.returncode)]
                raise RunError([f"{name}: {line}" for line in last])
            runs[name].append(found := json.loads(done.stdout.strip().splitlines()[-1]))
            say("{number}/{rounds}  {name}: {rate} tokens/s", number=number + 1, rounds=rounds, name=name,
                rate=found["tokens_per_second"])  # fmt: skip
    return [
        {
            "engine": name,
            "tokens_per_second": median(one["tokens_per_second"] for one in made),
            "peak_rss_bytes": median(one["peak_rss_bytes"] for one in made),
            "last_loss": made[-1]["losses"][-1],
            "runs": made,
        }
        for name, made in runs.items()
    ]


def training(
    shape: str,
    method: str = "lora",
    data: Path | None = None,
    steps: int = 32,
    overrides: Sequence[str] = (),
    busy: int = 0,
) -> dict[str, Any]:
    """The figures of ``weitiao bench train``, measured in this process, whose peak memory is one of them.

    ``tokens_per_second`` counts real tokens, without padding, over the time of the steps after the second. InputError
    for a shape, method, file or option that cannot be.
    """
    import psutil

    from weitiao import recipe
    from weitiao.models.shape import read
    from weitiao.plan.fact import peak_bytes

    if method not in METHODS:
        raise InputError(t('--method: no method "{name}" ({names})', name=method, names=", ".join(METHODS)))
    with tempfile.TemporaryDirectory(prefix="weitiao-bench-") as scratch:
        values = {
            "model": {"path": str(folder(shape))},
            "method": {"name": method} | JOB.get(method, {}),
            "data": {"train": str(data or invented()), "validation": 0},
            "train": TRAIN | {"max_steps": steps, "epochs": steps},  # an epoch has at least one step
            "output": str(Path(scratch) / "run"),
        }
        built, tree = recipe.load(values, overrides)
        with busy_beside(busy):
            result = recipe.run(built, tree=tree)
        records = [record for record in result.fit.history if "loss" in record]
        ready = (result.run.path / "plan.json").stat().st_mtime  # written just before the first step
    counted = records[WARM_STEPS:]
    seconds = sum(record["seconds"] for record in counted)
    tokens, trained = (sum(record[name] for record in counted) for name in ("tokens", "trained_tokens"))
    peak, gflops = peak_bytes(), machine.measured_gemm(result.plan.dtype)  # now: a shared machine changes by the hour
    flops = flops_per_token(read(built.model.path), built.method, trained / tokens)
    begun = psutil.Process().create_time()
    return {
        "job": "train",
        "shape": shape,
        "method": method,
        "tokens_per_second": round(tokens / seconds, 1),
        "trained_tokens": sum(record["trained_tokens"] for record in records),
        "peak_rss_bytes": peak,
        "losses": [record["loss"] for record in records],
        "dtype": result.plan.dtype,
        "gemm_gflops": round(gflops, 1),
        "roofline_tokens_per_second": round(gflops * 1e9 / flops, 1),
        "of_roofline": round(tokens / seconds * flops / (gflops * 1e9), 3),
        "first_step_after_seconds": round(ready + records[0]["seconds"] - begun, 2),
        "steps": len(records),
        "busy": busy,
    }


@contextmanager
def busy_beside(processes: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy, until the block, or this process, ends."""
    spin = [sys.executable, "-c", "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"]
    beside = [subprocess.Popen(spin) for _ in range(processes)]
    try:
        yield
    finally:
        for one in beside:
            one.kill()
            one.wait()


def flops_per_token(shape: Shape, method: Method, answered: float) -> float:
    """Multiplications and additions with weights that training cannot do without, per token.

    Forward and towards the input in every block that the backward pass reaches, once more for weights that train, and
    the head at the ``answered`` share of the tokens. What lies below the first trained block never changes and could be
    kept; the adapters' own products and attention come on top.
    """
    from weitiao.plan.activations import tape
    from weitiao.plan.speed import trained_linears

    head = 2.0 * shape.vocab * shape.hidden
    trained = sum(rows * columns for rows, columns in trained_linears(shape, method))
    reached = tape(shape, method, "bfloat16").blocks / shape.layers
    whole = not method.adds and method.count(shape) == shape.parameters
    return 4.0 * shape.products * reached + 2.0 * trained + (2 + whole) * head * answered


def generation(
    shape: str, batch: int = 1, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """The figures of ``weitiao bench generate``: ``tokens_per_second`` counts new tokens over all of the time, prompts
    read included. The limit is reading every weight once for a token of every prompt."""
    import torch

    from weitiao.generate.engine import generate
    from weitiao.generate.sample import SampleOptions
    from weitiao.models.load import ModelOptions, load
    from weitiao.plan.fact import peak_bytes

    model = load(ModelOptions(path=str(folder(shape))))
    draw = random.Random(0)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)]

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        generate(model, prompts, SampleOptions(max_new_tokens=tokens), stop_ids=(), pad_id=0, batch_size=batch)
        return time.perf_counter() - started

    seconds(2)
    first, whole = seconds(1), seconds(new_tokens)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "job": "generate",
        "shape": shape,
        "batch": batch,
        "tokens_per_second": round(batch * new_tokens / whole, 1),
        "first_token_seconds": round(first, 4),
        "peak_rss_bytes": peak_bytes(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "roofline_tokens_per_second": round(batch * machine.bandwidth() / weights, 1),
        "threads": torch.get_num_threads(),
    }


# ---- what is measured on -------------------------------------------------------------------------------------------


def folder(shape: str) -> Path:
    """The model folder of ``shape``, a model's name or folder or one of :data:`SHAPES`, which is made once, with random
    weights, and kept in the cache folder."""
    if shape not in SHAPES:
        return resolve(shape)
    parts = (json.dumps(SHAPES[shape]).encode(), (resolve(TOKENIZER) / "tokenizer.json").read_bytes())
    made = cache_folder() / "bench" / f"{shape}-{hashlib.sha256(b''.join(parts)).hexdigest()[:8]}"
    if not (made / "config.json").is_file():
        _make(SHAPES[shape], made)
    return made


def _make(config: Mapping[str, Any], where: Path) -> None:
    """A folder of random weights in bfloat16, with the embedded model's tokenizer and template."""
    from weitiao.models.load import ModelOptions, load, load_tokenizer
    from weitiao.weights.folders import whole

    say("making {path} with random weights, once", path=where)
    tokenizer = load_tokenizer(resolve(TOKENIZER))
    options = ModelOptions(config=dict(config), dtype="bfloat16")
    model = load(options, vocab_size=config["vocab_size"], tokenizer=tokenizer)
    with whole(where, 2 * sum(parameter.numel() for parameter in model.parameters())) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(str(temporary))


def invented() -> Path:
    """The job's rows as a file in the cache folder: questions and answers of common words, as long as chats are, half
    of each the question."""
    path = cache_folder() / "bench" / f"chats-{ROWS}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"messages": as_dicts(chat.messages)}, ensure_ascii=False) for chat in chats())
        write_atomic(path, "".join(line + "\n" for line in lines))
    return path


def chats(count: int = ROWS, seed: int = 0) -> Iterator[Chat]:
    """``count`` rows drawn from ``seed``; a Chinese character is one token of the shapes' tokenizer."""
    from weitiao.demo.dialogues import phrases

    words, draw = phrases()["words"].split(), random.Random(f"bench {seed}")
    for number in range(count):
        length = round(math.exp(draw.gauss(math.log(MEDIAN), SPREAD)))
        said = (min(max(length, SHORTEST), LONGEST) - TEMPLATE_TOKENS) // 2
        turns = [Message(role, _chatter(words, draw, said)) for role in ("user", "assistant")]
        yield Chat(tuple(turns), id=f"chat-{number}")


def _chatter(words: Sequence[str], draw: random.Random, length: int) -> str:
    text = ""
    while len(text) < length:
        text += draw.choice(words)
    return text[:length]


def _table(found: Mapping[str, Any]) -> str:
    """The figures for a reader; of the losses the first and the last."""
    shown = {name: value for name, value in found.items() if name != "losses"}
    if losses := found.get("losses"):
        shown |= {"first_loss": losses[0], "last_loss": losses[-1]}
    cells = ([name, f"{value:,}" if isinstance(value, int) else str(value)] for name, value in shown.items())
    return markdown(["", ""], cells)
