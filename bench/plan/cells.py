"""The grid of cells that the plan is measured on: drawn once by SEED, before anything was tuned to it.

    for cell in cells():
        print(cell.name, cell.recipe("model", "rows.jsonl", "run"))

Every architecture meets every method at least twice; what else a cell is made of is drawn. Any first part of the list
is as mixed as the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SEED, ROUNDS = 20261125, 21  # every round has one cell of each architecture
ARCHITECTURES: dict[str, dict[str, Any]] = {  # what is no size, or a family's own name of one
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma": {"num_key_value_heads": 1, "head_dim": 64},
    "mistral": {},
    "gpt2": {},
    "phi": {"num_key_value_heads": 4},
    "qwen3_moe": {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2},
}
METHODS = ("full", "freeze", "expand", "prefix_tuning", "adapter", "lora", "adalora", "qlora")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "sgd", "lion", "muon")
WIDTHS = {256: 704, 320: 960, 384: 1024}  # hidden: intermediate
TOKENS = (1024, 2048, 3072)  # of a micro-batch
LENGTHS = (64, 128, 256, 512)
CUT = (0.7, 1.0)  # rows are between so many of the longest


@dataclass(frozen=True)
class Cell:
    """One training run: two steps of ``parts`` micro-batches, each of ``tokens`` tokens in rows of up to ``length``."""

    number: int
    family: str
    method: str
    optimizer: str
    memory: str
    dtype: str
    tokens: int
    length: int
    parts: int
    layers: int
    hidden: int
    vocab: int
    seed: int

    @property
    def name(self) -> str:
        """The cell in words."""
        sizes = f"L{self.layers} h{self.hidden} V{self.vocab}"
        rows = f"{self.parts}x{self.tokens // self.length}x{self.length}"
        return f"{self.family} {self.method} {self.optimizer} {self.memory} {self.dtype} {sizes} {rows}"

    @property
    def sizes(self) -> dict[str, Any]:
        """The model's configuration, over its family's tiny one."""
        if self.family == "gpt2":
            sizes = {"n_embd": self.hidden, "n_layer": self.layers, "n_head": 4}
        else:
            sizes = {"hidden_size": self.hidden, "num_hidden_layers": self.layers}
            sizes |= {"num_attention_heads": 4, "intermediate_size": WIDTHS[self.hidden]}
        own = dict(ARCHITECTURES[self.family])
        if "num_experts" in own:
            own["moe_intermediate_size"] = WIDTHS[self.hidden] // 4
        return sizes | own | {"vocab_size": self.vocab}

    def texts(self) -> list[str]:
        """The rows: random letters, about a token each."""
        random = np.random.default_rng(self.seed)
        lengths = (self.length * random.uniform(*CUT, size=2 * self.parts * (self.tokens // self.length))).astype(int)
        lengths[:: self.tokens // self.length] = self.length - 8  # one in each micro-batch is long
        return ["".join(random.choice(list("qzxjkvwyhmgfpbd"), length)) for length in lengths]

    def recipe(self, model: str, rows: str, output: str) -> dict[str, Any]:
        """The recipe of the cell."""
        return {
            "model": {"path": model, "dtype": self.dtype},
            "method": {"name": self.method},
            "data": {"train": rows, "validation": 0, "max_length": self.length},
            "task": {"name": "pretrain"},
            "train": {
                "epochs": 1,
                "batch_size": self.parts * (self.tokens // self.length),
                "micro_batch_tokens": self.tokens,
                "optimizer": self.optimizer,
                "memory": self.memory,
                "evaluate_every": "none",
                "best": None,
                "keep": 1,
            },
            "output": output,
        }


def cells() -> list[Cell]:
    """All cells, in the order in which they are measured."""
    random = np.random.default_rng(SEED)
    found: list[Cell] = []
    families = list(ARCHITECTURES)
    offsets = random.permutation(len(METHODS))
    for turn in range(ROUNDS):
        for place in random.permutation(len(families)).tolist():
            method = METHODS[(offsets[place] + turn) % len(METHODS)]
            found.append(_drawn(random, len(found), families[place], method))
    return found


def _drawn(random: np.random.Generator, number: int, family: str, method: str) -> Cell:
    """A cell whose other sides are drawn."""
    return Cell(
        number=number,
        family=family,
        method=method,
        optimizer=OPTIMIZERS[0] if random.random() < 0.4 else str(random.choice(OPTIMIZERS[1:])),
        memory="low" if random.random() < 0.25 else "fast",
        dtype=str(random.choice(["float32", "bfloat16"])),
        tokens=int(random.choice(TOKENS)),
        length=int(random.choice(LENGTHS)),
        parts=int(random.choice([1, 2])),
        layers=int(random.integers(3, 9)),
        hidden=int(random.choice(list(WIDTHS))),
        vocab=int(random.choice([2048, 8192, 16384])),
        seed=int(random.integers(1 << 31)),
    )
