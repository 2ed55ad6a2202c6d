"""Rotary position embedding, rotate-half form (RoFormer, arXiv:2104.09864; cosmos_reference, section 2).

S  max_sequence_length     T  tokens of this call     H  heads     E  head_dim
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def rotary_tables(head_dim: int, theta: float, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle: two tables (length, head_dim / 2) of `dtype`.

    The inverse frequencies are float32 arithmetic, because a trained checkpoint saw those; everything after them is
    float64, so that a table is the correctly rounded one whatever its dtype. The second half of the head's channels
    uses the same angles as the first, so one half is stored.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inverse_frequencies = 1.0 / (theta**exponents)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), inverse_frequencies.double())
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs (i, i + E/2) of `x` (B, T, H, E) by the angles of `cos`, `sin` (T, E/2)."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # (B, T, H, E/2) each
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, E/2): one angle for all heads of a position
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class RotaryTable(nn.Module):
    """The static tables, built once for `length` positions and shared by every layer and graph.

    They are buffers of no state dict: a function of the configuration, not something that was trained.
    They stay float32 whatever the model's dtype, except in a float64 model, which gets tables that were never rounded.
    """

    cos: Tensor  # (S, E/2)
    sin: Tensor  # (S, E/2)

    def __init__(self, head_dim: int, theta: float, length: int) -> None:
        super().__init__()
        self.head_dim, self.theta, self.length = head_dim, theta, length
        shape = (length, head_dim // 2)
        self.register_buffer("cos", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.rebuild(self.cos.device, torch.float32)

    def forward(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tables of the positions start .. stop - 1: two tensors (stop - start, E/2)."""
        return self.cos[start:stop], self.sin[start:stop]

    def rebuild(self, device: torch.device, dtype: torch.dtype) -> None:
        """Computes the tables anew, on `device` and in `dtype`; on the meta device they stay shapes."""
        if device.type == "meta":
            shape = (self.length, self.head_dim // 2)
            self.cos, self.sin = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        else:
            cos, sin = rotary_tables(self.head_dim, self.theta, self.length, dtype)
            self.cos, self.sin = cos.to(device), sin.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .double(), .half() and .to() come through here. A converted table would keep float32's rounding in a
        # float64 model and lose whole positions in a 16-bit one, so it is computed anew instead.
        target = fn(torch.empty(0, dtype=self.cos.dtype, device=self.cos.device))
        self.rebuild(target.device, torch.float64 if target.dtype == torch.float64 else torch.float32)
        return self
