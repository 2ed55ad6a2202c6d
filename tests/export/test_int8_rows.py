"""PyTorch's dynamic quantisation: what is stored, and that `round_to_7_bits` is what its products do to their input."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.loading import load_decoder, random_checkpoint
from cosmos_export.torch_programs.products import PackedLinear, with_int8_products
from cosmos_export.torch_programs.rows import QuantizedRows, quantize_rows, round_to_7_bits


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dynamic_product(x: Tensor, rows: QuantizedRows) -> Tensor:
    """PyTorch's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.ops.quantized.linear_prepack(rows.as_quantized(), None)
        product: Tensor = torch.ops.quantized.linear_dynamic(x, packed, reduce_range=True)
    return product


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (48, 33), (7, 256)])
def test_each_value_gets_the_nearest_level_of_its_row(rows: int, columns: int) -> None:
    weight = random(rows, columns) * torch.logspace(-3, 3, rows)[:, None]
    quantized = quantize_rows(weight)
    assert (quantized.levels.dtype, quantized.levels.shape) == (torch.int8, weight.shape)
    assert (quantized.scales.dtype, quantized.scales.shape) == (torch.float64, (rows,))
    assert quantized.levels.abs().amax(1).tolist() == [127] * rows, "the largest value has the last level"
    possible = torch.arange(-127, 128) * quantized.scales[:, None]  # (rows, 255)
    nearest = (weight.double()[..., None] - possible[:, None]).abs().amin(-1)
    error = (weight.double() - quantized.levels * quantized.scales[:, None]).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-9, atol=1e-12)


def test_a_row_of_zeros_stays_zero_beside_others() -> None:
    weight = random(3, 8)
    weight[1] = 0
    quantized = quantize_rows(weight)
    assert bool(quantized.scales.isfinite().all())
    assert not bool(quantized.values()[1].any())
    assert bool(quantized.values()[[0, 2]].any(1).all())


def test_rows_are_quantised_each_for_itself() -> None:
    weight = random(6, 20)
    together = quantize_rows(weight)
    for row in range(6):
        alone = quantize_rows(weight[row : row + 1])
        assert torch.equal(alone.levels[0], together.levels[row])
        assert torch.equal(alone.scales[0], together.scales[row])


def test_the_values_are_those_of_a_packed_matrix() -> None:
    """Which keeps its scales in float32."""
    quantized = quantize_rows(random(40, 33))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.ops.quantized.linear_prepack(quantized.as_quantized(), None)
        matrix, _ = torch.ops.quantized.linear_unpack(packed)
        assert torch.equal(matrix.dequantize(), quantized.values())


INPUTS = {
    "both signs": lambda: random(7, 33),
    "above zero": lambda: random(7, 33).abs() + 3,
    "below zero": lambda: -random(7, 33).abs() - 3,
    "one row": lambda: random(1, 33),
    "three axes": lambda: random(2, 3, 33),
    "an outlier": lambda: torch.cat((random(6, 33), 100 * random(1, 33))),
    "small": lambda: 1e-2 * random(7, 33),
    "below the smallest step": lambda: 1e-3 * random(7, 33),
    "nearly all below the smallest step": lambda: 1e-5 * random(7, 33),
    "below it and above zero": lambda: 1e-3 * random(7, 33).abs(),
    "below it and below zero": lambda: -1e-3 * random(7, 33).abs(),
    "one value": lambda: torch.full((2, 33), 0.7),
    "zeros": lambda: torch.zeros(2, 33),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_a_dynamic_product_is_a_plain_one_with_a_rounded_input(make: Any) -> None:
    """Levels that differ by one anywhere would show: a step is a 127th of the range, the tolerance far less."""
    x, rows = make(), quantize_rows(random(48, 33, seed=1))
    expected = F.linear(round_to_7_bits(x).double(), rows.values().double())
    size = F.linear(round_to_7_bits(x).abs().double(), rows.values().abs().double())
    error = (dynamic_product(x, rows).double() - expected).abs()
    assert bool((error <= 1e-5 * size + 1e-12).all())


def test_the_input_as_a_product_reads_it_is_the_rounded_one() -> None:
    """With the identity as its matrix, a product gives what became of each value."""
    x, identity = random(50, 33, seed=4), quantize_rows(torch.eye(33))
    torch.testing.assert_close(dynamic_product(x, identity), round_to_7_bits(x), rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 16),
    columns=st.integers(1, 40),
    magnitude=st.sampled_from([1e-1, 1.0, 1e4]),
    shift=st.sampled_from([0.0, 2.0, -5.0]),
)
def test_rounding_has_128_levels_with_zero_among_them(seed: int, columns: int, magnitude: float, shift: float) -> None:
    x = magnitude * (random(3, columns, seed=seed) + shift)
    rounded = round_to_7_bits(x)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = max((high - low) / 127, 6.1e-5)
    levels = rounded.double() / step
    assert float((levels - levels.round()).abs().max()) < 1e-3
    assert float(levels.max() - levels.min()) < 127.01
    # Zero has a level, and what that moves the ends of the range by is half a step.
    assert float((rounded - x).abs().max()) <= 1.01 * step
    assert not bool(round_to_7_bits(torch.cat((x, torch.zeros(1, columns))))[-1].any())


def test_the_range_is_the_whole_tensors() -> None:
    """What makes it coarse: one large value takes the levels of all others."""
    x = random(2, 33)
    louder = torch.cat((x, torch.full((1, 33), 1000.0)))
    assert float((round_to_7_bits(x) - x).abs().max()) < 0.05
    assert float((round_to_7_bits(louder)[:2] - x).abs().max()) > 1


def test_which_products_are_quantised(tiny_config: CosmosAdvancedConfig) -> None:
    """A matrix whose inputs are very unequal, and the large output projection, stay as they are."""
    checkpoint = random_checkpoint(tiny_config, name="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = with_int8_products(load_decoder(checkpoint))
        kinds = {
            name: getattr(module, "original_name", type(module).__name__)
            for name, module in model.named_modules()
            if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3", "logits")
        }
    packed = PackedLinear.__name__
    assert {name for name, kind in kinds.items() if kind == packed} == {
        "layers.0.feed_forward.w2",
        "layers.1.feed_forward.w2",
        "logits",
    }
    assert {kind for name, kind in kinds.items() if kind != packed} == {"Linear"}
    assert len(kinds) == 2 * 7 + 1
    quantised = model.get_submodule("layers.0.attention.q_proj")
    values = quantize_rows(checkpoint.tensor("layers.0.attention.q_proj.weight")).values()
    assert torch.equal(quantised.weight().dequantize(), values)  # type: ignore[operator]
