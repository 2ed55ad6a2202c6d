"""Attention over a key/value cache of fixed length, in standard operators: any geometry, any runtime.

B  batch    T  new tokens    N  tokens in all    L  cache length    H  query heads    K  kv heads    E  head_dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_export.model.attention import grouped_query_attention
from cosmos_export.model.rope import RotaryTable, rotate


class CachedAttention:
    """An `Attend` for T new tokens of every row on top of those in the cache.

    `lengths` (B,) int64 is how many tokens a row has, the `length` new ones included, with padding on the right;
    `cache` is key and value (B, K, L, E) of every layer, and holds the new ones after the call. A row's new tokens are
    its last ones; in a prefill of unequal rows they start at 0, and what lies beyond a row's end is overwritten later.
    """

    def __init__(self, rotary: RotaryTable, lengths: Tensor, length: int, cache: Sequence[Tensor]) -> None:
        self.head_dim, self.cache = rotary.head_dim, list(cache)
        first = (lengths - length).clamp(min=0)  # (B,): where a row's new tokens begin
        self.positions = first[:, None] + torch.arange(length, device=lengths.device)  # (B, T)
        self.cos, self.sin = rotary.cos[self.positions], rotary.sin[self.positions]  # (B, T, E/2)
        places = torch.arange(self.cache[0].shape[2], device=lengths.device)  # (L,)
        self.allowed = (places <= self.positions[..., None])[:, None]  # (B, 1, T, L): nothing after the query

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B, T, H*E), key and value (B, T, K*E) to (B, T, H*E)."""
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))  # (B, T, H or K, E)
        query, key = rotate(query, self.cos, self.sin), rotate(key, self.cos, self.sin)
        keys, values = self._append(2 * layer, key), self._append(2 * layer + 1, value)
        attended = grouped_query_attention(query, keys.transpose(1, 2), values.transpose(1, 2), self.allowed)
        return attended.flatten(-2)  # (B, T, H*E)

    def _append(self, part: int, new: Tensor) -> Tensor:
        """Writes `new` (B, T, K, E) to its places in a cache (B, K, L, E), which becomes the cache."""
        new = new.transpose(1, 2)  # (B, K, T, E)
        places = self.positions[:, None, :, None].expand(new.shape)
        self.cache[part] = self.cache[part].scatter(2, places, new)
        return self.cache[part]
