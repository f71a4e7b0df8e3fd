"""Supervised fine-tuning without any abstraction: what `weitiao train` does, in one page of torch and transformers.

    python examples/sft_loop.py MODEL_FOLDER rows.jsonl OUT_FOLDER

Each line of rows.jsonl is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}.
The real loop (weitiao/train/loop.py) adds what a real run needs: checkpoints that resume bit for bit, validation,
bfloat16, rows cut into micro-batches, logits only where a token is trained, and errors instead of silence.
"""

import json
import math
import random
import sys

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

EPOCHS, BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, MAX_GRAD_NORM, SEED = 3, 8, 1e-4, 10, 1.0, 0
IGNORE = -100  # cross_entropy's mark for "not trained"


def render(tokenizer, messages):
    """The conversation's tokens, and labels that are trained on the assistant's turns only."""

    def text(upto, generate=False):
        return tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=generate)

    ids, labels, done = [], [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = text(number, generate=True), text(number + 1)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            sys.exit("this chat template rewrites earlier turns; weitiao train can handle that, this page cannot")
        answer = whole[len(prompt) :].rstrip()  # its end token is trained, the line break behind that is not
        parts = (prompt[len(done) :], False), (answer, True), (whole[len(prompt) + len(answer) :], False)
        for part, trained in parts:
            tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if trained else [IGNORE] * len(tokens)
        done = whole
    return ids, labels


def batch_of(rows, pad_id):
    """Right-padded tensors; a causal model never looks at what follows, so padding needs no attention mask."""
    longest = max(len(ids) for ids, _ in rows)
    ids = [ids + [pad_id] * (longest - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORE] * (longest - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


def learning_rate(step, steps):
    """A linear rise, then half a cosine."""
    warmup = min(WARMUP_STEPS, steps // 2)
    if step <= warmup:
        return LEARNING_RATE * step / warmup
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def main(model_folder, rows_file, out_folder):
    """Train, print a line per step, save; returns the losses."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    with open(rows_file, encoding="utf-8") as file:
        rows = [render(tokenizer, json.loads(line)["messages"]) for line in file]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    steps, losses = EPOCHS * math.ceil(len(rows) / BATCH_SIZE), []
    for _ in range(EPOCHS):
        random.shuffle(rows)
        for start in range(0, len(rows), BATCH_SIZE):
            ids, labels = batch_of(rows[start : start + BATCH_SIZE], tokenizer.pad_token_id or 0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(len(losses) + 1, steps)
            logits = model(input_ids=ids).logits[:, :-1]  # position t predicts token t + 1
            loss = cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            print(f"step {len(losses)}/{steps}  loss {losses[-1]:.4f}  gradient norm {norm:.3f}", flush=True)
    model.save_pretrained(out_folder)
    tokenizer.save_pretrained(out_folder)
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
