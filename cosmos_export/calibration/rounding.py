"""Rounding that corrects its own errors: GPTQ (arXiv:2210.17323).

A matrix is rounded column by column. What a column loses is made up for by the columns not rounded yet, as well as the
inputs' second moments allow: inputs that go together can stand in for each other.

    N  rows (outputs)    C  columns (inputs)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_export.calibration.levels import Levels, nearest
from cosmos_export.onnx.quantize import Quantization, block_scales

# Added to the diagonal of the moments, as a share of its mean: inputs that hardly vary must not be leant on.
DAMPING = 0.01


def round_with_feedback(matrix: Tensor, moments: Tensor, form: Quantization, damping: float = DAMPING) -> Levels:
    """The levels of a float32 matrix (N, C) that keep its products with inputs of second moments (C, C) = sum of x x^T.

    A block's scales are chosen when its first column's turn comes, for the values that it then has.
    """
    factor = _inverse_factor(moments, damping)
    left = matrix.to(torch.float32).clone()
    steps, scales = torch.empty_like(left), []
    for start in range(0, matrix.shape[1], form.block_size):
        block = slice(start, min(start + form.block_size, matrix.shape[1]))
        scale = block_scales(left[:, block], form)  # (N, 1)
        scales.append(scale)
        steps[:, block], errors = _round_block(left[:, block], scale, factor[block, block], form)
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    return Levels(steps, torch.cat(scales, dim=1), form)


def _round_block(values: Tensor, scale: Tensor, factor: Tensor, form: Quantization) -> tuple[Tensor, Tensor]:
    """(steps, errors weighted for the columns to come) of one block (N, block_size) with one scale (N, 1)."""
    values, steps, errors = values.clone(), torch.empty_like(values), torch.empty_like(values)
    for column in range(values.shape[1]):
        one = slice(column, column + 1)
        steps[:, one] = nearest(values[:, one], scale, form)
        errors[:, one] = (values[:, one] - steps[:, one] * scale) / factor[column, column]
        values[:, column + 1 :] -= errors[:, one] * factor[one, column + 1 :]
    return steps, errors


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor (C, C) of the inverse of the damped moments, float32; computed in float64."""
    damped = moments.to(torch.float64).clone()
    diagonal = damped.diagonal()  # a view
    mean = diagonal.mean()
    diagonal += damping * (mean if mean > 0 else 1.0)  # what is never anything but zero has no moments
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
