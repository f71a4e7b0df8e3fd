"""A new model that can copy before it has learnt anything: the circuit that pretraining finds last, put in by hand.

    copying(model, seed=0)          # a Llama with random weights, changed in place

To repeat what stood before is what names, numbers and calls need, and a small model trained on a CPU reads too little
to find it: two attention layers have to agree first. In block 0 every head attends to the token before and writes a
sketch of it; in block 1 every head looks for tokens whose predecessor is the present token and copies them to the
output (induction heads: Olsson et al. 2022, arXiv 2209.11895; structured initial attention: Trockman and Kolter 2023,
arXiv 2305.09828). Training goes on from there and is free to change all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weitiao.errors import InputError, t

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EMBEDDING_STD = 0.1  # large enough that tied embeddings can tell one token from thousands
NEIGHBOUR = 1.3  # sharpness of looking at the token before
MATCH = 8.0  # sharpness of looking for the same token
COPY = 8.0  # how loudly the found token is said
FAST, SLOW = 0.02, 0.003  # rotary angles a token: those above tell neighbours apart, those below hardly turn in a text


def copying(model: PreTrainedModel, seed: int = 0) -> None:
    """Write the copying circuit into blocks 0 and 1 of a freshly made Llama.

    InputError for another family, grouped heads, fewer than two blocks, or rotary angles that are all fast.
    """
    import torch

    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = hidden // heads
    angles = _angles(config.rope_parameters["rope_theta"], width) if config.model_type == "llama" else torch.zeros(0)
    slow = (angles < SLOW).nonzero().flatten()
    fits = config.model_type == "llama" and config.num_key_value_heads == heads and config.num_hidden_layers >= 2
    if not fits or not len(slow) or not (angles > FAST).any() or config.head_dim != width:
        raise InputError(
            t("model.initialize: copying needs a Llama of two blocks or more, ungrouped heads, rope_theta 1e6")
        )
    draw = torch.Generator().manual_seed(seed)
    basis = _orthogonal(hidden, draw)
    norm = EMBEDDING_STD * hidden**0.5  # of an embedding, and of the part that all of them share
    unit = norm / (hidden / 2) ** 0.5  # brings what a block reads, which is normed, back to an embedding's size
    pick = torch.zeros(width)
    pick[torch.cat([slow, slow + width // 2])] = (hidden / (2 * len(slow)) / (hidden / 2) ** 0.5) ** 0.5
    first, second = (model.model.layers[block].self_attn for block in (0, 1))
    with torch.no_grad():
        _embed(model.model.embed_tokens.weight, basis[:, 0], norm, draw)
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(0.5)  # quieter at first than the circuit
        query, key = _previous(angles, basis[:, 0])
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            sketch, written = _orthogonal(hidden, draw)[:width], _orthogonal(hidden, draw)[:, :width]
            first.q_proj.weight[rows], first.k_proj.weight[rows] = NEIGHBOUR * query, NEIGHBOUR * key
            first.v_proj.weight[rows], first.o_proj.weight[:, rows] = sketch, unit * written
            second.q_proj.weight[rows] = MATCH * pick[:, None] * sketch
            second.k_proj.weight[rows] = MATCH * pick[:, None] * written.T
        second.v_proj.weight.copy_(basis.T)
        second.o_proj.weight.copy_(COPY * unit * basis)


def _angles(theta: float, width: int) -> torch.Tensor:
    """The rotary angle a token of each pair of a head's dimensions [width / 2]."""
    import torch

    half = width // 2
    return theta ** (-torch.arange(half) / half)


def _orthogonal(size: int, draw: torch.Generator) -> torch.Tensor:
    import torch

    return torch.linalg.qr(torch.randn(size, size, generator=draw))[0]


def _embed(weight: torch.Tensor, shared: torch.Tensor, norm: float, draw: torch.Generator) -> None:
    """Random embeddings [vocabulary, hidden] that all have the same part along ``shared``: what every token's query and
    key can be read from alike."""
    import torch

    drawn = EMBEDDING_STD * torch.randn(weight.shape, generator=draw)
    weight.copy_(drawn + (norm - drawn @ shared)[:, None] * shared)


def _previous(angles: torch.Tensor, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key [width, hidden] whose product is largest one token back, whatever the tokens are."""
    import torch

    fast = (angles > FAST).float()
    query = torch.cat([fast, torch.zeros_like(fast)])
    key = torch.cat([fast * torch.cos(angles), fast * torch.sin(angles)])
    return torch.outer(query, shared), torch.outer(key, shared)
