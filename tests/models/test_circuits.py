"""A new model with the copying circuit repeats what it has seen, before any training; one without does not."""

import pytest
import torch

from weitiao.errors import InputError
from weitiao.models.load import ModelOptions, load

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def repeated(initialize: str, dtype: str = "float32", seed: int = 0) -> float:
    """Share of the second half that is predicted when the first half stands again."""
    model = load(ModelOptions(config=CONFIG, dtype=dtype, initialize=initialize), vocab_size=3000, seed=seed)
    half = torch.randint(0, 3000, (16, 12), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([half, half], 1)
    with torch.inference_mode():
        said = model.float()(input_ids=ids).logits[:, :-1].argmax(-1)
    return (said == ids[:, 1:])[:, 12:].float().mean().item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_copies_before_it_has_learnt(dtype):
    assert repeated("copying", dtype) > 0.9
    assert repeated("normal", dtype) < 0.05


def test_another_seed_is_another_model_that_copies_too():
    assert repeated("copying", seed=7) > 0.9


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 256},
        {"num_key_value_heads": 2},
        {"num_hidden_layers": 1},
        {"rope_theta": 10.0},
    ],
)
def test_what_cannot_hold_it_is_refused(change):
    with pytest.raises(InputError, match=r"model\.initialize"):
        load(ModelOptions(config=CONFIG | change, initialize="copying"), vocab_size=300)
