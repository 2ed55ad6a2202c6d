"""A matrix on its grid of levels: what rounding makes, learning changes, and the bundle stores.

N  rows (outputs)    C  columns (inputs)    n  blocks of a row    z  the level of zero, 2^(bits - 1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_export.onnx.quantize import Quantization, QuantizedMatrix, pack_levels, unpack_levels


@dataclass(frozen=True)
class Levels:
    """value = steps * scale: `steps` (N, C) whole numbers from -z to z - 1 as float32, `scales` (N, n), symmetric."""

    steps: Tensor
    scales: Tensor
    form: Quantization

    @classmethod
    def of(cls, matrix: QuantizedMatrix, columns: int, form: Quantization) -> Levels:
        """The levels of a stored matrix of so many columns."""
        return cls(unpack_levels(matrix, columns, form) - zero_level(form), matrix.scales, form)

    def values(self) -> Tensor:
        """The float32 matrix (N, C)."""
        return spread(self.steps, self.scales, self.form.block_size)

    def packed(self) -> QuantizedMatrix:
        """As the bundle stores it."""
        return pack_levels(self.steps + zero_level(self.form), self.scales, self.form)


def spread(steps: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """steps (N, C) times the scale (N, n) of their block."""
    return steps * scales.repeat_interleave(block_size, dim=1)[:, : steps.shape[1]]


def zero_level(form: Quantization) -> int:
    """The level that means zero in a symmetric form."""
    return int(2 ** (form.bits - 1))


def nearest(matrix: Tensor, scales: Tensor, form: Quantization) -> Tensor:
    """Steps (N, C) nearest to a matrix, given the scales (N, n)."""
    zero = zero_level(form)
    return torch.round(matrix / scales.repeat_interleave(form.block_size, dim=1)[:, : matrix.shape[1]]).clamp(
        -zero, zero - 1
    )
