"""Grouped-query attention (arXiv:2305.13245) as a layer of projections and a strategy that attends.

    B  batch    T  queries    U  keys    H  query heads    K  key/value heads    G  H / K    E  head_dim    D  dim

The layer projects; *how* queries meet keys (over the whole sequence, over a cache, in one fused operator of a graph)
is an `Attend` that the caller passes down. The layers around it do not know which.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.rope import RotaryTable, rotate

# Scores of one block of queries are kept below this many elements (256 MiB in float64), so that an eager forward
# pass, the float64 reference's among them, fits in memory at any length.
_MAX_SCORES = 1 << 25


class Attend(Protocol):
    """Rotary embedding and attention of one layer: query (B, T, H*E), key and value (B, T, K*E) to (B, T, H*E)."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class GroupedQueryAttention(nn.Module):
    """q, k, v and output projections around an `Attend`; no biases."""

    def __init__(self, config: CosmosAdvancedConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.o_proj(attend(self.layer, self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class FullSequenceAttention:
    """Every position of a sequence at once, nothing remembered: training, the full-sequence graph, the reference."""

    def __init__(self, rotary: RotaryTable, length: int, *, causal: bool, dropout: float = 0.0) -> None:
        self.head_dim = rotary.head_dim
        self.cos, self.sin = rotary(0, length)
        self.positions = torch.arange(length, device=self.cos.device)
        self.causal, self.dropout = causal, dropout

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))  # (B, T, H or K, E)
        query, key = rotate(query, self.cos, self.sin), rotate(key, self.cos, self.sin)
        return self._attend_in_blocks(query, key, value).flatten(-2)  # (B, T, H*E)

    def _attend_in_blocks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # one block: a loop over a length has no graph
            return self._attend(query, key, value, self.positions)
        rows = max(1, _MAX_SCORES // max(1, query.shape[0] * query.shape[2] * query.shape[1]))
        blocks = zip(query.split(rows, dim=1), self.positions.split(rows), strict=True)
        return torch.cat([self._attend(block, key, value, positions) for block, positions in blocks], dim=1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, query_positions: Tensor) -> Tensor:
        allowed = self.positions <= query_positions[:, None] if self.causal else None  # (T, U): not the future
        return grouped_query_attention(query, key, value, allowed, self.dropout)


def grouped_query_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, where query head h reads key/value head h // G.

    query (B, T, H, E), key and value (B, U, K, E), allowed (..., T, U), broadcastable to (B, K, T, U): True where a
    query may see a key; None means everywhere. Returns (B, T, H, E). The softmax is at least float32.
    Query heads of one group are stacked along T, so keys and values are never repeated in memory.
    """
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    stacked = query.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)  # (B, K, G, T, E)
    stacked = stacked.reshape(batch, kv_heads, group * length, width)  # (B, K, G*T, E)
    # Scaled before the product: in 16 bits the unscaled one can overflow where the scaled one does not.
    scores = (stacked * width**-0.5) @ key.permute(0, 2, 3, 1)  # (B, K, G*T, U)
    if allowed is not None:
        allowed = torch.cat([allowed] * group, dim=-2)  # (G*T, U): every query head of a group sees the same keys
        scores = torch.where(allowed, scores, float("-inf"))
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=softmax_dtype).to(value.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    attended = weights @ value.transpose(1, 2)  # (B, K, G*T, E)
    attended = attended.reshape(batch, kv_heads, group, length, width).permute(0, 3, 1, 2, 4)  # (B, T, K, G, E)
    return attended.reshape(batch, length, heads, width)
