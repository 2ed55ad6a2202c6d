"""Bundles that compute in half precision: proven on the CPU where it has kernels, looked at where it has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import ExportError
from cosmos_export.model.loading import load_decoder
from cosmos_export.parity.gates import Arithmetic, Verdict
from cosmos_export.parity.overflow import largest_activations, near_overflow
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe

FLOAT, FLOAT16, BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


@pytest.mark.parametrize("recipe", ["cpu-fp16", "cuda-fp16", "cuda-int8", "cuda-int4"])
def test_float16_is_proven(recipe: str, gentle_checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export_bundle(gentle_checkpoint, tmp_path / "out", ExportRecipe.load(recipe))
    report = bundle.report
    assert report is not None
    assert report.passed
    assert {case.arithmetic for case in report.cases} == {Arithmetic.FLOAT16}
    assert report.longest == gentle_checkpoint.config.max_sequence_length
    assert report.warnings == ()
    graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types["logits"] == FLOAT
    assert {kind for name, kind in types.items() if "key" in name or "value" in name} == {FLOAT16}
    assert FLOAT not in {initializer.data_type for initializer in graph.initializer}


def test_bfloat16_is_stored_as_it_should_be(gentle_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The CPU has no kernels for it: what the graph is, and that the stored numbers are the checkpoint's."""
    from cosmos_export.parity.stored import compare_stored

    recipe = ExportRecipe.load("cuda-bf16")
    bundle = export_bundle(gentle_checkpoint, tmp_path / "out", recipe, effort=Effort.OFF)
    stored = compare_stored(bundle.path / "model.onnx", gentle_checkpoint, recipe)
    assert stored.passed, stored.problems
    graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
    kinds = {i.data_type for i in graph.initializer if i.data_type in (FLOAT, FLOAT16, BFLOAT16)}
    assert kinds == {BFLOAT16}
    size = (bundle.path / "model.onnx.data").stat().st_size
    assert size < 2.2 * bundle.manifest.model["parameters"] + 64 * 16 * 2


def test_a_wrong_graph_fails_the_float16_gate(small_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Another seed's weights, and one layer's gate and up exchanged, are far outside."""
    bundle = export_bundle(small_checkpoint, tmp_path / "out", ExportRecipe.load("cpu-fp16"), effort=Effort.OFF)
    tensors = {name: small_checkpoint.tensor(name) for name in small_checkpoint.names}
    w1, w3 = "layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w3.weight"
    other = Checkpoint.from_tensors(
        small_checkpoint.config, tensors | {w1: tensors[w3], w3: tensors[w1]}, dict(small_checkpoint.origin)
    )
    report = verify_bundle(bundle.path, other, effort=Effort.QUICK)
    assert not report.passed
    assert report.count(Verdict.FAIL) > 0


def test_weights_beyond_float16_are_refused(small_checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = {name: small_checkpoint.tensor(name).clone() for name in small_checkpoint.names}
    tensors["layers.1.attention.o_proj.weight"][3, 4] = 7e4
    loud = Checkpoint.from_tensors(small_checkpoint.config, tensors, dict(small_checkpoint.origin))
    with pytest.raises(ExportError, match=r"layers\.1\.attention\.o_proj\.weight has values up to 7e\+04.*bfloat16"):
        export_bundle(loud, tmp_path / "out", ExportRecipe.load("cpu-fp16"), effort=Effort.OFF)
    assert list(tmp_path.iterdir()) == []


def test_the_overflow_scan_names_the_layer(small_checkpoint: Checkpoint) -> None:
    tensors = {name: small_checkpoint.tensor(name).clone() for name in small_checkpoint.names}
    tensors["layers.1.feed_forward.w2.weight"] *= 3e5
    loud = Checkpoint.from_tensors(small_checkpoint.config, tensors, dict(small_checkpoint.origin))
    rows = [np.arange(40)[None] % 160]
    near = near_overflow(load_decoder(loud), rows)
    assert "output of layers.1.feed_forward.w2" in {activation.where for activation in near}
    assert all("layers.1" in activation.where or "norm" in activation.where for activation in near)
    assert near[0].largest > 65504 / 4
    assert "of float16's 65,504" in str(near[0])
    quiet = load_decoder(small_checkpoint)
    assert near_overflow(quiet, rows) == []
    names = {activation.where for activation in largest_activations(quiet, rows)}
    assert {"output of tok_embeddings", "input of layers.0.feed_forward.w2", "output of layers.1"} <= names
