"""ChatGLM-6B, the first of its name (Du et al., arXiv 2103.10360; github.com/THUDM/ChatGLM-6B), for transformers.

    register()                                   # from then on transformers' auto classes know model type "chatglm"
    model = AutoModelForCausalLM.from_pretrained("chatglm-6b", config=config)

A row is ``context [gMASK] <sop> answer``. What stands before <sop> is read in both directions, the rest causally. Each
token has two places: its position, which stays that of the mask token from <sop> on, and its block position, zero
before <sop> and counted from one behind it; each turns one half of every head. Blocks pass on LN(x) · α + f(LN(x)).

All of this follows from the tokens, so that callers pass ids (or embeddings) and a mask as to any causal model. A
cache remembers in a layer of its own which slots hold the mask token and <sop>. A row without ``mask … <sop>``, such
as plain text, is what would follow an empty context: causal, position 0, block positions from one. ``position_ids``
are therefore not needed, and not looked at. Keys and values of prefix tuning have no place, as in P-Tuning v2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, modeling_utils
from transformers import PretrainedConfig as Config
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from weitiao.errors import InputError, t

START, MASK, GMASK = 1, 2, 3  # marks of slots; where a context has both masks, the larger one counts
PUBLISHED = {"position_encoding_2d": True, "quantization_bit": 0, "pre_seq_len": None}


class ChatGLMConfig(Config):
    """The published config.json, key for key. ``residual_layers``: the depth from which α = √(2 · depth) is computed,
    where it is not ``num_layers`` (blocks were added). InputError for what is not this architecture."""

    model_type = "chatglm"
    attribute_map = {  # noqa: RUF012 (as in every class of transformers)
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self,
        vocab_size: int = 130528,
        hidden_size: int = 4096,
        inner_hidden_size: int = 16384,
        num_layers: int = 28,
        num_attention_heads: int = 32,
        layernorm_epsilon: float = 1e-5,
        max_sequence_length: int = 2048,
        use_cache: bool = True,
        bos_token_id: int | None = 130004,
        eos_token_id: int | list[int] | None = 130005,
        pad_token_id: int | None = 3,
        mask_token_id: int = 130000,
        gmask_token_id: int = 130001,
        residual_layers: int | None = None,
        **more: Any,
    ):
        wrong = [f"{name} = {more[name]}" for name, value in PUBLISHED.items() if more.get(name) not in (None, value)]
        if wrong:
            raise InputError(t("not ChatGLM-6B as it was published: {values}", values=", ".join(wrong)))
        self.vocab_size, self.hidden_size, self.inner_hidden_size = vocab_size, hidden_size, inner_hidden_size
        self.num_layers, self.num_attention_heads = num_layers, num_attention_heads
        self.layernorm_epsilon, self.max_sequence_length = layernorm_epsilon, max_sequence_length
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.mask_token_id, self.gmask_token_id, self.use_cache = mask_token_id, gmask_token_id, use_cache
        more.pop("auto_map", None)  # names code that this class stands for
        super().__init__(**{"tie_word_embeddings": True, **more})  # what is left unsaid was true in 2023
        self.residual_layers = residual_layers or self.num_layers
        if self.hidden_size % (4 * self.num_attention_heads):
            message = "hidden_size {hidden}: not a multiple of four times the {heads} heads"
            raise InputError(t(message, hidden=self.hidden_size, heads=self.num_attention_heads))

    def context(self, ids: Sequence[int] | np.ndarray) -> int:
        """How many tokens of a row are context, read in both directions: those before the <sop> that ends it."""
        ids = np.asarray(ids)
        masks = np.flatnonzero((ids == self.mask_token_id) | (ids == self.gmask_token_id))
        starts = np.flatnonzero(ids == self.bos_token_id)
        ends = starts[starts > masks[0]] if len(masks) else masks
        return int(ends[0]) if len(ends) else 0


def register() -> type[ChatGLMConfig]:
    """Make the family known to transformers' auto classes; its configuration class is returned."""
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
    return ChatGLMConfig


class ChatGLMAttention(nn.Module):
    """Queries, keys and values from one matrix, laid out head by head."""

    is_causal = True  # where no mask is given

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        """[B, T, H] to the same; ``mask`` bool [B, 1, T, slots], true where a query sees a slot. The published code
        divides queries by the layer's number and multiplies the scores by it again, which changes nothing here."""
        mixed = self.query_key_value(hidden).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        query, key, value = mixed.chunk(3, dim=-1)
        # a copy of the values, or the backward pass would hold all that was mixed
        query, key, value = _turned(query, turn), _turned(key, turn), value.clone()
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = modeling_utils.ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, sdpa_attention_forward)
        out, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.dense(out.flatten(2))


class ChatGLMMLP(nn.Module):
    """Two linears with GELU (its tanh form) between them."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, H] to the same."""
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """x -> y = LN₁(x) · α + attention(LN₁(x)) -> LN₂(y) · α + MLP(LN₂(y))."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)
        self.alpha = (2 * config.residual_layers) ** 0.5

    def forward(
        self, hidden: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, past_key_values: Cache | None = None
    ) -> Tensor:
        """[B, T, H] to the same."""
        normed = self.input_layernorm(hidden)
        hidden = normed * self.alpha + self.attention(normed, turn, mask, past_key_values)
        normed = self.post_attention_layernorm(hidden)
        return normed * self.alpha + self.mlp(normed)

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Move gain and bias of both norms into the matrices behind them. What is added to the stream stays the same
        function of it, and the block, where that is zero, passes on what the next norm would make of its input."""
        behind = {self.input_layernorm: self.attention.query_key_value}
        for norm, linear in (behind | {self.post_attention_layernorm: self.mlp.dense_h_to_4h}).items():
            linear.bias.add_(linear.weight @ norm.bias)
            linear.weight.mul_(norm.weight)
            norm.reset_parameters()


class ChatGLMPreTrainedModel(modeling_utils.PreTrainedModel):
    """What transformers needs to know of the family."""

    config_class = ChatGLMConfig
    base_model_prefix, _input_embed_layer = "transformer", "word_embeddings"
    supports_gradient_checkpointing = _supports_sdpa = True
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012 (computed anew)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The blocks between the embedding and the last norm."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, number) for number in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """``input_ids`` [B, T] or ``inputs_embeds`` [B, T, H], and ``attention_mask`` [B, slots] over the cache's slots
        and these, 0 at padding, to hidden states [B, T, H]. A context has to come in one piece."""
        marks = self._marks(input_ids, inputs_embeds)
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        keeps = (self.config.use_cache if use_cache is None else use_cache) and not (
            self.gradient_checkpointing and self.training
        )
        cache = DynamicCache(config=self.config) if keeps and past_key_values is None else past_key_values
        queries, real = hidden.shape[1], None if attention_mask is None else attention_mask.bool()
        slots = queries + (cache.get_seq_length() if cache is not None else 0)
        marks = marks if cache is None else _remembered(cache, marks, len(self.layers))
        places, context = _places(marks, None if real is None else real[:, -marks.shape[1] :])
        turn = _turn(places[:, -queries:], hidden.shape[-1] // self.config.num_attention_heads, hidden.dtype)
        mask = _mask(nn.functional.pad(context, (slots - context.shape[1], 0)), real, queries)
        for layer in self.layers:
            hidden = layer(hidden, turn, mask, past_key_values=cache)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden), past_key_values=cache)  # type: ignore[arg-type]

    @torch.no_grad()
    def _marks(self, ids: Tensor | None, embedded: Tensor | None) -> Tensor:
        """int8 [B, T]: START, MASK or GMASK where such a token stands, else 0. Of embeddings, which prompt tuning hands
        on in the place of ids, a token is known by its vector."""
        config: Any = self.config
        like: Any = ids if embedded is None else embedded
        marks = torch.zeros(like.shape[:2], dtype=torch.int8, device=like.device)
        for token, mark in ((config.bos_token_id, START), (config.mask_token_id, MASK), (config.gmask_token_id, GMASK)):
            if token is None or token >= config.vocab_size:
                continue
            vector = None if embedded is None else self.word_embeddings(torch.tensor(token, device=like.device))
            marks.masked_fill_(ids == token if vector is None else (embedded == vector.to(like.dtype)).all(-1), mark)
        return marks


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """The model with its head, whose weights are the embedding's: a folder holds them twice, and alike."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """As the model below; logits [B, T, V], or those of the last ``logits_to_keep`` places only."""
        below = self.transformer(input_ids=input_ids, past_key_values=past_key_values, **more)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(below.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=below.past_key_values)


def _remembered(cache: Cache, marks: Tensor, layers: int) -> Tensor:
    """The marks of all slots [B, slots]: those that ``cache`` holds, as one layer more than the model has, and these.
    As a layer they are selected, repeated and cropped together with the keys and values that they belong to."""
    cache.layers.extend(DynamicLayer() for _ in range(layers + 1 - len(cache.layers)))
    column = marks[:, None, :, None]
    return cache.update(column, column[..., :0], layers)[0][:, 0, :, 0]


def _places(marks: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Position and block position [B, T, 2] of every slot, and which slots are context, bool [B, T]."""
    slots = torch.arange(marks.shape[1], device=marks.device).expand_as(marks)
    count = slots if real is None else (real.cumsum(1) - 1).clamp(min=0)
    marks = marks if real is None else marks * real
    masked = (marks >= MASK).cumsum(1) > 0
    start = ((marks == START) & masked).int().argmax(1, keepdim=True)  # the first slot where there is none
    context = slots < start
    mask = (marks * context).argmax(1, keepdim=True)
    position = torch.where(context, count, count.gather(1, mask))
    block = torch.where(context, 0, count - count.gather(1, start) + 1)
    return torch.stack((position, block), dim=-1), context


def _mask(context: Tensor, real: Tensor | None, queries: int) -> Tensor | None:
    """bool [B, 1, queries, slots]; None where every one of the last ``queries`` slots sees itself and all before."""
    slots = torch.arange(context.shape[1], device=context.device)
    place = slots[-queries:, None]
    ahead, past = queries > 1 and bool(context.any()), len(slots) - queries
    if ahead and past and bool(context[:, past - 1].any()):
        raise ValueError("a context has to come in one piece, up to <sop>")
    if not ahead and (queries == 1 or not past) and (real is None or bool(real.all())):
        return None
    seen = (slots <= place) | context[:, None] if ahead else (slots <= place)[None]
    if real is not None:
        seen = seen & real[:, None] | (slots == place)  # what pads sees itself, or its share would be 0 / 0
    return seen[:, None].expand(len(context), -1, -1, -1)


def _turn(places: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, 2, 1, width / 4] of the angles by which ``places`` [B, T, 2] turn heads of ``width``.
    The frequencies were rounded to half precision when the model was trained."""
    frequencies = (1 / 10000.0 ** (torch.arange(width // 4, device=places.device) / (width // 4))).half().float()
    angles = (places[..., None].float() * frequencies)[:, None, :, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _turned(states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """``states`` [B, heads, T, width], the pairs (x, y) of each half, a quarter apart, turned by that half's angle."""
    pairs = states.unflatten(-1, (2, 2, -1))
    across = torch.stack((-pairs[..., 1, :], pairs[..., 0, :]), dim=-2)
    return (pairs * turn[0] + across * turn[1]).flatten(-3).to(states.dtype)
