"""Traced graphs: their signature, what they hold and do not hold, and that they compute what the model does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from cosmos_export.bundle import write_graph
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ExportError
from cosmos_export.model.loading import load_decoder, random_checkpoint, skeleton
from cosmos_export.onnx.passes import run_passes
from cosmos_export.onnx.signature import graph_file, graph_spec, weights_file
from cosmos_export.onnx.trace import trace
from cosmos_export.onnx.weights import attach_weights
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime.manifest import FULL_SEQUENCE

MakeConfig = Callable[..., CosmosAdvancedConfig]

FP32 = ExportRecipe.load("fp32")


class Exported(NamedTuple):
    """A graph that was traced, given weights and written; and the eager model that it must equal."""

    path: Path
    opset: int
    checkpoint: Checkpoint
    eager: torch.nn.Module

    def run(self, ids: np.ndarray) -> np.ndarray:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"input_ids": ids})[0]


Variant = tuple[dict[str, Any], int, bool]

# What differs from the tiny geometry, the opset, and whether it is causal.
VARIANTS: dict[str, Variant] = {
    "opset 20": ({}, 20, True),
    "opset 23": ({"n_layers": 1, "n_heads": 6, "n_kv_heads": 3, "head_dim": 8}, 23, True),
    "both ways": ({"n_layers": 1, "n_kv_heads": 1}, 20, False),
    "one position": ({"n_layers": 1, "n_kv_heads": 4, "max_sequence_length": 1}, 20, True),
    "two positions": ({"n_layers": 1, "max_sequence_length": 2}, 20, True),
}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: Any, make_config: MakeConfig, tmp_path_factory: Any) -> Exported:
    changes, opset, causal = VARIANTS[request.param]
    checkpoint = random_checkpoint(make_config(**changes), name="tiny")
    graph = run_passes(
        trace(
            skeleton(checkpoint.config, causal=causal),
            FULL_SEQUENCE,
            graph_spec(FULL_SEQUENCE, checkpoint.config, opset),
        ),
        FP32,
    )
    attach_weights(graph, checkpoint, FP32)
    folder = tmp_path_factory.mktemp("graph")
    write_graph(folder, FULL_SEQUENCE, graph_file(FULL_SEQUENCE), graph)
    return Exported(folder / graph_file(FULL_SEQUENCE), opset, checkpoint, load_decoder(checkpoint, causal=causal))


def declared(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return value.name, dtype, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)


def test_inputs_outputs_and_axes_are_those_of_the_signature(exported: Exported) -> None:
    graph = onnx.load(exported.path, load_external_data=False).graph
    spec = graph_spec(FULL_SEQUENCE, exported.checkpoint.config, exported.opset)
    assert [declared(value) for value in graph.input] == [(t.name, t.dtype, t.shape) for t in spec.inputs]
    assert [declared(value) for value in graph.output] == [(t.name, t.dtype, t.shape) for t in spec.outputs]


def test_operators_are_standard_and_the_opset_is_as_asked(exported: Exported) -> None:
    model = onnx.load(exported.path, load_external_data=False)
    assert {(imported.domain, imported.version) for imported in model.opset_import} == {("", exported.opset)}
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions


def test_the_checker_is_content(exported: Exported) -> None:
    onnx.checker.check_model(exported.path, full_check=True)


@torch.inference_mode()
def test_the_graph_is_the_model_at_any_batch_and_length(exported: Exported) -> None:
    limit = exported.checkpoint.config.max_sequence_length
    generator = np.random.default_rng(0)
    sizes = {(1, 1), (3, 1), (1, limit), (5, limit), *((b, t) for b, t in ((1, 7), (4, 20), (2, 2)) if t <= limit)}
    for batch, length in sorted(sizes):
        ids = generator.integers(0, 96, (batch, length))
        expected = exported.eager(torch.from_numpy(ids)).numpy()
        logits = exported.run(ids)
        assert logits.shape == (batch, length, 96)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6, err_msg=f"{batch} x {length}")


def test_weights_are_stored_once_in_float32(exported: Exported) -> None:
    model = onnx.load(exported.path, load_external_data=False)
    config = exported.checkpoint.config
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inline = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    weights = sum(exported.checkpoint.tensor(name).numel() for name in exported.checkpoint.names)
    weights += 2 * config.max_sequence_length * config.head_dim // 2
    held = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims)]
    assert sum(int(np.prod(t.dims)) for t in held if "." in t.name) == weights
    assert len({(_external(t)["location"], _external(t)["offset"]) for t in external}) == len(external)
    sizes = {t.name: 4 * int(np.prod(t.dims)) for t in external}
    assert {t.name: int(_external(t)["length"]) for t in external} == sizes
    # The file holds these tensors and what aligns them, and nothing else.
    size = (exported.path.parent / weights_file(FULL_SEQUENCE)).stat().st_size
    assert sum(sizes.values()) <= size < sum(sizes.values()) + 4096 * len(external)
    assert all(np.prod(t.dims) * 4 <= 1024 for t in inline)


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def test_the_embedding_is_stored_once(exported: Exported) -> None:
    graph = onnx.load(exported.path).graph
    embedding = exported.checkpoint.tensor("tok_embeddings.weight").numpy()
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    holders = [name for name, array in arrays.items() if sorted(array.shape) == sorted(embedding.shape)]
    assert holders == ["tok_embeddings.weight"]
    np.testing.assert_array_equal(arrays["tok_embeddings.weight"], embedding)
    readers = [node.op_type for node in graph.node if "tok_embeddings.weight" in node.input]
    assert len(readers) == 2


def test_nothing_of_the_build_machine_is_in_the_graph(exported: Exported) -> None:
    content = exported.path.read_bytes()
    repository = Path(__file__).resolve().parents[2]
    here = {str(repository), str(Path(torch.__file__).parent), str(Path.home()), str(exported.path.parent)} - {"/"}
    traces = {"stack_trace", "Traceback", 'File "', ".py", "site-packages", "pkg.torch"}
    assert [text for text in here | traces if text.encode() in content] == []


def test_a_trace_itself_notes_where_it_was_made(tiny_trace: ir.Model) -> None:
    """Otherwise the test above could not fail."""
    assert b".py" in ir.to_proto(tiny_trace).SerializeToString()


def test_no_two_nodes_share_a_name(exported: Exported) -> None:
    names = [node.name for node in onnx.load(exported.path, load_external_data=False).graph.node]
    assert "layers.0.attention.q_proj/MatMul" in names
    assert len(set(names)) == len(names)


def test_a_trace_holds_no_weights(tiny_trace: ir.Model, tiny_checkpoint: Checkpoint) -> None:
    valueless = {value.name for value in tiny_trace.graph.initializers.values() if value.const_value is None}
    assert valueless == {*tiny_checkpoint.names, "rope.cos", "rope.sin"}
    held = [v.const_value for v in tiny_trace.graph.initializers.values() if v.const_value is not None]
    assert max(tensor.size for tensor in held) <= 8


def test_intermediate_values_have_named_axes(tiny_trace: ir.Model) -> None:
    """torch's own symbols (s72) mean nothing to a reader."""
    values = [*tiny_trace.graph.inputs, *(output for node in tiny_trace.graph for output in node.outputs)]
    dims = {str(dim) for v in values if v.shape is not None for dim in v.shape if not isinstance(dim, int)}
    assert dims - {"None"} == {"batch", "sequence"}


def test_a_graph_that_there_is_not_is_refused_with_those_there_are(tiny_config: CosmosAdvancedConfig) -> None:
    with pytest.raises(ExportError, match=r"'decode'.*full_sequence"):
        graph_spec("decode", tiny_config, 20)


def test_a_model_that_cannot_be_traced_is_an_export_error(tiny_config: CosmosAdvancedConfig) -> None:
    model = skeleton(tiny_config)
    model.hidden_states = lambda ids: model.tok_embeddings(ids[:, : int(ids.sum())])  # a length that depends on data
    with pytest.raises(ExportError, match=r"batch.*sequence"):
        trace(model, FULL_SEQUENCE, graph_spec(FULL_SEQUENCE, model.config, 20))


def test_an_initializer_of_another_type_is_refused(tiny_trace: ir.Model, tiny_checkpoint: Checkpoint) -> None:
    tiny_trace.graph.initializers["norm.weight"].dtype = ir.DataType.DOUBLE
    with pytest.raises(ExportError, match=r"norm\.weight.*float32"):
        attach_weights(tiny_trace, tiny_checkpoint, FP32)
