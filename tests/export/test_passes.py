"""Graph passes on hand-made graphs: what they match, what they leave alone, and that the result is the same."""

import numpy as np
import onnx_ir as ir
import pytest

from cosmos_export.onnx.passes import NameByModule, ShareTiedProjection, StoreTransposed, run_passes
from cosmos_export.recipe import ExportRecipe

from .hand_made_graphs import Arrays, assert_left_alone, build, operators, run

WEIGHT = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)  # V 5, D 4
SQUARE = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
IDS = np.array([[1, 0, 3], [3, 2, 2]])


# ShareTiedProjection

TIED = """
    x = Gather(w, ids)
    t = Transpose<perm = [1, 0]>(w)
    y = MatMul(x, t)
"""


def tied(body: str = TIED, weight: np.ndarray = WEIGHT, **kwargs: object) -> ir.Model:
    """`body`, with the shape of x known as (B, T, D), as in a trace."""
    model = build(body, {"w": weight, "v": weight}, **kwargs)  # type: ignore[arg-type]
    for node in model.graph:
        for output in node.outputs:
            if output.name == "x":
                output.shape, output.type = ir.Shape(["B", "T", 4]), ir.TensorType(ir.DataType.FLOAT)
    return model


@pytest.mark.parametrize("perm", ["<perm = [1, 0]>", ""])
def test_a_tied_projection_reads_the_embedding_itself(perm: str) -> None:
    model = tied(TIED.replace("<perm = [1, 0]>", perm))
    before = run(model, ids=IDS)
    assert ShareTiedProjection()(model).modified is True
    assert "Transpose" not in operators(model)
    assert "MatMul" not in operators(model)
    assert operators(model).count("Gemm") == 1
    assert [value.name for value in model.graph.initializers.values()] == ["w"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    after = run(model, ids=IDS)
    assert after.shape == before.shape == (2, 3, 5)
    np.testing.assert_allclose(after, before, rtol=1e-6)
    np.testing.assert_allclose(before, WEIGHT[IDS] @ WEIGHT.T, rtol=1e-5)
    assert_left_alone(ShareTiedProjection(), model)


def test_a_tied_projection_in_the_middle_of_a_graph_and_of_a_matrix() -> None:
    body = "x = Add(m, b) \n t = Transpose(w) \n p = MatMul(x, t) \n s = ReduceSum(w) \n y = Mul(p, s)"
    model = build(body, {"w": WEIGHT, "b": WEIGHT[0]}, inputs="float[R, 4] m", output="[R, N]")
    x = next(node.outputs[0] for node in model.graph if node.op_type == "Add")
    x.shape, x.type = ir.Shape(["R", 4]), ir.TensorType(ir.DataType.FLOAT)
    m = np.ones((3, 4), np.float32)
    before = run(model, m=m)
    assert ShareTiedProjection()(model).modified is True
    np.testing.assert_allclose(run(model, m=m), before, rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ("x = Gather(v, ids) \n t = Transpose(w) \n y = MatMul(x, t)", WEIGHT),
        ("x = Gather(w, ids) \n t = Transpose(w) \n p = MatMul(x, t) \n s = ReduceSum(t) \n y = Mul(p, s)", WEIGHT),
        ("x = Gather(w, ids) \n n = Neg(w) \n t = Transpose(n) \n y = MatMul(x, t)", WEIGHT),
        ("x = Gather(w, ids) \n t = Transpose<perm = [0, 1]>(w) \n y = MatMul(x, t)", SQUARE),
        ("x = Gather(w, ids) \n y = MatMul(x, w)", SQUARE),
    ],
    ids=["no other reader", "transpose read twice", "not an initializer", "transposes nothing", "not transposed"],
)
def test_what_is_no_tied_projection_stays(body: str, weight: np.ndarray) -> None:
    model = tied(body, weight)
    run(model, ids=IDS)
    assert_left_alone(ShareTiedProjection(), model)


def test_a_projection_whose_transpose_is_also_an_output_stays() -> None:
    model = tied()
    transposed = next(node.outputs[0] for node in model.graph if node.op_type == "Transpose")
    transposed.type, transposed.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([4, 5])
    model.graph.outputs.append(transposed)
    run(model, ids=IDS)
    assert_left_alone(ShareTiedProjection(), model)


def test_a_projection_of_unknown_shape_stays() -> None:
    model = tied()
    next(node.outputs[0] for node in model.graph if node.op_type == "Gather").shape = None
    assert_left_alone(ShareTiedProjection(), model)


@pytest.mark.parametrize("name", ["MatMul", "Transpose"])
def test_operators_of_another_domain_that_share_a_name_stay(name: str) -> None:
    assert_left_alone(ShareTiedProjection(), tied(TIED.replace(name, f"other.{name}")))


# StoreTransposed

PROJECTION = "x = Gather(v, ids) \n t = Transpose<perm = [1, 0]>(w) \n y = MatMul(x, t)"


def fill(model: ir.Model, weights: Arrays) -> None:
    """Gives every valueless initializer its value, transposed where its name says so."""
    for value in model.graph.initializers.values():
        if value.const_value is None:
            name = value.name or ""
            array = weights[name.removesuffix(".transposed")]
            array = np.ascontiguousarray(array.T) if name.endswith(".transposed") else array
            assert value.shape == ir.Shape(array.shape)
            value.const_value = ir.tensor(array, name=name)


@pytest.mark.parametrize("perm", ["<perm = [1, 0]>", ""])
def test_a_matrix_is_stored_as_it_is_read(perm: str) -> None:
    weights, body = {"w": WEIGHT, "v": WEIGHT}, PROJECTION.replace("<perm = [1, 0]>", perm)
    expected = run(build(body, weights), ids=IDS)
    model = build(body, weights, valued=False)
    assert StoreTransposed()(model).modified is True
    assert operators(model) == ["Gather", "MatMul"]
    assert {value.name for value in model.graph.initializers.values()} == {"v", "w.transposed"}
    assert model.graph.initializers["w.transposed"].dtype == ir.DataType.FLOAT
    assert_left_alone(StoreTransposed(), model)
    fill(model, weights)
    np.testing.assert_allclose(run(model, ids=IDS), expected, rtol=1e-6)


def test_each_matrix_gets_its_own() -> None:
    body = "x = Gather(v, ids) \n t = Transpose(w) \n h = MatMul(x, t) \n s = Transpose(u) \n y = MatMul(h, s)"
    weights = {"v": WEIGHT, "w": WEIGHT, "u": WEIGHT.T.copy()}
    expected = run(build(body, weights), ids=IDS)
    model = build(body, weights, valued=False)
    assert StoreTransposed()(model).modified is True
    assert {value.name for value in model.graph.initializers.values()} == {"v", "w.transposed", "u.transposed"}
    fill(model, weights)
    np.testing.assert_allclose(run(model, ids=IDS), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ("t = Transpose<perm = [0, 1]>(w) \n x = Gather(v, ids) \n y = MatMul(x, t)", SQUARE),
        ("t = Transpose(w) \n s = ReduceSum(w) \n u = Mul(t, s) \n x = Gather(v, ids) \n y = MatMul(x, u)", WEIGHT),
        ("n = Neg(w) \n t = Transpose(n) \n x = Gather(v, ids) \n y = MatMul(x, t)", WEIGHT),
        ("t = Transpose(w) \n x = Gather(v, ids) \n y = MatMul(x, t)", WEIGHT[None]),
        ("t = other.Transpose(w) \n x = Gather(v, ids) \n y = MatMul(x, t)", WEIGHT),
    ],
    ids=["transposes nothing", "has another reader", "not an initializer", "not a matrix", "of another domain"],
)
def test_what_is_no_transposed_matrix_stays(body: str, weight: np.ndarray) -> None:
    assert_left_alone(StoreTransposed(), build(body, {"w": weight, "v": WEIGHT}, valued=False))


def test_a_matrix_that_has_its_value_stays() -> None:
    """Its name would no longer say which way round the value is."""
    assert_left_alone(StoreTransposed(), build(PROJECTION, {"w": WEIGHT, "v": WEIGHT}))


def test_a_transposed_matrix_that_is_an_output_stays() -> None:
    model = build("s = ReduceSum(ids) \n y = Transpose(w)", {"w": WEIGHT}, valued=False, output="[4, 5]")
    assert_left_alone(StoreTransposed(), model)


# NameByModule


def noted(scopes: list[str] | None) -> dict[str, str]:
    notes = {"pkg.torch.onnx.stack_trace": 'File "/home/someone/model.py", line 3'}
    return notes if scopes is None else {**notes, "pkg.torch.onnx.name_scopes": repr(scopes)}


@pytest.fixture
def traced() -> ir.Model:
    """Four nodes as a trace leaves them, notes and all."""
    model = build("a = Gather(w, ids) \n b = Neg(a) \n c = Neg(b) \n y = Abs(c)", {"w": WEIGHT})
    scopes = [["", "tok_embeddings", "embedding"], ["", "layers.0", "layers.0.norm1", "neg"]]
    for i, (node, where) in enumerate(zip(model.graph, [*scopes, scopes[1], ["", "abs"]], strict=True)):
        node.name = f"node_{i}"
        node.metadata_props.update(noted(where))
        node.outputs[0].metadata_props.update(noted(None))
    model.metadata_props.update(noted(None))
    model.graph.metadata_props.update(noted(None))
    model.graph.inputs[0].metadata_props.update(noted(None))
    model.graph.initializers["w"].metadata_props.update(noted(None))
    return model


def test_nodes_are_named_after_their_module(traced: ir.Model) -> None:
    before = run(traced, ids=IDS)
    assert NameByModule()(traced).modified is True
    assert [node.name for node in traced.graph] == [
        "tok_embeddings/Gather",
        "layers.0.norm1/Neg",
        "layers.0.norm1/Neg_1",
        "model/Abs",
    ]
    np.testing.assert_array_equal(run(traced, ids=IDS), before)


def test_notes_of_the_trace_are_gone(traced: ir.Model) -> None:
    assert b"someone" in ir.to_proto(traced).SerializeToString()
    NameByModule()(traced)
    assert b"someone" not in ir.to_proto(traced).SerializeToString()
    assert b"pkg.torch" not in ir.to_proto(traced).SerializeToString()


def test_naming_twice_changes_nothing(traced: ir.Model) -> None:
    NameByModule()(traced)
    assert_left_alone(NameByModule(), traced)


def test_a_node_without_notes_keeps_its_name() -> None:
    model = tied()
    for i, node in enumerate(model.graph):
        node.name = f"mine_{i}"
    assert_left_alone(NameByModule(), model)


@pytest.mark.parametrize("place", ["node", "output", "input", "initializer", "graph", "model"])
def test_a_note_anywhere_is_a_modification(place: str) -> None:
    model = tied()
    node = model.graph[0]
    owner = {
        "node": node,
        "output": node.outputs[0],
        "input": model.graph.inputs[0],
        "initializer": model.graph.initializers["w"],
        "graph": model.graph,
        "model": model,
    }[place]
    owner.metadata_props.update(noted(None))
    assert NameByModule()(model).modified is True
    assert not owner.metadata_props
    assert NameByModule()(model).modified is False


def test_names_stay_unique_beside_nodes_that_have_one(traced: ir.Model) -> None:
    """ONNX Runtime refuses a model in which two nodes share a name."""
    first, *_ = traced.graph
    first.metadata_props.clear()
    first.name = "model/Abs"
    NameByModule()(traced)
    names = [node.name for node in traced.graph]
    assert len(set(names)) == len(names)
    run(traced, ids=IDS)


# All of them, on a trace


def test_all_passes_leave_no_transposed_weight_and_nothing_to_do(tiny_trace: ir.Model) -> None:
    model = run_passes(tiny_trace, ExportRecipe.load("fp32"))
    weights = set(model.graph.initializers.values())
    assert not [node for node in model.graph if node.op_type == "Transpose" and node.inputs[0] in weights]
    for graph_pass in (NameByModule(), ShareTiedProjection(), StoreTransposed()):
        assert graph_pass(model).modified is False


def test_a_trace_has_something_for_each_pass(tiny_trace: ir.Model) -> None:
    for graph_pass in (NameByModule(), ShareTiedProjection(), StoreTransposed()):
        assert graph_pass(tiny_trace).modified is True
