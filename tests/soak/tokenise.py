"""Five million rows to tokens: bounded memory, a kill in the middle, broken lines, the second run, and the rate beside
the tokenizer library's own.

    python -m tests.soak.tokenise [ROWS] [FOLDER]   # 5,000,000 rows in runs/soak-tokenise; stages that are done stay

The rows are invented, short, and one in a hundred is broken. Every stage is a process of its own, with a cache of its
own in the folder, and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORDS = "酒店 价格 早餐 免费 北京 地铁 附近 景点 推荐 请问 可以 the room is cheap with a good breakfast 4.6".split()
SHORT, USUAL = (2, 4), (8, 24)  # words of a row: of the five million; of those whose rate is measured
BROKEN, RATE_ROWS, ROUNDS = 0.01, 20_000, 6


def write(path: Path, rows: int, seed: int = 0, broken: float = BROKEN, words: tuple[int, int] = SHORT) -> int:
    """Write the rows; how many of them are broken."""
    rng, bad = random.Random(seed), 0
    tails = [" ".join(rng.choices(WORDS, k=rng.randint(*words))) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            line = f'{{"text": "{tails[int(rng.random() * len(tails))]}"}}'
            cut = rng.random() < broken
            bad += cut
            file.write((line[: len(line) // 2] if cut else line) + "\n")
    return bad


def load(path: str, skip_bad: bool = True) -> Any:
    """What a run of task pretrain does with the file before its first step."""
    from weitiao.data import mapped
    from weitiao.data.options import DataOptions
    from weitiao.models.load import load_tokenizer
    from weitiao.weights.fetch import embedded

    options = DataOptions(train=path, validation=0.01, memory_map="on", skip_bad=skip_bad)
    tokenizer = load_tokenizer(embedded())
    began = time.perf_counter()
    return mapped.load(options, "pretrain", tokenizer), time.perf_counter() - began


# ---- the stages, each in a process of its own ------------------------------------------------------------------------


def refused(path: str) -> dict[str, Any]:
    """Without --skip-bad: what the error says."""
    from weitiao.errors import InputError

    try:
        load(path, skip_bad=False)
    except InputError as error:
        return {"said": error.problems[-1], "named": len(error.problems) - 1}
    raise AssertionError("broken lines were not refused")


def whole(path: str) -> dict[str, Any]:
    """With --skip-bad, to the end."""
    made, seconds = load(path)
    sizes = {"examples": len(made.train), "validation": len(made.validation), "tokens": made.train.tokens}
    return {"seconds": round(seconds, 2), **sizes, "digest": made.train.digest}


def right(path: str) -> dict[str, Any]:
    """A thousand examples, each compared with its line tokenised by itself."""
    from weitiao.data.render import encode_text
    from weitiao.models.load import load_tokenizer
    from weitiao.weights.fetch import embedded

    made, _ = load(path)
    tokenizer, rng = load_tokenizer(embedded()), random.Random(1)
    wanted = {}
    for place in rng.sample(range(len(made.train)), min(1000, len(made.train))):
        example = made.train[place]
        wanted[int(example.id.rpartition(":")[2])] = example.ids.tolist()
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if number in wanted:
                assert encode_text(tokenizer, json.loads(line)["text"]).ids == wanted.pop(number)
    assert not wanted
    return {"compared": min(1000, len(made.train))}


def rate(folder: str) -> dict[str, Any]:
    """Rows a second from file to files, and of the library's ``encode_batch`` on the same texts, by turns; processor
    time beside it, which says the same of a machine that others use too."""
    from weitiao.models.load import load_tokenizer
    from weitiao.weights.fetch import embedded

    backend = load_tokenizer(embedded()).backend_tokenizer
    ours = library = ours_processor = library_processor = 0.0
    for number in range(ROUNDS + 1):
        path = Path(folder) / f"rate-{number}.jsonl"
        write(path, RATE_ROWS, 100 + number, 0, USUAL)
        texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        for turn in (number, number + 1):
            began, processor = time.perf_counter(), time.process_time()
            if turn % 2:
                _, seconds = load(str(path))
                ours += seconds if number else 0
                ours_processor += time.process_time() - processor if number else 0
            else:
                backend.encode_batch(texts)
                library += time.perf_counter() - began if number else 0
                library_processor += time.process_time() - processor if number else 0
        path.unlink()
    rows = RATE_ROWS * ROUNDS
    shares = {"share": round(library / ours, 3), "processor_share": round(library_processor / ours_processor, 3)}
    return {"ours": round(rows / ours), "library": round(rows / library), **shares}


def train(path: str) -> dict[str, Any]:
    """The plan, the rehearsal and three steps of a run on all of it."""
    from weitiao.methods import METHODS
    from weitiao.models.load import ModelOptions
    from weitiao.models.load import load as load_model
    from weitiao.models.shape import read as read_shape
    from weitiao.models.shape import read_config
    from weitiao.plan import phases
    from weitiao.runs import Run
    from weitiao.train.loop import fit
    from weitiao.train.options import TrainOptions
    from weitiao.train.rehearsal import rehearse
    from weitiao.train.tasks import TaskOptions
    from weitiao.weights.fetch import embedded

    made, _ = load(path)
    began, folder = time.perf_counter(), Path(path).parent / "run"
    task, method = TaskOptions(name="pretrain").build(), METHODS["lora"]()
    options = TrainOptions(max_steps=3, save_every="none", evaluate_every="none", best=None)
    plan = phases.plan(
        read_shape(read_config(embedded())), method, task, options, made.train, facts=phases.facts("float32", folder)
    )
    model = method.attach(load_model(ModelOptions(path=str(embedded()), dtype="float32")))
    rehearse(model, method, task, made.train, options, 0)
    done = fit(model, method, task, made.train, options, run=Run.create(folder, {}, overwrite=True))
    return {"seconds": round(time.perf_counter() - began, 1), "steps": done.steps, "planned_steps": plan.steps}


STAGES = {"refused": refused, "whole": whole, "second": whole, "right": right, "rate": rate, "train": train}


def stage(name: str, argument: Path, folder: Path, kill_after: float | None = None) -> dict[str, Any] | None:
    """What a stage says, with its peak of resident memory; None if it was killed."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.soak.tokenise", "--stage", name, str(argument)],
        stdout=subprocess.PIPE, env=environment, text=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode:
        raise SystemExit(f"{name}: exit {process.returncode}")
    return json.loads(said)


def main(rows: int = 5_000_000, folder: Path = Path("runs/soak-tokenise")) -> None:
    """Every stage in turn; one that is in the record already is not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    path, record = folder / "rows.jsonl", folder / "record.json"
    done: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}

    def do(name: str, work: Any) -> None:
        if name not in done:
            done[name] = work()
            record.write_text(json.dumps(done, indent=1, ensure_ascii=False))
        print(json.dumps({name: done[name]}, ensure_ascii=False), flush=True)

    do("rows", lambda: {"rows": rows, "broken": write(path, rows), "bytes": path.stat().st_size})
    do("refused", lambda: stage("refused", path, folder))
    do("killed", lambda: {"after": 60.0, "said": stage("whole", path, folder, kill_after=60.0)})
    do("whole", lambda: stage("whole", path, folder))
    do("second", lambda: stage("second", path, folder))
    do("right", lambda: stage("right", path, folder))
    do("train", lambda: stage("train", path, folder))
    do("rate", lambda: stage("rate", folder, folder))
    bad, kept = done["rows"]["broken"], done["whole"]["examples"] + done["whole"]["validation"]
    assert str(bad) in done["refused"]["said"] and kept == rows - bad
    assert done["second"]["digest"] == done["whole"]["digest"]
    peak = max(done[name]["peak_mib"] for name in ("refused", "whole", "second", "train"))
    print(f"peak {peak} MiB; second run {done['second']['seconds']} s; {done['rate']['share']:.0%} of the library")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        found = STAGES[sys.argv[2]](sys.argv[3])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(json.dumps(found | {"peak_mib": peak}, ensure_ascii=False))
    else:
        main(*(kind(word) for kind, word in zip((int, Path), sys.argv[1:], strict=False)))
