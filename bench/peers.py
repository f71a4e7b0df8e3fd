"""The common job by another trainer: what ``weitiao bench peers`` starts, with a Python that has that trainer.

    python bench/peers.py --peer trainer --model DIR --data rows.jsonl --steps 32 --method lora --micro-batch 8

Peers: trainer (transformers' Trainer with PEFT), trl (SFTTrainer), unsloth. Each gets what suits it on a CPU: bfloat16,
rows of like length together, no gradient checkpointing. Prints one JSON object. Real tokens are counted as the model
receives them, over the time of the optimiser steps after the second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROJECTIONS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
WARM_STEPS = 2
ROWS_A_STEP = 8


def rows(path: str, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Token ids and labels of every row; of a conversation the last turn is learnt."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        asked, whole = (
            tokenizer.apply_chat_template(part, tokenize=True, return_dict=False, add_generation_prompt=more)
            for part, more in ((messages[:-1], True), (messages, False))
        )
        labels = [-100] * len(asked) + list(whole[len(asked) :])
        found.append({"input_ids": list(whole), "attention_mask": [1] * len(whole), "labels": labels})
    return found


def padded(examples: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """A batch, padded on the right."""
    import torch

    longest = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in examples])
        for name, value in fill.items()
    }


def counting(base: type) -> type:
    """A trainer that counts the tokens of its steps."""

    class Counting(base):
        tokens = 0

        def training_step(self, model, inputs, *rest, **options):
            self.tokens += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *rest, **options)

    return Counting


def clock(trainer: Any) -> Any:
    """A callback that notes time, tokens and loss of every optimiser step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.marks: list[tuple[float, int]] = []
            self.losses: list[float] = []

        def on_step_end(self, args, state, control, **_):
            self.marks.append((time.perf_counter(), trainer.tokens))

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


def settings(options: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """What every peer's arguments have in common."""
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": ROWS_A_STEP // options.micro_batch,
        "max_steps": options.steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(20, options.steps // 2),
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 0,
    }


def prepared(model: Any, method: str) -> Any:
    """The model with what trains: LoRA by PEFT, the last two blocks, or everything."""
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    if method == "freeze":
        model.requires_grad_(False)
        for block in model.model.layers[-2:]:
            block.requires_grad_(True)
    return model


def train(options: argparse.Namespace, scratch: str) -> tuple[Any, Any]:
    """Run the peer; its trainer and its clock."""
    import datasets
    import torch

    if options.peer == "unsloth":
        os.environ.setdefault("UNSLOTH_CPU_COMPILE", str(int(options.compile)))
        from unsloth import FastLanguageModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.peer == "unsloth":
        model, _ = FastLanguageModel.from_pretrained(
            options.model, max_seq_length=1024, dtype=torch.bfloat16, load_in_4bit=False,
            full_finetuning=options.method == "full",
        )  # fmt: skip
        if options.method == "lora":
            model = FastLanguageModel.get_peft_model(
                model, r=8, lora_alpha=16, target_modules=PROJECTIONS, use_gradient_checkpointing=False
            )
    else:
        model = prepared(AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16), options.method)
    data = datasets.Dataset.from_list(rows(options.data, tokenizer))
    common = settings(options, scratch)
    collate = lambda examples: padded(examples, tokenizer.pad_token_id)  # noqa: E731
    if options.peer == "trainer":
        kind, arguments, more = Trainer, TrainingArguments(**common), {}
    else:
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(**common, max_length=1024, packing=False, dataset_kwargs={"skip_prepare_dataset": True})
        kind, more = SFTTrainer, {"processing_class": tokenizer}
    trainer = counting(kind)(model=model, args=arguments, train_dataset=data, data_collator=collate, **more)
    watch = clock(trainer)
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


def main() -> None:
    """Parse, run, print."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=("trainer", "trl", "unsloth"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--method", choices=("lora", "freeze", "full"), default="lora")
    parser.add_argument("--micro-batch", type=int, choices=(1, 2, 4, 8), default=ROWS_A_STEP)
    parser.add_argument("--compile", action="store_true", help="unsloth: compiled layers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        _, watch = train(options, scratch)
    (start, before), (end, after) = watch.marks[WARM_STEPS - 1], watch.marks[-1]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    package = {"trainer": "transformers"}.get(options.peer, options.peer)
    found = {
        "peer": options.peer,
        "version": version(package),
        "micro_batch": options.micro_batch,
        "tokens_per_second": round((after - before) / (end - start), 1),
        "peak_rss_bytes": int(peak.split()[1]) * 1024,
        "losses": watch.losses,
    }
    print(json.dumps(found), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
