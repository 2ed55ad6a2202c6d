"""Weights on their way into a bundle: piece by piece they are the same numbers as whole, and nothing is held."""

import io
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import cosmos_export.onnx.quantize as quantization
import cosmos_export.onnx.weights as weights
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.loading import random_checkpoint
from cosmos_export.onnx.passes import run_passes
from cosmos_export.onnx.quantize import Quantization, quantize
from cosmos_export.onnx.weights import WeightReader, attach_weights
from cosmos_export.recipe import ExportRecipe
from cosmos_export.threads import map_in_threads
from cosmos_runtime import CAPABILITIES

W1_W3, Q_PROJ = "layers.0.feed_forward.w1_w3.weight", "layers.1.attention.q_proj.weight"
INITIALIZERS = ["tok_embeddings.weight", W1_W3, f"{W1_W3}.transposed", f"{Q_PROJ}.transposed", "norm.weight"]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Quantising in pieces


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("bits", "symmetric"), list(product((4, 8), (True, False))))
def test_pieces_of_any_size_give_the_same_bits(
    count: int, bits: int, symmetric: bool, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(37, 200, generator=torch.Generator().manual_seed(1))
    matrix[3], matrix[5, 7], matrix[9] = 0, float("nan"), matrix[9] * 1e-40
    form = Quantization(bits, 32, symmetric, 1)
    threads(1)
    monkeypatch.setattr(quantization, "_VALUES_AT_ONCE", 1 << 30)
    whole = quantize(matrix, form)
    threads(count)
    for values in (1, 200, 450, 3000):
        monkeypatch.setattr(quantization, "_VALUES_AT_ONCE", values)
        pieces = quantize(matrix, form)
        for part in ("blocks", "scales", "zero_points"):
            assert same_bits(getattr(pieces, part), getattr(whole, part)), (values, part)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_quantised_from_their_float32_values(dtype: torch.dtype) -> None:
    matrix, form = torch.randn(6, 64).to(dtype), Quantization(4, 32, True, 1)
    assert same_bits(quantize(matrix, form).blocks, quantize(matrix.float(), form).blocks)


def test_parameters_that_are_trained_are_quantised_without_a_history() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 32))
    assert not quantize(parameter, Quantization(4, 32, True, 1)).scales.requires_grad


# Threads


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_order_and_work_on_one_thread_each(count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    assert list(map_in_threads(lambda i: i * i, range(50))) == [i * i for i in range(50)]
    assert set(map_in_threads(lambda _: torch.get_num_threads(), range(10))) == {1}
    assert torch.get_num_threads() == count


def test_no_more_is_taken_than_is_worked_on(threads: Callable[[int], None]) -> None:
    threads(2)
    taken: list[int] = []
    results = map_in_threads(lambda i: i, (taken.append(i) or i for i in range(1000)))
    next(results)
    assert len(taken) <= 8


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_the_work_is_the_callers(count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(lambda i: 1 // (3 - i), range(6)))
    assert torch.get_num_threads() == count


# Initializers


@pytest.mark.parametrize("recipe", ["portable-fp32", "cuda-bf16", "cuda-fp16"])
@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_pieces_are_the_whole(
    tiny_checkpoint: Checkpoint, recipe: str, initializer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = WeightReader(tiny_checkpoint, ExportRecipe.load(recipe))
    whole = reader.read(initializer)
    monkeypatch.setattr(weights, "_VALUES_AT_ONCE", 100)
    monkeypatch.setattr(weights, "_TURNED_AT_ONCE", 100)
    pieces = list(reader.pieces(initializer))
    assert torch.equal(torch.cat(pieces), whole)
    if "transposed" not in initializer:
        assert max(piece.numel() for piece in pieces) <= max(100, whole[:1].numel())
    source = initializer.removesuffix(".transposed")
    parts = [tiny_checkpoint.tensor(name) for name in weights.parts_of(source)]
    expected = torch.cat(parts).to(whole.dtype)
    assert torch.equal(whole, expected.T if "transposed" in initializer else expected)


def test_what_is_written_is_what_is_read(tiny_checkpoint: Checkpoint, tiny_trace: ir.Model) -> None:
    recipe = ExportRecipe.load("fp32")
    graph = run_passes(tiny_trace, recipe)
    attach_weights(graph, tiny_checkpoint, recipe)
    for name, value in graph.graph.initializers.items():
        assert value.const_value is not None
        file = io.BytesIO()
        value.const_value.tofile(file)
        assert file.getvalue() == value.const_value.tobytes(), name
        assert len(file.getvalue()) == value.const_value.nbytes
        np.testing.assert_array_equal(value.const_value.numpy().tobytes(), file.getvalue())


# Random weights


def test_random_weights_are_drawn_when_they_are_read(
    make_config: Callable[..., CosmosAdvancedConfig], threads: Callable[[int], None]
) -> None:
    """A model of 270 GB is there at once; a tensor of it is the same whoever reads it, and after whichever other."""
    huge = random_checkpoint(make_config(dim=1 << 14, vocab_size=1 << 22), name="huge")
    assert sum(torch.Size(stored.shape).numel() for stored in huge.stored.values()) > 1 << 35
    config = make_config(vocab_size=80_000)  # more than a generator draws
    checkpoint, again = random_checkpoint(config, name="x", seed=3), random_checkpoint(config, name="x", seed=3)
    threads(2)
    drawn = checkpoint.tensor("tok_embeddings.weight")
    threads(1)
    again.tensor(Q_PROJ)
    assert torch.equal(again.tensor("tok_embeddings.weight"), drawn)
    assert torch.equal(checkpoint.tensor("tok_embeddings.weight"), drawn)
    assert drawn.unique().numel() > 0.5 * drawn.numel()  # no generator repeats another
    assert abs(float(drawn.std()) - 0.02) < 1e-4


def test_tensors_of_one_shape_differ(tiny_checkpoint: Checkpoint) -> None:
    first, second = (tiny_checkpoint.tensor(f"layers.{i}.attention.q_proj.weight") for i in (0, 1))
    assert not torch.equal(first, second)


def test_heads_do_not_change_the_backbone(tiny_config: CosmosAdvancedConfig) -> None:
    plain = random_checkpoint(tiny_config, name="x", seed=4)
    heads = random_checkpoint(tiny_config, name="x", seed=4, capabilities=CAPABILITIES)
    assert all(torch.equal(plain.tensor(name), heads.tensor(name)) for name in plain.names)
    assert len(heads.names) > len(plain.names)
