"""What an export tells the decoding kernels: the place of each weight, and what they cannot take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.loading import random_checkpoint
from cosmos_export.onnx.decode_kernels import why_not
from cosmos_export.onnx.passes import MultiplyByRows
from cosmos_export.onnx.weights import WeightReader, as_array
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import KERNELS_NAME, KernelSpec

from .hand_made_graphs import assert_left_alone, build, operators, run

CONFIG = CosmosAdvancedConfig(
    dim=256,
    n_layers=2,
    head_dim=64,
    hidden_dim=512,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=320,
    max_sequence_length=64,
)
RECIPES = ("cuda-fp16", "cuda-bf16", "cuda-int8", "cuda-int4")


@pytest.mark.parametrize("name", RECIPES)
def test_every_weight_is_where_the_description_says(name: str, tmp_path: Path) -> None:
    checkpoint, recipe = random_checkpoint(CONFIG, name="small"), ExportRecipe.load(name)
    bundle = export_bundle(checkpoint, tmp_path / name, recipe, effort=Effort.OFF)
    assert KERNELS_NAME in bundle.manifest.files
    spec = KernelSpec.from_json((bundle.path / KERNELS_NAME).read_text())
    stored = (bundle.path / spec.file).read_bytes()
    reader = WeightReader(checkpoint, recipe)
    names = [tensor.name for tensor in spec.tensors()]
    assert len(set(names)) == len(names)
    for tensor in spec.tensors():
        wanted = as_array(reader.read(tensor.name))
        assert (wanted.shape, str(wanted.dtype)) == (tensor.shape, tensor.dtype)
        assert stored[tensor.offset : tensor.offset + tensor.size] == wanted.tobytes(), tensor.name
    rows = (CONFIG.n_heads + 2 * CONFIG.n_kv_heads) * CONFIG.head_dim
    assert spec.layers[1].qkv.values.shape[0] == rows
    assert spec.layers[1].gate_up.values.shape[0] == 2 * CONFIG.hidden_dim


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("cuda-fp16", {}, None),
        ("cuda-int4", {}, None),
        ("cuda-int4", {"dim": 192}, "columns none of 128"),
        ("cuda-fp16", {"dim": 192}, None),
        ("cuda-fp16", {"head_dim": 48}, "head_dim 48 is none of"),
        ("cuda-fp16", {"n_heads": 32}, "more than 8 heads"),
        ("cuda-fp16", {"vocab_size": 321}, "no multiple of 8"),
        ("cpu-fp32", {}, "activations are float32"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(recipe: str, changes: dict[str, int], said: str | None) -> None:
    config = CosmosAdvancedConfig(**{**CONFIG.to_dict(), **changes})
    reason = why_not(config, ExportRecipe.load(recipe))
    assert (reason is None) if said is None else (reason is not None and said in reason)


def test_a_form_of_quantisation_that_they_have_not() -> None:
    recipe = ExportRecipe.load("cuda-int8")
    assert recipe.quantization is not None
    wide = replace(recipe, quantization=replace(recipe.quantization, block_size=64))
    assert "8 bits in blocks of 64" in str(why_not(CONFIG, wide))


def by_rows(body: str, **names: str) -> ir.Model:
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    return build(body, {"w": weight}, valued=False, inputs="float[B, T, 4] x", names=names)


def test_a_product_reads_the_matrix_in_torchs_order() -> None:
    model = by_rows("y = MatMul(x, w)", w="a.weight.transposed")
    assert MultiplyByRows()(model).modified
    assert operators(model) == ["FusedMatMul"]
    (stored,) = model.graph.initializers.values()
    assert (stored.name, list(stored.shape or ())) == ("a.weight", [3, 4])
    weight = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    stored.const_value = ir.tensor(weight, name=stored.name)
    x = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(run(model, x=x), x @ weight.T, rtol=1e-5)
    assert not MultiplyByRows()(model).modified


@pytest.mark.parametrize(
    ("body", "name"),
    [("y = MatMul(x, w)", "a.weight"), ("z = MatMul(x, w) t = Transpose(w) y = MatMul(z, t)", "a.weight.transposed")],
)
def test_other_products_stay(body: str, name: str) -> None:
    """Of a matrix that is not stored transposed, or that has another reader."""
    assert_left_alone(MultiplyByRows(), by_rows(body, w=name))
