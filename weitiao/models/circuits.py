"""A new model that can copy before it has learnt anything: the circuit that pretraining finds last, put in by hand.

    copying(model, seed=0)          # a Llama with random weights, changed in place

To repeat what stood before is what names, numbers and calls need, and a small model trained on a CPU reads too little
to find it: two attention layers have to agree first. In block 0 the heads attend to the token before, or the one before
that, and write a sketch of it; in block 1 they look for places whose two predecessors are the present token and the one
before, and say what stands there (induction heads: Olsson et al. 2022, arXiv 2209.11895). In all later blocks a head
says what it attends to (compare Trockman and Kolter 2023, arXiv 2305.09828), so that only where to look is left to be
learnt. Training may change all of it; at a learning rate that suits the rest it undoes the first two blocks within a
hundred steps, so that these are better frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weitiao.errors import InputError, t

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EMBEDDING_STD = 0.1  # large enough that tied embeddings can tell one token from thousands
NEIGHBOUR = 1.6  # sharpness of looking at a token before
MATCH = 12.0  # sharpness of looking for the same tokens
SECOND = 0.8  # weight of the token before, beside the present one, in that search
COPY = 8.0  # how loudly the found token is said
LATER = 1.0  # how loudly a later head says what it attends to
FAINT = 1e-4  # what stands where the circuit has nothing
FAST, SLOW = 0.02, 0.003  # rotary angles a token: those above tell neighbours apart, those below hardly turn in a text


def copying(model: Any, seed: int = 0) -> None:
    """Write the copying circuit into a freshly made Llama.

    The residual stream [H] is cut in three: one direction that all embeddings share, from which queries and keys can be
    read that are alike for every token; H / 2 directions for what tells tokens apart; the rest in two halves for
    sketches of the token before and of the one before that. InputError for another family, grouped heads, an odd number
    of heads, fewer than two blocks, or rotary angles that are all fast.
    """
    import torch

    angles = _angles(model.config)
    slow, fast = (angles < SLOW).nonzero().flatten(), (angles > FAST).float()
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    width = hidden // heads
    draw = torch.Generator().manual_seed(seed)
    basis = _orthogonal(hidden, draw)
    shared, token, room = basis[:, 0], basis[:, 1 : 1 + hidden // 2], basis[:, 1 + hidden // 2 :]
    size = room.shape[1] // 2  # of a sketch
    places = (room[:, :size], room[:, size : 2 * size])
    norm = EMBEDDING_STD * hidden**0.5  # of an embedding's own part, and of the part that all of them share
    unit = norm / (hidden / 2) ** 0.5  # brings what a block reads, which is normed, back to an embedding's size
    with torch.no_grad():
        _embed(model.get_input_embeddings().weight, token, shared, norm, draw)
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(0.5)  # quieter at first than the circuit
        sketch = _orthogonal(hidden // 2, draw)[:size] @ token.T
        blocks = [layer.self_attn for layer in model.model.layers]
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            before, part = divmod(head, heads // 2)
            query, key = _look_back(angles, fast, 1 + before)
            blocks[0].q_proj.weight[rows] = NEIGHBOUR * torch.outer(query, shared)
            blocks[0].k_proj.weight[rows] = NEIGHBOUR * torch.outer(key, shared)
            read, write = sketch, unit * places[before] * (hidden / 2 / size) ** 0.5
            kept = slice(part * width // 2, (part + 1) * width // 2)
            blocks[0].v_proj.weight[rows] = _padded(read[kept], width)
            blocks[0].o_proj.weight[:, rows] = _padded(write[:, kept].T, width).T
        both = torch.cat([slow, slow + width // 2])
        sharpness = MATCH / (len(both) * hidden / 2) ** 0.25
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            one, two = (_orthogonal(max(size, len(both)), draw)[: len(both), :size] for _ in range(2))
            query, key = torch.zeros(2, width, hidden)
            query[both] = sharpness * (one @ sketch + SECOND * two @ places[0].T)
            key[both] = sharpness * (one @ places[0].T + SECOND * two @ places[1].T)
            blocks[1].q_proj.weight[rows], blocks[1].k_proj.weight[rows] = query, key
        _say(blocks[1], token, token, COPY * unit, heads)
        for block in blocks[2:]:
            turned = [token @ _orthogonal(hidden // 2, draw) for _ in range(2)]
            _say(block, turned[0], turned[1], LATER * unit, heads)
        for weight in (linear.weight for block in blocks for linear in block.children()):
            empty = ~weight.any(1)  # a row of zeros has no direction, which DoRA divides by
            weight[empty] = FAINT * torch.randn(int(empty.sum()), hidden, generator=draw).to(weight.dtype)


def _angles(config: Any) -> Tensor:
    """The rotary angle a token of each pair of a head's dimensions [width / 2]; InputError for a model that the circuit
    does not fit."""
    import torch

    heads = config.num_attention_heads
    width = config.hidden_size // heads
    known = config.model_type == "llama" and config.num_hidden_layers > 1
    if known and heads % 2 == 0 and config.num_key_value_heads == heads and config.head_dim == width:
        angles = config.rope_parameters["rope_theta"] ** (-torch.arange(width // 2) / (width // 2))
        if (angles < SLOW).any() and (angles > FAST).any():
            return angles
    message = (
        "model.initialize: copying needs a Llama of two blocks or more, an even number of ungrouped heads, "
        "rope_theta 1e6"
    )
    raise InputError(t(message))


def _orthogonal(size: int, draw: torch.Generator) -> Tensor:
    import torch

    return torch.linalg.qr(torch.randn(size, size, generator=draw))[0]


def _embed(weight: Tensor, token: Tensor, shared: Tensor, norm: float, draw: torch.Generator) -> None:
    """Random embeddings [vocabulary, H]: a part in the ``token`` directions [H, H / 2] and one along ``shared`` [H],
    both of length ``norm``."""
    import torch

    drawn = torch.randn(len(weight), token.shape[1], generator=draw)
    weight.copy_(drawn / drawn.norm(dim=1, keepdim=True) * norm @ token.T + norm * shared)


def _look_back(angles: Tensor, fast: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Parts of query and key [width] whose product is largest so many tokens back, whatever the tokens are."""
    import torch

    key = torch.cat([fast * torch.cos(steps * angles), fast * torch.sin(steps * angles)])
    return torch.cat([fast, torch.zeros_like(fast)]), key


def _padded(rows: Tensor, count: int) -> Tensor:
    """``rows`` with zero rows after them, ``count`` in all."""
    import torch

    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])


def _say(attention: Any, first: Tensor, second: Tensor, loudness: float, heads: int) -> None:
    """Heads that write what they attend to: half of them read the token directions along ``first`` [H, H / 2], the
    other half along ``second``, a slice each."""
    width = first.shape[0] // heads
    for head in range(heads):
        half, part = divmod(head, heads // 2)
        rows = slice(head * width, (head + 1) * width)
        read = (first, second)[half][:, part * width : (part + 1) * width]
        attention.v_proj.weight[rows] = read.T
        attention.o_proj.weight[:, rows] = loudness * 2 / heads * read
