"""Blockwise quantisation: what is stored, how near it comes, and that ONNX Runtime reads it as `dequantize` does."""

from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosmos_export.onnx.quantize import Quantization, QuantizedMatrix, dequantize, quantize

# Columns that fill their blocks and that do not, an even and an odd number of blocks, less than a block.
SHAPES = [(5, 64, 32), (3, 80, 32), (7, 96, 32), (2, 40, 16), (1, 1, 16), (4, 130, 128)]
FORMS = [
    pytest.param(b, s, id=f"{b} bits, {'symmetric' if s else 'asymmetric'}") for b in (4, 8) for s in (True, False)
]

forms = pytest.mark.parametrize(("bits", "symmetric"), FORMS)
shapes = pytest.mark.parametrize(("rows", "columns", "block_size"), SHAPES)


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def unpacked(quantized: QuantizedMatrix, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels (N, n, block_size), scales (N, n) and zero points (N, n), byte by byte as the operator's text says."""
    blocks, scales = quantized.blocks.numpy(), quantized.scales.numpy()
    rows, count = scales.shape
    a_byte = 8 // bits

    def level(data: np.ndarray, i: int) -> int:
        return int(data[i // a_byte]) >> (bits * (i % a_byte)) & (2**bits - 1)

    size = blocks.shape[2] * a_byte
    levels = np.array([[[level(blocks[r, b], i) for i in range(size)] for b in range(count)] for r in range(rows)])
    zeros = np.full((rows, count), 2 ** (bits - 1))
    if quantized.zero_points is not None:
        packed = quantized.zero_points.numpy()
        zeros = np.array([[level(packed[r], b) for b in range(count)] for r in range(rows)])
    return levels, scales, zeros


def in_blocks(matrix: Tensor, block_size: int) -> np.ndarray:
    """(N, n, block_size) in float64, filled up with zeros."""
    array = matrix.double().numpy()
    return np.pad(array, ((0, 0), (0, -array.shape[1] % block_size))).reshape(len(array), -1, block_size)


def rounded_to_nearest(grouped: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """The plain way: the scale reaches the largest value, everything is rounded to the nearest level."""
    top = 2**bits - 1
    if symmetric:
        largest = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)
        scale, zero = -largest / 2 ** (bits - 1), np.float64(2 ** (bits - 1))
    else:
        low, high = grouped.min(-1, keepdims=True).clip(max=0), grouped.max(-1, keepdims=True).clip(min=0)
        scale = (high - low) / top
        zero = np.round(-low / np.where(scale == 0, 1, scale))
    scale = np.where(scale == 0, 1, scale)
    return (np.clip(np.round(grouped / scale + zero), 0, top) - zero) * scale


@forms
@shapes
def test_the_layout_is_the_operators(rows: int, columns: int, block_size: int, bits: int, symmetric: bool) -> None:
    matrix = random_matrix(rows, columns)
    form = Quantization(bits, block_size, symmetric, 1)
    quantized = quantize(matrix, form)
    count = -(-columns // block_size)
    assert (quantized.blocks.shape, quantized.blocks.dtype) == ((rows, count, block_size * bits // 8), torch.uint8)
    assert (quantized.scales.shape, quantized.scales.dtype) == ((rows, count), torch.float32)
    if symmetric:
        assert quantized.zero_points is None
    else:
        assert quantized.zero_points is not None
        expected = ((rows, -(-count * bits // 8)), torch.uint8)
        assert (quantized.zero_points.shape, quantized.zero_points.dtype) == expected
    levels, scales, zeros = unpacked(quantized, bits)
    values = ((levels - zeros[..., None]).astype(np.float32) * scales[..., None]).reshape(rows, -1)[:, :columns]
    np.testing.assert_array_equal(dequantize(quantized, columns, form).numpy(), values)


@forms
@shapes
def test_each_value_gets_the_nearest_level(
    rows: int, columns: int, block_size: int, bits: int, symmetric: bool
) -> None:
    matrix = random_matrix(rows, columns, seed=1)
    form = Quantization(bits, block_size, symmetric, 1)
    quantized = quantize(matrix, form)
    _, scales, zeros = unpacked(quantized, bits)
    possible = (np.arange(2**bits) - zeros[..., None]) * scales[..., None].astype(np.float64)  # (N, n, levels)
    grouped = in_blocks(matrix, block_size)
    nearest = np.abs(grouped[..., None] - possible[..., None, :]).min(-1).reshape(rows, -1)[:, :columns]
    error = np.abs(dequantize(quantized, columns, form).double().numpy() - matrix.double().numpy())
    # At a tie between two levels float32 may take either.
    np.testing.assert_allclose(error, nearest, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    columns=st.integers(1, 70),
    seed=st.integers(0, 1 << 16),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    tail=st.sampled_from([1, 3]),
    shift=st.sampled_from([0.0, 2.0, -5.0]),
)
def test_errors_are_bounded_and_no_larger_than_plain_rounding(
    bits: int, symmetric: bool, columns: int, seed: int, magnitude: float, tail: int, shift: float
) -> None:
    """Also for blocks with outliers (`tail`) and blocks that lie on one side of zero (`shift`)."""
    matrix = magnitude * (random_matrix(3, columns, seed) ** tail + shift)
    form = Quantization(bits, 16, symmetric, 1)
    grouped = in_blocks(matrix, 16)
    result = in_blocks(dequantize(quantize(matrix, form), columns, form), 16)
    plain = rounded_to_nearest(grouped, bits, symmetric)
    squared, plain_squared = ((x - grouped) ** 2 for x in (result, plain))
    scale = (grouped**2).sum(-1)
    assert (squared.sum(-1) <= plain_squared.sum(-1) + 1e-11 * scale).all()
    # 8 bits are not clipped: half a step, or a whole one where the largest values have both signs. 4 bits may be,
    # by 15 % of the largest value (2.4 steps of a sixteenth), for the sake of all others.
    largest = np.abs(grouped).max(-1) if symmetric else np.ptp(np.pad(grouped, ((0, 0), (0, 0), (0, 1))), axis=-1)
    step = largest / (2 ** (bits - 1) if symmetric else 2**bits - 1)
    steps = 1.05 if bits == 8 else 3.0
    assert (np.abs(result - grouped).max(-1) <= steps * step + 1e-6 * largest).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_do_better_than_plain_rounding(symmetric: bool) -> None:
    matrix = random_matrix(64, 256)
    form = Quantization(4, 32, symmetric, 1)
    grouped = in_blocks(matrix, 32)
    result = in_blocks(dequantize(quantize(matrix, form), 256, form), 32)
    error, plain = (((x - grouped) ** 2).mean() for x in (result, rounded_to_nearest(grouped, 4, symmetric)))
    assert error < 0.95 * plain


@forms
@pytest.mark.parametrize("sign", [1, -1])
def test_what_can_be_represented_is_exact(bits: int, symmetric: bool, sign: int) -> None:
    """Scales are powers of two, so that no product rounds."""
    draw = np.random.default_rng(0)
    top = 2**bits - 1
    levels = draw.integers(0, top + 1, (6, 3, 16))
    levels[..., 3], levels[..., 9] = 0, top
    zeros = np.full((6, 3, 1), 2 ** (bits - 1)) if symmetric else draw.integers(0, top + 1, (6, 3, 1))
    scales = 2.0 ** draw.integers(-9, 3, (6, 3, 1))
    matrix = torch.from_numpy((sign * (levels - zeros) * scales).reshape(6, 48)).float()
    form = Quantization(bits, 16, symmetric, 1)
    assert torch.equal(dequantize(quantize(matrix, form), 48, form), matrix)


@forms
def test_blocks_of_zeros_stay_zero_beside_others(bits: int, symmetric: bool) -> None:
    matrix = random_matrix(3, 64)
    matrix[0], matrix[1, :32], matrix[2, 32:] = 0, 0, 0
    form = Quantization(bits, 32, symmetric, 1)
    quantized = quantize(matrix, form)
    result = dequantize(quantized, 64, form)
    assert torch.isfinite(quantized.scales).all()
    assert not result[matrix == 0].any()
    assert min(result[1, 32:].abs().max(), result[2, :32].abs().max()) > 1


@forms
@pytest.mark.parametrize("value", [0.3, -0.3, 1e-30, -7e8])
def test_a_block_of_one_value(bits: int, symmetric: bool, value: float) -> None:
    form = Quantization(bits, 16, symmetric, 1)
    matrix = torch.full((2, 16), value)
    torch.testing.assert_close(dequantize(quantize(matrix, form), 16, form), matrix, rtol=1e-6, atol=0)


@forms
def test_rows_are_quantised_each_for_itself(bits: int, symmetric: bool) -> None:
    """So a projection is the same numbers alone and packed with its siblings."""
    upper, lower = random_matrix(3, 80), 5 * random_matrix(2, 80, seed=1)
    form = Quantization(bits, 32, symmetric, 1)
    whole, parts = quantize(torch.cat([upper, lower]), form), [quantize(m, form) for m in (upper, lower)]
    for part in ("blocks", "scales", "zero_points"):
        if getattr(whole, part) is not None:
            assert torch.equal(getattr(whole, part), torch.cat([getattr(p, part) for p in parts])), part


@forms
def test_the_matrix_itself_is_not_changed(bits: int, symmetric: bool) -> None:
    matrix = random_matrix(3, 64)
    before = matrix.clone()
    quantize(matrix, Quantization(bits, 32, symmetric, 1))
    assert torch.equal(matrix, before)


@forms
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_does_not_become_one(bits: int, symmetric: bool, value: float) -> None:
    """Otherwise a broken checkpoint would be exported, and be found equal to its rounded self."""
    matrix = random_matrix(2, 32)
    matrix[1, 3] = value
    form = Quantization(bits, 32, symmetric, 1)
    result = dequantize(quantize(matrix, form), 32, form)
    assert torch.isfinite(result[0]).all()
    assert not torch.isfinite(result[1]).all()


def product_of(quantized: QuantizedMatrix, columns: int, form: Quantization, x: np.ndarray) -> np.ndarray:
    """x (M, C) times the transposed matrix, computed by ONNX Runtime's operator."""
    parts: dict[str, Any] = {"blocks": quantized.blocks, "scales": quantized.scales, "zeros": quantized.zero_points}
    held = [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in parts.items() if t is not None]
    rows = quantized.scales.shape[0]
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *(t.name for t in held)],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=form.bits,
        block_size=form.block_size,
        accuracy_level=form.accuracy_level,
    )
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", float32, ["M", columns])],
        [onnx.helper.make_tensor_value_info("y", float32, ["M", rows])],
        held,
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@forms
@pytest.mark.parametrize(
    ("rows", "columns", "block_size"), [(48, 64, 16), (33, 80, 32), (64, 96, 32), (16, 256, 128), (5, 48, 64)]
)
def test_onnxruntime_computes_with_the_same_numbers(
    rows: int, columns: int, block_size: int, bits: int, symmetric: bool
) -> None:
    """With float32 activations (accuracy_level 1); one row of them, as in decoding, and several."""
    form = Quantization(bits, block_size, symmetric, accuracy_level=1)
    quantized = quantize(random_matrix(rows, columns), form)
    values = dequantize(quantized, columns, form).double().numpy()
    for batch in (1, 7):
        x = np.random.default_rng(batch).standard_normal((batch, columns)).astype(np.float32)
        expected = x.astype(np.float64) @ values.T
        size = np.abs(x.astype(np.float64)) @ np.abs(values).T
        assert (np.abs(product_of(quantized, columns, form, x) - expected) <= 2e-6 * size).all()


@pytest.mark.parametrize(("bits", "symmetric"), list(product((4, 8), (True, False))))
def test_int8_activations_come_near(bits: int, symmetric: bool) -> None:
    form = Quantization(bits, 32, symmetric, accuracy_level=4)
    quantized = quantize(random_matrix(48, 128), form)
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    expected = x @ dequantize(quantized, 128, form).numpy().T
    error = np.abs(product_of(quantized, 128, form, x) - expected).max() / np.abs(expected).max()
    assert error < 0.02
