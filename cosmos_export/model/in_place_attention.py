"""Attention over a key/value cache that is written to where it lies: for programs that PyTorch runs.

B  batch    T  new tokens    N  tokens in all    L  cache length    H  query heads    K  kv heads    E  head_dim

A graph of values, which ONNX is, has to pass a whole new cache on (`cached_attention`) and leave it to the runtime to
make one buffer of both. A PyTorch program can say what is meant: T places of the cache change, and attention reads the
first N, in PyTorch's own fused operator (`scaled_dot_product_attention`: query head h reads key/value head h // (H/K),
as in `grouped_query_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_export.model.rope import RotaryTable, rotate


class InPlaceAttention:
    """An `Attend` as `CachedAttention` is one, whose `cache` (B, K, L, E), key and value of every layer, is changed.

    `attention_mask` (B, N) is 1 for the tokens that a row has, the `length` new ones included, with padding on the
    right; N is the longest row's, and no more than L.
    """

    def __init__(self, rotary: RotaryTable, attention_mask: Tensor, length: int, cache: Sequence[Tensor]) -> None:
        self.head_dim, self.cache, self.total = rotary.head_dim, list(cache), attention_mask.shape[1]
        places = torch.arange(self.total, device=attention_mask.device)  # (N,)
        first = (attention_mask.sum(1) - length).clamp(min=0)  # (B,): where a row's new tokens begin
        self.positions = first[:, None] + places[:length]  # (B, T)
        self.cos, self.sin = rotary.cos[self.positions], rotary.sin[self.positions]  # (B, T, E/2)
        self.allowed = (places <= self.positions[..., None])[:, None]  # (B, 1, T, N): nothing after the query

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B, T, H*E), key and value (B, T, K*E) to (B, T, H*E)."""
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))  # (B, T, H or K, E)
        query, key = rotate(query, self.cos, self.sin), rotate(key, self.cos, self.sin)
        keys, values = self._append(2 * layer, key), self._append(2 * layer + 1, value)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, attn_mask=self.allowed, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(-2)  # (B, T, H*E)

    def _append(self, part: int, new: Tensor) -> Tensor:
        """Writes `new` (B, T, K, E) to its places in the cache; what it holds of all tokens (B, K, N, E)."""
        new = new.transpose(1, 2)  # (B, K, T, E)
        places = self.positions[:, None, :, None].expand(new.shape)
        self.cache[part].scatter_(2, places, new)
        return self.cache[part][:, :, : self.total]
