"""Adapters that weitiao saved, loaded by PEFT in another environment, without weitiao: the same logits?

    python -m tests.methods.elsewhere write FOLDER           # here: tunes a little by each of PEFT's methods
    its/bin/python tests/methods/elsewhere.py read FOLDER    # there: any versions of transformers and peft

``make check-elsewhere OTHER=its/bin/python`` does both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "adalora": {"name": "adalora", "rank": 4, "target_rank": 2, "every": 1},
    "prompt_tuning": {"name": "prompt_tuning", "tokens": 4},
    "p_tuning": {"name": "p_tuning", "tokens": 4},
    "prefix_tuning": {"name": "prefix_tuning", "tokens": 4},
}
FAMILIES = ("llama", "gpt2")
LOGITS = "logits.pt"


def ids() -> torch.Tensor:
    """Some tokens [2, 12]."""
    return torch.randint(10, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def write(folder: Path) -> None:
    """FOLDER/FAMILY/base, and FOLDER/FAMILY/METHOD with the logits that the tuned model gave."""
    from tests.train.support import method_of, rows, train
    from weitiao.methods.io import open_model, save
    from weitiao.models import tiny

    for family in FAMILIES:
        base = tiny.make(family, folder / family / "base")
        for name, values in METHODS.items():
            opened, method = open_model(base, dtype="float32"), method_of(values)
            start = (method.attach(opened.model), method)
            _, model, _ = train(folder / "runs" / family / name, rows(8), values, model=start)
            out = folder / family / name
            save(model, method, opened.tokenizer, opened.renderer, out, str(base))
            with torch.no_grad():
                torch.save(model.eval()(input_ids=ids()).logits, out / LOGITS)


def read(folder: Path) -> None:
    """A line for every adapter: the largest difference of a logit. Exit 1 if one is not the same."""
    import peft
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    worst = 0.0
    for family in FAMILIES:
        for name in METHODS:
            base = transformers.AutoModelForCausalLM.from_pretrained(
                folder / family / "base", torch_dtype=torch.float32
            )
            model = peft.PeftModel.from_pretrained(base, str(folder / family / name)).eval()
            with torch.no_grad():
                found = model(input_ids=ids()).logits
            wanted = torch.load(folder / family / name / LOGITS, weights_only=True)
            found = found[:, -wanted.shape[1] :]  # virtual tokens have logits too
            difference = (found - wanted).abs().max().item()
            worst = max(worst, difference)
            print(f"{family:8} {name:14} {difference:.1e}  (largest logit {wanted.abs().max().item():.1f})")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
