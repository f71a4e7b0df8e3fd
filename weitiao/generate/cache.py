"""transformers' key-value cache with room ahead, for models that transformers decodes.

cache = roomy(model)
model(input_ids=ids, past_key_values=cache)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 128  # room that a buffer has ahead, so that most steps copy one token and not the whole past


class RoomyLayer(DynamicLayer):
    """A cache layer that writes into a buffer with spare room: a step copies one token instead of the whole past.

    ``keys`` and ``values`` [B, heads, T, head_dim] are views of the buffer, so all of the base class works on them.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, t, head_dim] states; the whole keys and values are returned."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < length:
            self._buffers = (self._roomy(key_states, self.keys, length), self._roomy(value_states, self.values, length))
        keys, values = self._buffers
        keys[..., past:length, :] = key_states
        values[..., past:length, :] = value_states
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As the base class; the copies get buffers of their own."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """As the base class; the copies get buffers of their own."""
        super().batch_select_indices(indices)
        self._buffers = None

    def _roomy(self, like: Tensor, past: Tensor | None, length: int) -> Tensor:
        rows, heads, _, width = like.shape
        buffer = like.new_empty(rows, heads, length + SPARE_TOKENS, width)
        if past is not None and past.numel():
            buffer[..., : past.shape[-2], :] = past
        return buffer


def roomy(model: PreTrainedModel) -> DynamicCache:
    """The model's own kind of cache (sliding layers stay what they are), its plain layers made roomy."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
