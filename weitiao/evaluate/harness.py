"""Tasks of lm-eval (EleutherAI's harness, github.com/EleutherAI/lm-evaluation-harness), measured like the others.

    weitiao eval runs/first --task lm-eval --data arc_easy,hellaswag        # names of its tasks
    weitiao eval runs/first --task lm-eval --data mine/task.yaml            # a task of your own, on files of your own

Prompts, examples and measures are lm-eval's; the likelihoods and answers are this model's. A task is a file that may
name Python beside it, so it can be given on the command line only. Prompts go to the model as they are, without its
chat template, as published figures have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weitiao.errors import InputError, RunError, t
from weitiao.evaluate.bootstrap import mean
from weitiao.evaluate.tasks import EvaluateOptions, Evaluation, figures_of

if TYPE_CHECKING:
    from weitiao.methods.io import Tuned

BATCH_TOKENS = 8192  # padded tokens measured together
HIGHER = "higher_is_better"


def task(tuned: Tuned, options: EvaluateOptions) -> Evaluation:
    """Every measure of lm-eval's tasks, a row of theirs a case. InputError without the package or for a task that it
    does not know; RunError where a task's data cannot be had."""
    simple_evaluate, manager = _library()
    names, folders = _named(options.data)
    tasks = manager(include_path=folders or None)
    if unknown := [name for name in names if name not in tasks.all_tasks]:
        message = "--data: lm-eval has no task {names}; lm-eval ls tasks lists them, and FILE.yaml is one of your own"
        raise InputError(t(message, names=", ".join(unknown)))
    try:
        found = simple_evaluate(
            model=_wrapped(tuned, options),
            tasks=names,
            num_fewshot=options.shots or None,
            task_manager=tasks,
            bootstrap_iters=0,
            random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    except (OSError, ValueError, KeyError, ImportError, ConnectionError) as error:
        raise RunError(t("lm-eval: {names}: {problem}", names=", ".join(names), problem=error)) from error
    return _evaluation(found or {}, options)


def _library() -> tuple[Any, Any]:
    try:
        from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        message = 'task lm-eval needs the package lm-eval: pip install "weitiao[lm-eval]" ({problem})'
        raise InputError(t(message, problem=error)) from None
    return simple_evaluate, TaskManager


def _named(data: str) -> tuple[list[str], list[str]]:
    """The tasks' names, and the folders of those that are files. InputError for a file that names no task."""
    import yaml

    names, folders = [], []
    for word in filter(None, (word.strip() for word in data.split(","))):
        path = Path(word)
        if path.suffix not in (".yaml", ".yml"):
            names.append(word)
            continue
        try:
            said = next((line for line in path.read_text("utf-8").splitlines() if line.startswith("task:")), "")
            name = (yaml.safe_load(said) or {}).get("task")
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(t("{path}: cannot be read: {error}", path=path, error=error)) from None
        if not isinstance(name, str):
            raise InputError(t("{path}: names no task (a line task: NAME)", path=path))
        names.append(name)
        folders.append(str(path.parent))
    return names, folders


def _evaluation(found: Mapping[str, Any], options: EvaluateOptions) -> Evaluation:
    """What lm-eval says of every row, as cases. One task's measures have their own names, those of several the task's
    before it."""
    samples = {name: lines for name, lines in found.get("samples", {}).items() if lines}
    groups = [f"{name}/{line['doc_id']}" for name, lines in samples.items() for line in lines]
    made, lines = {}, []
    start = 0
    for name, rows in samples.items():
        for measure in dict.fromkeys(key for row in rows for key, value in row.items() if _number(key, value)):
            values = np.full(len(groups), math.nan)
            values[start : start + len(rows)] = [_value(row.get(measure)) for row in rows]
            higher = found.get(HIGHER, {}).get(name, {}).get(measure, True) is not False
            made[measure if len(samples) == 1 else f"{name} {measure}"] = mean(values, higher=higher)
        start += len(rows)
        lines += [{"id": f"{name}/{row['doc_id']}", "gold": row.get("target"), "predicted": row.get("filtered_resps")}
                  for row in rows]  # fmt: skip
    asked = [str(row["doc"])[:200] for rows in samples.values() for row in rows]
    return Evaluation(figures_of(made, groups, options), lines, made, groups, asked)


def _number(key: str, value: object) -> bool:
    return key not in ("doc_id", "filter") and isinstance(value, bool | int | float)


def _value(value: object) -> float:
    return float(value) if isinstance(value, bool | int | float) else math.nan


# ---- the model as lm-eval wants it -----------------------------------------------------------------------------------


def _wrapped(tuned: Tuned, options: EvaluateOptions) -> Any:
    """``tuned`` as a model of lm-eval's interface."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class Model(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return likelihoods(tuned, [_pair(tuned, *request.args) for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            pairs = [_pair(tuned, "", request.args[0]) for request in requests]
            return [value for value, _ in likelihoods(tuned, pairs)]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return _answers(tuned, [request.args for request in requests], options)

    return Model()


def _ids(tuned: Tuned, text: str) -> list[int]:
    return list(tuned.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]


def _pair(tuned: Tuned, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens before, and those whose likelihood is asked for: cut where the whole text's tokens are, a space at the
    context's end going to the continuation. Nothing before: the token that begins or ends a text stands there."""
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    whole, before = _ids(tuned, context + continuation), _ids(tuned, context)
    start = tuned.tokenizer.bos_token_id if tuned.tokenizer.bos_token_id is not None else tuned.tokenizer.eos_token_id
    return ([*before] or [int(start)]), whole[len(before) :]  # type: ignore[arg-type]


def likelihoods(tuned: Tuned, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """(log-likelihood in nats of the second tokens behind the first, whether each is the likeliest) of every pair. What
    is longer than the model's positions is cut on the left."""
    import torch

    from weitiao.data.batch import Example, collate, plan_epoch
    from weitiao.generate.engine import positions
    from weitiao.models import modules
    from weitiao.train.logps import hidden_states
    from weitiao.train.modes import evaluating
    from weitiao.train.progress import counting

    room, model = positions(tuned.model), tuned.model
    examples = []
    for before, asked in pairs:
        ids = np.array([*before, *asked][-room if room else 0 :], np.int32)
        examples.append(Example(ids, np.arange(len(ids)) >= max(1, len(ids) - len(asked)), ""))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    pad_id: Any = tuned.tokenizer.pad_token_id
    device, done = next(model.parameters()).device, 0
    with evaluating(model), torch.no_grad(), counting(t("measuring")) as progress:
        for batches in plan_epoch([*map(len, examples)], 64, BATCH_TOKENS, 0, 0):
            for rows in batches:
                batch = collate([examples[row] for row in rows], pad_id, room).to(device)
                hidden = hidden_states(model, batch.ids, None)
                for place, row in enumerate(rows):
                    trained = batch.mask[place, 1:]
                    targets = batch.ids[place, 1:][trained]
                    logits = modules.head(model)(hidden[place, :-1][trained]).float()
                    value = logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item()
                    found[row] = value, bool((logits.argmax(-1) == targets).all())
                progress(done := done + len(rows), len(examples))
    return found


def _answers(tuned: Tuned, requests: Sequence[tuple[str, Mapping[str, Any]]], options: EvaluateOptions) -> list[str]:
    """The answers to texts, each with the settings that its task has (until, max_gen_toks, temperature)."""
    from weitiao.generate.engine import generate, positions
    from weitiao.generate.sample import SampleOptions

    answers, room = [""] * len(requests), positions(tuned.model)
    pad_id: Any = tuned.tokenizer.pad_token_id
    by_settings: dict[str, list[int]] = {}
    for place, (_, settings) in enumerate(requests):
        by_settings.setdefault(repr(sorted(settings.items())), []).append(place)
    for places in by_settings.values():
        settings = requests[places[0]][1]
        until = settings.get("until") or []
        most = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or options.max_new_tokens)
        sampled = SampleOptions(
            max_new_tokens=most,
            temperature=float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0,
            seed=options.seed,
            stop=[until] if isinstance(until, str) else list(until),
        )
        prompts = [_ids(tuned, requests[place][0])[-max(1, room - most) if room else 0 :] for place in places]
        done = generate(
            tuned.model,
            prompts,
            sampled,
            stop_ids=tuned.renderer.stop_ids,
            pad_id=pad_id,
            tokenizer=tuned.tokenizer,
            batch_size=options.batch_size,
        )
        for place, completion in zip(places, done, strict=True):
            answers[place] = completion.text
    return answers
