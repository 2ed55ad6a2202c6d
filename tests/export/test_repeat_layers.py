"""One traced layer and copies of it are the graph that a trace of all layers gives."""

import ast
import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import onnx_ir as ir
import pytest

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.onnx import trace as tracing
from cosmos_export.onnx.passes import NameByModule
from cosmos_export.onnx.repeat_layers import SCOPES, LayerNotFoundError, repeat_layer, spec_of_first_layer
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.onnx.trace import trace, trace_whole, traceable
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import DEVICE_LOOP, GraphSpec

MakeConfig = Callable[..., CosmosAdvancedConfig]


class Case(NamedTuple):
    """What is traced: a recipe's graph of a geometry, perhaps with heads."""

    recipe: str
    changes: dict[str, Any]
    causal: bool = True
    heads: tuple[str, ...] | None = None
    fused: bool = False

    @property
    def graph(self) -> str:
        return ExportRecipe.load(self.recipe).graphs[0]


CASES = {
    "full sequence, both ways": Case("fp32", {"n_layers": 3, "n_kv_heads": 1}, causal=False),
    "standard attention": Case("portable-fp32", {"n_layers": 3, "n_heads": 6, "n_kv_heads": 3, "head_dim": 8}),
    "fused attention": Case("cpu-fp32", {"n_layers": 4}, fused=True),
    "half precision": Case("cpu-fp16", {"n_layers": 2, "head_dim": 8}),
    "told lengths": Case("cuda-bf16", {"n_layers": 3}, fused=True),
    "heads": Case("cpu-int4-quick", {"n_layers": 2, "dim": 64}, heads=("evaluation",), fused=True),
}


@pytest.fixture(params=CASES)
def case(request: Any) -> Case:
    return CASES[request.param]


def signature(case: Case, config: CosmosAdvancedConfig) -> GraphSpec:
    recipe = ExportRecipe.load(case.recipe)
    by_lengths = DEVICE_LOOP in recipe.graphs and case.heads is None
    return graph_spec(
        case.graph,
        config,
        recipe.opset,
        activations=recipe.activations,
        by_lengths=by_lengths,
        capabilities=case.heads,
        on_demand=recipe.branches,
    )


def traced_by(how: Callable[..., ir.Model], case: Case, config: CosmosAdvancedConfig) -> ir.Model:
    recipe = ExportRecipe.load(case.recipe)
    model = traceable(
        config, recipe.activations, causal=case.causal, fused_attention=case.fused, capabilities=case.heads
    )
    return how(model, case.graph, signature(case, config), fused_attention=case.fused)


def lines(model: ir.Model) -> list[str]:
    """All that a graph says, a fact a line, with what a trace has numbered (values, constants, nodes that come from no
    module) numbered anew, in order. Names that a reader of a bundle meets stay: inputs, outputs, weights, modules.
    The model itself is changed so."""
    _ask_first_inputs(model.graph)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    numbers = itertools.count()
    for value in list(model.graph.initializers.values()):
        if value.const_value is not None and not value.is_graph_input():
            value.name = f"constant {next(numbers)}"
    for node in model.graph.all_nodes():
        if "node_" in str(node.name):
            node.name = f"node {next(numbers)}"
        modules = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1]  # the last is numbered, too
        node.metadata_props.clear()
        node.metadata_props["modules"] = str(modules)
        for value in node.outputs:
            value.metadata_props.clear()
            value.name = str(value.name) if value in model.graph.outputs else f"value {next(numbers)}"
    return str(ir.to_proto(model)).splitlines()


def _ask_first_inputs(graph: ir.Graph) -> None:
    """Which of the inputs that have an axis is asked for its size, and when, is torch's choice: here it is the first
    that has it, and the sizes are asked for before all else, in the order of their names."""
    sizes = {}
    for node in [node for node in graph if node.op_type == "Shape" and node.inputs[0] in graph.inputs]:
        axis = str(node.inputs[0].shape[node.attributes["start"].as_int()])  # type: ignore[union-attr, index]
        value, place = next((v, i) for v in graph.inputs for i, dim in enumerate(v.shape or ()) if str(dim) == axis)
        node.replace_input_with(0, value)
        node.attributes.update(start=ir.AttrInt64("start", place), end=ir.AttrInt64("end", place + 1))
        sizes[axis] = [node, *(reader for reader in node.outputs[0].consumers() if reader.op_type == "Squeeze")]
    for axis in sorted(sizes):
        for node in sizes[axis]:
            graph.remove(node)
            node.name = f"{node.op_type} {axis}"
    graph.insert_before(graph[0], [node for axis in sorted(sizes) for node in sizes[axis]])


def assert_same(model: ir.Model, expected: ir.Model) -> None:
    for line, (mine, its) in enumerate(itertools.zip_longest(lines(model), lines(expected))):
        assert mine == its, f"line {line}"


def test_the_graph_is_that_of_a_whole_trace(case: Case, make_config: MakeConfig) -> None:
    config = make_config(**case.changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that all layers were traced after all
        repeated = traced_by(trace, case, config)
    whole = traced_by(trace_whole, case, config)
    assert_same(repeated.clone(), whole.clone())
    assert_same(NameByModule()(repeated).model, NameByModule()(whole).model)  # from the notes on modules


DEEP = Case("cpu-fp32", {"n_layers": 3}, fused=True)


@pytest.fixture(scope="module")
def _one_layer(make_config: MakeConfig) -> ir.Model:
    return traced_by(trace_whole, DEEP, make_config(n_layers=1))


@pytest.fixture
def one_layer(_one_layer: ir.Model) -> ir.Model:
    """A traced graph of one layer: the test's own copy."""
    return _one_layer.clone()


def test_a_deep_model_takes_the_trace_of_one_layer(
    one_layer: ir.Model, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(model: CosmosBackbone, graph: str, spec: GraphSpec, **_: Any) -> ir.Model:
        assert len(model.layers) == model.config.n_layers == 1
        assert spec == signature(DEEP, make_config(n_layers=1))
        return one_layer

    monkeypatch.setattr(tracing, "trace_whole", traced)
    config = make_config(n_layers=100)
    graph = traced_by(trace, DEEP, config).graph
    spec = signature(DEEP, config)
    assert [value.name for value in graph.inputs] == [tensor.name for tensor in spec.inputs]
    assert [value.name for value in graph.outputs] == [tensor.name for tensor in spec.outputs]
    assert sum(node.op_type == "GroupQueryAttention" for node in graph) == 100
    assert next(name for name in graph.initializers if name.startswith("layers.99.")) == "layers.99.norm1.weight"


def also_read(graph: ir.Graph, value: ir.Value) -> None:
    """Lets something behind the layer read a value."""
    node = ir.Node("", "Shape", [value], name="another reader")
    graph.append(node)


def of_module(graph: ir.Graph, module: str, operator: str) -> ir.Node:
    return next(n for n in graph if n.op_type == operator and f"'model.{module}'" in n.metadata_props.get(SCOPES, ""))


def leak(graph: ir.Graph) -> None:
    also_read(graph, of_module(graph, "layers.0.feed_forward.w1", "MatMul").outputs[0])


def take_the_embedding_twice(graph: ir.Graph) -> None:
    gather = of_module(graph, "tok_embeddings", "Gather")
    reader, place = next(iter(gather.outputs[0].uses()))
    twice = ir.Node("", "Add", [gather.outputs[0]] * 2, name="twice")
    graph.insert_after(gather, twice)
    reader.replace_input_with(place, twice.outputs[0])


def lose_the_modules(graph: ir.Graph) -> None:
    for node in graph:
        node.metadata_props.clear()


def branch(graph: ir.Graph) -> None:
    silu = of_module(graph, "layers.0.feed_forward", "Sigmoid")
    silu.attributes.add(ir.AttrGraph("then_branch", ir.Graph([], [], nodes=[])))


FAULTS = {
    "another gives": (leak, r"gives .*linear"),
    "another takes": (take_the_embedding_twice, "takes embedding, "),
    "no modules": (lose_the_modules, "0 nodes"),
    "a branch": (branch, "branches"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_that_does_not_stand_apart_is_not_copied(
    fault: str, one_layer: ir.Model, make_config: MakeConfig
) -> None:
    change, message = FAULTS[fault]
    change(one_layer.graph)
    before = lines(one_layer.clone())
    with pytest.raises(LayerNotFoundError, match=message):
        repeat_layer(one_layer, signature(DEEP, make_config(n_layers=3)), 3)
    assert lines(one_layer) == before


def test_where_it_is_not_found_all_layers_are_traced_and_that_is_said(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(*_: Any) -> None:
        raise LayerNotFoundError("the traced layer is no layer")

    monkeypatch.setattr(tracing, "repeat_layer", not_found)
    with pytest.warns(UserWarning, match="all 2 layers are traced.*no layer"):
        graph = traced_by(trace, DEEP, make_config(n_layers=2)).graph
    assert "layers.1.norm1.weight" in graph.initializers


def test_the_signature_of_one_layer_has_all_but_the_other_caches(make_config: MakeConfig) -> None:
    case = CASES["heads"]
    assert spec_of_first_layer(signature(case, make_config(n_layers=7))) == signature(case, make_config(n_layers=1))
