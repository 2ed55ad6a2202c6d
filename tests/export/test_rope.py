"""Rotary embedding: the tables' values and precision, what a rotation preserves, and the report's failing shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model import CosmosDecoder
from cosmos_export.model.loading import skeleton
from cosmos_export.model.rope import RotaryTable, rotary_tables, rotate

GEOMETRIES = pytest.mark.parametrize(
    ("head_dim", "theta", "length"), [(2, 10000.0, 5), (16, 10000.0, 64), (128, 10000.0, 8192), (64, 500000.0, 300)]
)


@GEOMETRIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_have_a_row_per_position_and_a_column_per_pair(
    head_dim: int, theta: float, length: int, dtype: torch.dtype
) -> None:
    for table in rotary_tables(head_dim, theta, length, dtype):
        assert table.shape == (length, head_dim // 2)
        assert table.dtype == dtype


@GEOMETRIES
def test_tables_are_the_formula(head_dim: int, theta: float, length: int) -> None:
    cos, sin = (table.numpy() for table in rotary_tables(head_dim, theta, length, torch.float64))
    # The row of position 1 shows the inverse frequencies themselves: float32 numbers, right to float32's last bits.
    inverse = np.arctan2(sin[1], cos[1])
    np.testing.assert_allclose(inverse, inverse.astype(np.float32).astype(np.float64), rtol=1e-15)
    np.testing.assert_allclose(inverse, float(theta) ** -(np.arange(0, head_dim, 2) / head_dim), rtol=1.5e-7)
    # From there on everything is float64: no position may be off by more than its rounding.
    angles = np.arange(length)[:, None] * inverse.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=3e-16)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=3e-16)


@GEOMETRIES
def test_float32_tables_are_the_float64_ones_rounded_once(head_dim: int, theta: float, length: int) -> None:
    exact = rotary_tables(head_dim, theta, length, torch.float64)
    single = rotary_tables(head_dim, theta, length, torch.float32)
    for wide, narrow in zip(exact, single, strict=True):
        assert torch.equal(narrow, wide.float())


def tables(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return module.rope.cos, module.rope.sin


def assert_tables(module: torch.nn.Module, dtype: torch.dtype) -> None:
    config = module.config
    expected = rotary_tables(config.head_dim, config.rope_theta, config.max_sequence_length, dtype)
    for table, wanted in zip(tables(module), expected, strict=True):
        assert table.dtype == dtype
        assert table.device.type == "cpu"
        assert torch.equal(table, wanted)


def test_a_float64_model_has_tables_that_were_never_rounded(tiny_config: CosmosAdvancedConfig) -> None:
    model = CosmosDecoder(tiny_config).double()
    assert_tables(model, torch.float64)
    assert not torch.equal(model.rope.cos, model.rope.cos.float().double())
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrower_models_keep_float32_tables(tiny_config: CosmosAdvancedConfig, dtype: torch.dtype) -> None:
    model = CosmosDecoder(tiny_config).to(dtype)
    assert_tables(model, torch.float32)
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype == dtype


def test_precision_that_was_left_comes_back(tiny_config: CosmosAdvancedConfig) -> None:
    assert_tables(CosmosDecoder(tiny_config).half().double(), torch.float64)
    assert_tables(CosmosDecoder(tiny_config).double().float(), torch.float32)


def test_a_skeleton_has_shapes_only(tiny_config: CosmosAdvancedConfig) -> None:
    for table in tables(skeleton(tiny_config)):
        assert table.is_meta
        assert table.shape == (64, 8)


def test_a_model_moved_to_the_meta_device_has_its_tables_there(tiny_config: CosmosAdvancedConfig) -> None:
    model = CosmosDecoder(tiny_config).to("meta")
    assert all(table.is_meta for table in tables(model))
    assert model(torch.zeros(1, 3, dtype=torch.int64, device="meta")).shape == (1, 3, 96)


def test_tables_heal_on_the_way_back_from_the_meta_device(tiny_config: CosmosAdvancedConfig) -> None:
    assert_tables(skeleton(tiny_config).to_empty(device="cpu"), torch.float32)
    assert_tables(CosmosDecoder(tiny_config).to("meta").to_empty(device="cpu"), torch.float32)


def test_float64_tables_heal_as_float64(tiny_config: CosmosAdvancedConfig) -> None:
    assert_tables(CosmosDecoder(tiny_config).double().to("meta").to_empty(device="cpu"), torch.float64)
    assert_tables(skeleton(tiny_config).double().to_empty(device="cpu"), torch.float64)


def test_tables_are_in_no_state_dict(tiny_config: CosmosAdvancedConfig) -> None:
    assert not [name for name in CosmosDecoder(tiny_config).state_dict() if "rope" in name]


def test_a_slice_of_positions() -> None:
    table = RotaryTable(8, 10000.0, 10)
    cos, sin = table(3, 7)
    assert torch.equal(cos, table.cos[3:7])
    assert torch.equal(sin, table.sin[3:7])


vectors = st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).standard_normal((2, 1, 1, 1, 16)))
positions = st.integers(0, 40)


def turned(vector: np.ndarray, position: int) -> torch.Tensor:
    """One head vector of width 16, turned by the angles of `position`."""
    cos, sin = rotary_tables(16, 10000.0, 128, torch.float64)
    return rotate(torch.from_numpy(vector), cos[position : position + 1], sin[position : position + 1]).flatten()


@given(vectors, positions)
def test_rotation_preserves_norms(pair: np.ndarray, position: int) -> None:
    assert turned(pair[0], position).norm().item() == pytest.approx(np.linalg.norm(pair[0]), rel=1e-14)


@given(vectors, positions, positions, positions)
def test_scores_depend_on_the_distance_only(pair: np.ndarray, query: int, key: int, shift: int) -> None:
    here = turned(pair[0], query) @ turned(pair[1], key)
    there = turned(pair[0], query + shift) @ turned(pair[1], key + shift)
    assert there.item() == pytest.approx(here.item(), abs=1e-12)


def test_scores_do_depend_on_the_distance() -> None:
    vector = np.ones((1, 1, 1, 16))
    assert turned(vector, 5) @ turned(vector, 5) - turned(vector, 5) @ turned(vector, 9) > 0.1


def rotated_by_numpy(x: np.ndarray, theta: float) -> np.ndarray:
    """x (B, T, H, E): the pair (i, i + E/2) is a complex number, and position t multiplies it by e^(i t f_i)."""
    length, width = x.shape[1], x.shape[3]
    frequencies = (1 / theta ** (np.arange(0, width, 2) / width)).astype(np.float32).astype(np.float64)
    turns = np.exp(1j * np.arange(length)[:, None] * frequencies)  # (T, E/2)
    pairs = x[..., : width // 2] + 1j * x[..., width // 2 :]
    out = np.empty_like(pairs)
    for position in range(length):
        out[:, position] = pairs[:, position] * turns[position]
    return np.concatenate([out.real, out.imag], axis=-1)


# The geometry at which the first published code failed: its tables broadcast against the head axis ("size of tensor a
# (16) must match size of tensor b (40)"), and attention failed likewise at 10 tokens.
REPORT = {"dim": 1024, "n_heads": 16, "n_kv_heads": 4, "head_dim": 128}


@pytest.mark.parametrize("length", [40, 10, 16, 4])
def test_every_head_of_a_position_turns_by_its_angle(length: int) -> None:
    # 16 and 4 are the head counts: there, tables along the wrong axis would not fail but be wrong.
    cos, sin = RotaryTable(128, 10000.0, 8192).double()(0, length)
    generator = np.random.default_rng(0)
    for heads in (REPORT["n_heads"], REPORT["n_kv_heads"]):
        x = generator.standard_normal((2, length, heads, 128))
        result = rotate(torch.from_numpy(x), cos, sin)
        assert result.shape == (2, length, heads, 128)
        # 1e-5: numpy rounds an inverse frequency to float32 elsewhere than torch's float32 power does
        np.testing.assert_allclose(result.numpy(), rotated_by_numpy(x, 10000.0), atol=1e-5)
        np.testing.assert_array_equal(result[:, 0].numpy(), x[:, 0])


@pytest.fixture(scope="module")
def report_model() -> CosmosDecoder:
    config = CosmosAdvancedConfig(**REPORT, n_layers=1, hidden_dim=64, vocab_size=50, max_sequence_length=64)
    return CosmosDecoder(config).eval()


@torch.inference_mode()
@pytest.mark.parametrize(("batch", "length"), [(2, 40), (1, 10), (1, 40), (2, 16), (4, 4), (1, 1)])
def test_the_failing_shapes_of_the_report_run(report_model: CosmosDecoder, batch: int, length: int) -> None:
    ids = torch.arange(batch * length).reshape(batch, length) % 50
    logits = report_model(ids)
    assert logits.shape == (batch, length, 50)
    assert logits.isfinite().all()
    # A row of a batch is the row alone: nothing leaks across the axes that were confused.
    torch.testing.assert_close(logits[-1:], report_model(ids[-1:]), rtol=0, atol=1e-5)
