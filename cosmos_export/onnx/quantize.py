"""Blockwise quantisation in the layout of com.microsoft::MatMulNBits, and back.

    N  rows (outputs)    C  columns (inputs)    n  blocks of a row, C / block_size rounded up

A block of `block_size` neighbouring columns shares one float32 scale and, unless symmetric, one zero point:
value = (q - zero_point) * scale with q in 0 .. 2^bits - 1; symmetric means zero_point = 2^(bits - 1).
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_export.threads import map_in_threads

# Scales that are tried, as shares of the one that reaches the largest value: clipping a little costs less than rounding
# everything else more coarsely. The least squared error decides (arXiv:1810.05723, section 4).
_CLIPPING = {4: (1.0, 0.97, 0.94, 0.91, 0.88, 0.85), 8: (1.0,)}


# Of a matrix that is quantised: two megabytes in float32. A quarter of it is as fast on one thread, but several threads
# wait for Python's lock after every operation, the more often the smaller these are (on 2: 97 and 73 M values/s).
_VALUES_AT_ONCE = 1 << 19

# Values of the operator's accuracy_level: what it computes with.
INT8_ACTIVATIONS, FLOAT32_ACTIVATIONS = 4, 1


@dataclass(frozen=True)
class Quantization:
    """How matrices are stored, and (`accuracy_level`) what is computed with: 4 int8, 0 or 1 float32 activations."""

    bits: int
    block_size: int
    symmetric: bool
    accuracy_level: int


@dataclass(frozen=True)
class QuantizedMatrix:
    """blocks (N, n, block_size * bits / 8) uint8, low bits first; scales (N, n) float32; zero_points packed like
    blocks, (N, n * bits / 8 rounded up) uint8, or None when symmetric."""

    blocks: Tensor
    scales: Tensor
    zero_points: Tensor | None


def quantize(matrix: Tensor, form: Quantization) -> QuantizedMatrix:
    """Quantises a floating-point matrix (N, C), which is computed with in float32; columns beyond C that fill up the
    last block are zero."""
    return quantize_stacked([matrix], form)


def quantize_stacked(matrices: Iterable[Tensor], form: Quantization) -> QuantizedMatrix:
    """Quantises matrices of one width as one matrix, the first above the second; each is taken when it is its turn.

    Rows know nothing of each other, so they are taken a few at a time, on as many threads as torch has: what is
    computed in between stays in a core's cache (on one core a tenth of the time), and needs no memory to speak of.
    """
    rows = (part for matrix in matrices for part in matrix.detach().split(_rows_at_once(matrix)))
    return stack_rows(list(map_in_threads(lambda part: _quantized_rows(part, form), rows)))


def _rows_at_once(matrix: Tensor) -> int:
    return max(1, _VALUES_AT_ONCE // max(1, matrix.shape[1]))


def _quantized_rows(matrix: Tensor, form: Quantization) -> QuantizedMatrix:
    grouped = _grouped(matrix, form.block_size)  # (N, n, block_size)
    scales, zeros = _scales(grouped, form)  # (N, n, 1) each
    levels = _levels(grouped, scales, zeros, form.bits)
    return QuantizedMatrix(
        blocks=_pack(levels.to(torch.uint8), form.bits),
        scales=scales.squeeze(-1).contiguous(),
        zero_points=None if form.symmetric else _pack(zeros.squeeze(-1).to(torch.uint8), form.bits),
    )


def dequantize(quantized: QuantizedMatrix, columns: int, form: Quantization) -> Tensor:
    """The float32 matrix (N, columns) that the operator computes with."""
    levels = _unpack(quantized.blocks, form.bits).to(torch.float32)  # (N, n, block_size)
    zeros: Tensor | float = float(2 ** (form.bits - 1))
    if quantized.zero_points is not None:
        zeros = _unpack(quantized.zero_points, form.bits)[:, : levels.shape[1], None].to(torch.float32)
    return ((levels - zeros) * quantized.scales[..., None]).flatten(1)[:, :columns]


def block_scales(block: Tensor, form: Quantization) -> Tensor:
    """The scales (N, 1) of one block of columns (N, at most block_size) in a symmetric form."""
    scales, _ = _scales(block.to(torch.float32)[:, None], form)
    return scales[:, 0]


def pack_levels(levels: Tensor, scales: Tensor, form: Quantization) -> QuantizedMatrix:
    """Levels (N, C), whole numbers from 0 to 2^bits - 1, and scales (N, n) in the operator's layout; symmetric."""
    missing = -levels.shape[1] % form.block_size
    filled = torch.nn.functional.pad(levels, (0, missing), value=2 ** (form.bits - 1))
    grouped = filled.unflatten(1, (-1, form.block_size)).to(torch.uint8)
    return QuantizedMatrix(_pack(grouped, form.bits), scales.contiguous(), None)


def unpack_levels(quantized: QuantizedMatrix, columns: int, form: Quantization) -> Tensor:
    """The levels (N, columns) of a stored matrix, as float32."""
    return _unpack(quantized.blocks, form.bits).to(torch.float32).flatten(1)[:, :columns]


def stack_rows(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices of one form and width, one above the other: their rows know nothing of each other."""
    zero_points = [m.zero_points for m in matrices if m.zero_points is not None]
    return QuantizedMatrix(
        torch.cat([m.blocks for m in matrices]),
        torch.cat([m.scales for m in matrices]),
        torch.cat(zero_points) if zero_points else None,
    )


def _grouped(matrix: Tensor, block_size: int) -> Tensor:
    missing = -matrix.shape[1] % block_size
    return torch.nn.functional.pad(matrix.to(torch.float32), (0, missing)).unflatten(1, (-1, block_size))


def _scales(grouped: Tensor, form: Quantization) -> tuple[Tensor, Tensor]:
    """The scale and zero point (N, n, 1) of each block with the least squared error among the clippings tried."""
    best_error = torch.full((*grouped.shape[:2], 1), float("inf"))
    best_scale, best_zero = torch.ones_like(best_error), torch.zeros_like(best_error)
    for share in _CLIPPING[form.bits]:
        scale, zero = _scale_at(grouped, share, form)
        scale = _least_squares(grouped, _levels(grouped, scale, zero, form.bits) - zero, scale)
        levels = _levels(grouped, scale, zero, form.bits)
        error = ((levels - zero) * scale - grouped).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    # What is no number must not become one: such a block stays NaN, and fails the parity gate.
    return best_scale.masked_fill(~grouped.isfinite().all(-1, keepdim=True), float("nan")), best_zero


def _scale_at(grouped: Tensor, share: float, form: Quantization) -> tuple[Tensor, Tensor]:
    top = 2**form.bits - 1
    if form.symmetric:
        # The value of largest magnitude gets the level 0, whatever its sign: there is one more level on that side.
        largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        zero = torch.full_like(largest, 2 ** (form.bits - 1))
        return _nonzero(-largest * share / 2 ** (form.bits - 1)), zero
    low, high = (f(dim=-1, keepdim=True) for f in (grouped.amin, grouped.amax))
    low, high = low.clamp(max=0) * share, high.clamp(min=0) * share
    scale = _nonzero((high - low) / top)
    return scale, (-low / scale).round().clamp(0, top)


def _least_squares(grouped: Tensor, steps: Tensor, otherwise: Tensor) -> Tensor:
    """The scale with which `steps` (levels less the zero point) come nearest to the block; all-zero steps have none."""
    square = steps.square().sum(-1, keepdim=True)
    product = (grouped * steps).sum(-1, keepdim=True)
    return torch.where((square > 0) & (product != 0), product / square.clamp(min=1), otherwise)


def _nonzero(scale: Tensor) -> Tensor:
    """A block of zeros has no scale; any does."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _levels(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (grouped / scale).add_(zero).nan_to_num_().round_().clamp_(0, 2**bits - 1)


def _pack(levels: Tensor, bits: int) -> Tensor:
    """Two 4-bit levels to a byte along the last axis, the first in the low half; 8-bit levels as they are."""
    if bits == 8:
        return levels.contiguous()
    padded = torch.nn.functional.pad(levels, (0, levels.shape[-1] % 2))
    return (padded[..., ::2] | (padded[..., 1::2] << 4)).contiguous()


def _unpack(packed: Tensor, bits: int) -> Tensor:
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
