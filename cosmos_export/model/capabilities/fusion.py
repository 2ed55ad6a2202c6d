"""Capability fusion (cosmos_reference, section 3): five slots become the vector that the last position is read from.

B  batch    T  sequence    D  dim
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLOTS = 5  # the representation itself, reasoning, memory, learning, safety


class CapabilityFusion(nn.Sequential):
    """Linear, LayerNorm, ReLU, Dropout, Linear over the slots side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Linear(SLOTS * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim)
        )

    def forward(
        self,
        representation: Tensor,
        reasoning: Tensor | None = None,
        memory: Tensor | None = None,
        safety: Tensor | None = None,
    ) -> Tensor:
        """(B, D) each to (B, D); a slot that is left out, as learning always is, holds the representation."""
        slots = (representation, reasoning, memory, None, safety)
        return super().forward(torch.cat([representation if s is None else s for s in slots], dim=-1))


def vectors_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """The vectors (B, D) of `hidden` (B, T, D) at one position (B,) of each row."""
    return hidden.gather(1, positions[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)


def replace_vectors_at(hidden: Tensor, positions: Tensor, vectors: Tensor) -> Tensor:
    """`hidden` (B, T, D) with `vectors` (B, D) at one position (B,) of each row."""
    here = torch.arange(hidden.shape[1], device=hidden.device) == positions[:, None]  # (B, T)
    return torch.where(here[..., None], vectors[:, None], hidden)
