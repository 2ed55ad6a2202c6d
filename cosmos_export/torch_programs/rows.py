"""Matrices in 8 bits with a scale a row, and activations in 7: what PyTorch's dynamic quantisation computes with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# FBGEMM's products add pairs of 8-bit products in 16 bits on processors without VNNI; activations of 7 bits cannot
# overflow that, and PyTorch rounds to those ("reduce_range").
_ACTIVATION_LEVELS = 127
# PyTorch takes no smaller step between these, however small the values are (ATen, native/quantized/cpu/QuantUtils.h).
_SMALLEST_STEP = 6.1e-5


@dataclass(frozen=True)
class QuantizedRows:
    """`levels` (out, in) int8 times `scales` (out,) float64, which is the type that PyTorch keeps them in."""

    levels: Tensor
    scales: Tensor

    def as_quantized(self) -> Tensor:
        """PyTorch's own form of it."""
        zeros = torch.zeros(len(self.scales), dtype=torch.int64)
        return torch._make_per_channel_quantized_tensor(self.levels, self.scales, zeros, 0)

    def values(self) -> Tensor:
        """The float32 values (out, in) that are computed with."""
        return self.levels.to(torch.float32) * self.scales.to(torch.float32)[:, None]


def quantize_rows(weight: Tensor) -> QuantizedRows:
    """The nearest of 255 levels between plus and minus each row's largest magnitude: weight (out, in) float32."""
    scales = (weight.abs().amax(1).double() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    levels = (weight.double() / scales[:, None]).round().clamp(-127, 127)
    return QuantizedRows(levels.to(torch.int8), scales)


def round_to_7_bits(x: Tensor) -> Tensor:
    """What FBGEMM makes of a product's input: 128 levels from the smallest value to the largest, with 0."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = ((high - low) / _ACTIVATION_LEVELS).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / step).round().clamp(0, _ACTIVATION_LEVELS)
    step = step.clamp(min=_SMALLEST_STEP)
    return ((x / step).round() + zero).clamp(0, _ACTIVATION_LEVELS).sub(zero) * step
