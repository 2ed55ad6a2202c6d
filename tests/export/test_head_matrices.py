"""Which matrices of the heads are quantised, and what the passes make of their layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir
import pytest

from cosmos_export.errors import ExportError
from cosmos_export.model.loading import model_skeleton
from cosmos_export.onnx.head_matrices import is_wide
from cosmos_export.onnx.passes import QuantizeHeads, WriteMemoryLast, run_passes
from cosmos_export.onnx.quantize import Quantization
from cosmos_export.onnx.signature import graph_spec, parts_of, quantized_part
from cosmos_export.onnx.trace import trace, traceable
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import CAPABILITIES, DECODER

from .capability_models import small_config

FORM = Quantization(bits=4, block_size=16, symmetric=True, accuracy_level=4)
INT4 = replace(ExportRecipe.load("cpu-int4"), quantization=FORM, embedding=FORM, overrides={}, calibration=None)
FP32 = ExportRecipe.load("cpu-fp32")


@pytest.mark.parametrize("dim", [256, 1024])
def test_wide_matrices_are_those_as_wide_as_the_model_on_both_sides(dim: int) -> None:
    """But for two that only go into tables and the table of values; the one of keys is as narrow as a head."""
    model = model_skeleton(small_config(dim=dim))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wide = {
        name
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and min(tensor.shape) >= dim // 2 and not name.startswith(("layers.", "tok_", "rope."))
    }
    into_tables = {
        "memory_system.semantic_memory.concept_embeddings",
        "memory_system.semantic_memory.concept_attention.in_proj_weight",
    }
    keys, values = (f"memory_system.semantic_memory.concept_{part}.weight" for part in ("keys", "values"))
    assert {name for name in tensors if is_wide(name)} == {keys} | wide - {values} - into_tables


def test_heads_may_be_stored_in_a_way_of_their_own() -> None:
    eight = replace(FORM, bits=8)
    recipe = replace(INT4, overrides={"heads": eight})
    assert recipe.form_of("capability_fusion.0.weight") == eight
    assert recipe.form_of("layers.0.feed_forward.w2.weight") == FORM
    assert recipe.form_of("capability_fusion.1.weight") is None
    assert recipe.form_of("safety_system.privacy_protector.pii_detector.2.weight") is None


def traced(recipe: ExportRecipe) -> ir.Model:
    """The decoder of a small model with all heads, before any pass."""
    config = small_config(head_dim=16)
    spec = graph_spec(DECODER, config, recipe.opset, capabilities=CAPABILITIES)
    model = traceable(config, recipe.activations, fused_attention=True, capabilities=CAPABILITIES)
    return trace(model, DECODER, spec, fused_attention=True)


@pytest.fixture(scope="module")
def fresh() -> ir.Model:
    return traced(INT4)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()


def matrices(model: ir.Model) -> list[str]:
    """Sources of quantised matrices, each as often as it is stored."""
    names = [quantized_part(name) for name in model.graph.initializers]
    return sorted(part for source, kind in names if kind == "blocks" for part in parts_of(source))


def test_layers_of_one_input_are_one_product_and_each_matrix_is_stored_once(fresh: ir.Model) -> None:
    model = run_passes(fresh.clone(), INT4)
    stored = [name for name in matrices(model) if is_wide(name)]
    assert stored == sorted(set(stored))
    gemms = [node for node in all_nodes(model) if node.op_type == "Gemm"]
    assert not [node.inputs[1].name for node in gemms if node.inputs[1] and is_wide(node.inputs[1].name or "")]
    of_decoder = ("layers.", "model/")
    products = [n for n in model.graph if n.op_type == "MatMulNBits" and not (n.name or "").startswith(of_decoder)]
    assert len(products) < 0.45 * len([n for n in fresh.graph.all_nodes() if _is_wide_layer(n)])


def _is_wide_layer(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and node.inputs[1] is not None and is_wide(node.inputs[1].name or "")


def test_an_own_product_has_no_split(fresh: ir.Model) -> None:
    model = run_passes(fresh.clone(), INT4)
    skills = [n for n in all_nodes(model) if n.op_type == "MatMulNBits" and "procedural_memory" in (n.name or "")]
    readers = {use.node.op_type for node in skills for use in node.outputs[0].uses()}
    assert len(skills) == 2
    assert "Split" not in readers


@pytest.mark.parametrize("recipe", [INT4, FP32], ids=["int4", "fp32"])
def test_a_second_run_changes_nothing(recipe: ExportRecipe, fresh: ir.Model) -> None:
    model = run_passes(fresh.clone(), recipe)
    for each in (QuantizeHeads(recipe), WriteMemoryLast()):
        assert not each(model).modified


def test_a_recipe_that_rounds_nothing_leaves_the_heads_alone(fresh: ir.Model) -> None:
    assert not QuantizeHeads(FP32)(run_passes(fresh.clone(), FP32)).modified


# The working memory, in place


def _depends(node: ir.Node, other: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return any(p is other or (p is not None and _depends(p, other)) for p in producers)


def _memory_nodes(model: ir.Model, operator: str) -> list[ir.Node]:
    nodes = [node for node in model.graph if node.op_type == operator and "working_memory" in (node.name or "")]
    assert nodes
    return nodes


def test_the_memory_is_written_after_all_that_read_it(fresh: ir.Model) -> None:
    model = run_passes(fresh.clone(), FP32)
    for write in _memory_nodes(model, "ScatterND"):
        state = write.inputs[0]
        assert state is not None
        assert state.is_graph_input()
        readers = [n for n in state.consumers() if n is not write and n.op_type != "Shape"]
        assert readers
        assert all(_depends(write, reader) for reader in readers)


def test_a_reader_that_may_come_after_the_write_is_refused(fresh: ir.Model) -> None:
    model = run_passes(fresh.clone(), FP32)
    state = next(value for value in model.graph.inputs if value.name == "past_memory.keys")
    model.graph.append(ir.node("Abs", [state], name="late"))
    with pytest.raises(ExportError, match=r"could overwrite past_memory\.keys before late"):
        WriteMemoryLast()(model)
