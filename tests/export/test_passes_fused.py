"""The passes of the `ort` dialect on hand-made graphs: what they match, what they leave alone, the result the same."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from cosmos_export.onnx.passes import FuseSkipNorm, PackProjections, QuantizeEmbedding, QuantizeProjections
from cosmos_export.onnx.quantize import Quantization, dequantize, quantize
from cosmos_export.recipe import ExportRecipe

from .hand_made_graphs import assert_left_alone, attach, build, operators, run

DRAW = np.random.default_rng(0)
FP32 = ExportRecipe.load("cpu-fp32")
EMBEDDING = "tok_embeddings.weight"


def matrix(rows: int, columns: int) -> np.ndarray:
    return DRAW.standard_normal((rows, columns)).astype(np.float32)


def quantizing(**changes: object) -> ExportRecipe:
    """A recipe with float32 activations, so that a product is its dequantised matrix's to float32 accuracy."""
    form = Quantization(bits=4, block_size=16, symmetric=False, accuracy_level=1)
    embedding = Quantization(bits=8, block_size=16, symmetric=True, accuracy_level=1)
    return replace(FP32, precision="int4", **{"quantization": form, "embedding": embedding, **changes})


def rounded(array: np.ndarray, form: Quantization | None) -> np.ndarray:
    assert form is not None
    return dequantize(quantize(torch.from_numpy(array), form), array.shape[1], form).numpy()


def transposed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.T.copy() for name, array in tensors.items()}


# PackProjections

GATES = {"w1": matrix(24, 8), "w3": matrix(24, 8), "w2": matrix(24, 8)}
GATE_NAMES = {n: f"layers.1.feed_forward.{n}.weight.transposed" for n in GATES}
GATED = "g = MatMul(x, w1) \n u = MatMul(x, w3) \n s = Sigmoid(g) \n y = Mul(s, u)"
X = DRAW.standard_normal((2, 3, 8)).astype(np.float32)


def gated(body: str = GATED, *, names: Mapping[str, str] = GATE_NAMES, valued: bool = False, **kwargs: str) -> ir.Model:
    return build(body, transposed(GATES), valued=valued, names=names, **{"inputs": "float[B, T, 8] x", **kwargs})


def gate_tensors() -> dict[str, np.ndarray]:
    return {GATE_NAMES[n].removesuffix(".transposed"): array for n, array in GATES.items()}


def test_gate_and_up_become_one_product_and_a_split() -> None:
    model = gated()
    assert PackProjections()(model).modified is True
    assert operators(model) == ["MatMul", "Split", "Sigmoid", "Mul"]
    packed = "layers.1.feed_forward.w1_w3.weight.transposed"
    assert [n for n, v in model.graph.initializers.items() if v.const_value is None] == [packed]
    assert model.graph.initializers[packed].shape == ir.Shape([8, 48])
    assert_left_alone(PackProjections(), model)
    attach(model, gate_tensors(), FP32)
    g, u = X @ GATES["w1"].T, X @ GATES["w3"].T
    np.testing.assert_allclose(run(model, x=X), u / (1 + np.exp(-g)), rtol=1e-4, atol=1e-5)


def test_each_layer_is_packed_for_itself() -> None:
    body = "a = MatMul(x, w1) \n b = MatMul(x, w3) \n c = MatMul(z, v1) \n d = MatMul(z, v3) \n e = Sub(a, b)"
    names = {n: f"layers.0.feed_forward.{n}.weight.transposed" for n in ("w1", "w3")}
    names |= {n.replace("w", "v"): name.replace(".0.", ".1.") for n, name in names.items()}
    weights = {n: matrix(24, 8) for n in names}
    model = build(
        f"{body} \n f = Sub(c, d) \n y = Mul(e, f)",
        transposed(weights),
        valued=False,
        names=names,
        inputs="float[B, T, 8] x, float[B, T, 8] z",
    )
    assert PackProjections()(model).modified is True
    assert operators(model).count("MatMul") == 2
    attach(model, {names[n].removesuffix(".transposed"): w for n, w in weights.items()}, FP32)
    w1, w3, v1, v3 = (w.T for w in weights.values())
    np.testing.assert_allclose(run(model, x=X, z=2 * X), (X @ (w1 - w3)) * (2 * X @ (v1 - v3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        (GATED.replace("(x, w3)", "(z, w3)"), "float[B, T, 8] x, float[B, T, 8] z"),
        (GATED.replace("u = MatMul(x, w3)", "u = Neg(g)"), "float[B, T, 8] x"),
        (GATED.replace("w3", "w2"), "float[B, T, 8] x"),
        (GATED.replace("MatMul(x, w3)", "other.MatMul(x, w3)"), "float[B, T, 8] x"),
    ],
    ids=["other input", "no partner", "another partner", "another domain"],
)
def test_what_does_not_belong_together_stays_apart(body: str, inputs: str) -> None:
    assert_left_alone(PackProjections(), gated(body, inputs=inputs))


def test_projections_of_different_layers_stay_apart() -> None:
    assert_left_alone(PackProjections(), gated(names={**GATE_NAMES, "w3": GATE_NAMES["w3"].replace(".1.", ".0.")}))


def test_projections_that_have_their_values_stay_apart() -> None:
    assert_left_alone(PackProjections(), gated(valued=True))


def test_a_projection_that_something_else_reads_is_still_there() -> None:
    model = gated("r = ReduceSum(w1) \n g = MatMul(x, w1) \n u = MatMul(x, w3) \n p = Mul(g, u) \n y = Mul(p, r)")
    PackProjections()(model)
    attach(model, gate_tensors(), FP32)
    w1, w3 = GATES["w1"].T, GATES["w3"].T
    np.testing.assert_allclose(run(model, x=X), (X @ w1) * (X @ w3) * w1.sum(), rtol=1e-4, atol=1e-3)


ATTENTION = {"wq": matrix(32, 8), "wk": matrix(16, 8), "wv": matrix(16, 8)}
ATTENTION_NAMES = {n: f"layers.0.attention.{n[1]}_proj.weight.transposed" for n in ATTENTION}
ATTENDING = """
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    y, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1> (q, k, v, key, value, last, total)
"""
ATTENDING_INPUTS = (
    "float[B, T, 8] x, float[B, 1, L, 16] key, float[B, 1, L, 16] value, int32[B] last, int32 total"  # one kv head
)


def attending(body: str = ATTENDING) -> ir.Model:
    return build(
        body, transposed(ATTENTION), valued=False, names=ATTENTION_NAMES, inputs=ATTENDING_INPUTS, output="[B, T, 32]"
    )


def attend(model: ir.Model) -> np.ndarray:
    attach(model, {ATTENTION_NAMES[n].removesuffix(".transposed"): w for n, w in ATTENTION.items()}, FP32)
    cache = np.zeros((2, 1, 5, 16), np.float32)
    return run(model, x=X, key=cache, value=cache, last=np.array([2, 2], np.int32), total=np.array(3, np.int32))


def test_attention_takes_its_packed_projection_whole() -> None:
    model = attending()
    assert PackProjections()(model).modified is True
    assert operators(model) == ["MatMul", "GroupQueryAttention"]
    assert list(model.graph.initializers) == ["layers.0.attention.qkv_proj.weight.transposed"]
    assert list(model.graph[1].inputs[1:3]) == [None, None]
    assert_left_alone(PackProjections(), model)
    np.testing.assert_allclose(attend(model), attend(attending()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        ATTENDING.replace("y, pk", "a, pk") + "s = ReduceSum(k) \n y = Mul(a, s)",
        ATTENDING.replace("(q, k, v,", "(q, v, k,"),
    ],
    ids=["another reader", "another order"],
)
def test_attention_that_cannot_take_the_packed_projection_gets_its_parts(body: str) -> None:
    model = attending(body)
    assert PackProjections()(model).modified is True
    assert operators(model)[:3] == ["MatMul", "Split", "GroupQueryAttention"]
    np.testing.assert_allclose(attend(model), attend(attending(body)), rtol=1e-5, atol=1e-6)


# FuseSkipNorm

NORMED = "s = Add(a, b) \n n = RMSNormalization<axis = -1, epsilon = 0.001>(s, w) \n y = Sub(n, s)"
NORM = {"w": DRAW.standard_normal(8).astype(np.float32)}


def normed(body: str = NORMED, a: str = "float[B, T, 8]", b: str = "float[B, T, 8]", **kwargs: object) -> ir.Model:
    return build(body, NORM, inputs=f"{a} a, {b} b", opset=23, **kwargs)  # type: ignore[arg-type]


def test_a_sum_and_its_norm_become_one_operator() -> None:
    model = normed()
    before = run(model, a=X, b=2 * X[::-1])
    assert FuseSkipNorm()(model).modified is True
    assert operators(model) == ["SkipSimplifiedLayerNormalization", "Sub"]
    assert_left_alone(FuseSkipNorm(), model)
    np.testing.assert_allclose(run(model, a=X, b=2 * X[::-1]), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", [NORMED.replace(", epsilon = 0.001", ""), NORMED.replace("axis = -1, ", "")])
def test_attributes_have_the_operators_defaults(body: str) -> None:
    small = 1e-3 * X  # so that epsilon matters
    model = normed(body)
    before = run(model, a=small, b=small)
    assert FuseSkipNorm()(model).modified is True
    np.testing.assert_allclose(run(model, a=small, b=small), before, rtol=1e-5)


def test_a_sum_that_is_normalised_twice_and_read_in_between() -> None:
    model = normed(
        """s = Add(a, b)
        t = Neg(s)
        n = RMSNormalization<axis = -1>(s, w)
        m = RMSNormalization<axis = -1>(s, w)
        p = Mul(n, t)
        y = Add(p, m)"""
    )
    before = run(model, a=X, b=X[::-1])
    assert FuseSkipNorm()(model).modified is True
    assert operators(model).count("SkipSimplifiedLayerNormalization") == 1
    np.testing.assert_allclose(run(model, a=X, b=X[::-1]), before, rtol=1e-5, atol=1e-5)


def test_a_sum_that_is_also_an_output_keeps_its_name() -> None:
    model = normed()
    total = model.graph[0].outputs[0]
    total.shape, total.type = ir.Shape(["B", "T", 8]), ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(total)
    before = run(model, a=X, b=X)
    assert FuseSkipNorm()(model).modified is True
    assert [value.name for value in model.graph.outputs] == ["y", "s"]
    np.testing.assert_allclose(run(model, a=X, b=X), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "a", "b"),
    [
        (NORMED, "float[B, T, 8]", "float[1, 1, 8]"),
        (NORMED, "float[B, T, 8]", "float[8]"),
        (NORMED, "float[B, T, 8]", "float[B, U, 8]"),
        (NORMED, "float[B, 8]", "float[B, 8]"),
        (NORMED.replace("Add", "Mul"), "float[B, T, 8]", "float[B, T, 8]"),
        (NORMED.replace("Add", "other.Add"), "float[B, T, 8]", "float[B, T, 8]"),
        (NORMED.replace("RMSN", "other.RMSN"), "float[B, T, 8]", "float[B, T, 8]"),
        (NORMED.replace("axis = -1", "axis = 1"), "float[B, T, 8]", "float[B, T, 8]"),
        (NORMED.replace("(s, w)", "(a, w)"), "float[B, T, 8]", "float[B, T, 8]"),
    ],
    ids=[
        "broadcast",
        "a vector",
        "other lengths",
        "a matrix",
        "a product",
        "no standard sum",
        "no standard norm",
        "over two axes",
        "not of the sum",
    ],
)
def test_what_is_no_normed_residual_stays(body: str, a: str, b: str) -> None:
    output = "[B, 8]" if a == "float[B, 8]" else "[B, T, 8]"
    assert_left_alone(FuseSkipNorm(), normed(body, a, b, output=output))


def test_sums_of_unknown_lengths_stay() -> None:
    """Two axes of which nothing is known are not known to be equal."""
    model = normed(a="float[?, ?, 8]", b="float[?, ?, 8]")
    assert_left_alone(FuseSkipNorm(), model)


# QuantizeProjections

O_PROJ = "layers.0.attention.o_proj.weight"
WEIGHT = matrix(24, 40)  # 40 columns: the last block of 16 is not full
WIDE = DRAW.standard_normal((2, 3, 40)).astype(np.float32)


def projecting(body: str = "y = MatMul(x, w)", name: str = f"{O_PROJ}.transposed", *, valued: bool = False) -> ir.Model:
    return build(body, {"w": WEIGHT.T.copy()}, valued=valued, names={"w": name}, inputs="float[B, T, 40] x")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_projection_is_stored_in_few_bits(bits: int, symmetric: bool) -> None:
    recipe = quantizing(quantization=Quantization(bits, 16, symmetric, 1))
    model = projecting()
    assert QuantizeProjections(recipe)(model).modified is True
    assert operators(model) == ["MatMulNBits"]
    parts = ["blocks", "scales"] if symmetric else ["blocks", "scales", "zero_points"]
    assert list(model.graph.initializers) == [f"{O_PROJ}.{part}" for part in parts]
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert_left_alone(QuantizeProjections(recipe), model)
    attach(model, {O_PROJ: WEIGHT}, recipe)
    expected = WIDE @ rounded(WEIGHT, recipe.quantization).T
    np.testing.assert_allclose(run(model, x=WIDE), expected, rtol=1e-4, atol=1e-4)


def test_an_override_decides_for_its_projection() -> None:
    eight = Quantization(bits=8, block_size=32, symmetric=True, accuracy_level=0)
    model = projecting()
    QuantizeProjections(quantizing(overrides={"o_proj": eight, "w2": Quantization(4, 16, True, 1)}))(model)
    attributes = {name: attribute.value for name, attribute in model.graph[0].attributes.items()}
    assert attributes == {"K": 40, "N": 24, "bits": 8, "block_size": 32, "accuracy_level": 0}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("y = MatMul(x, w)", O_PROJ),
        ("y = MatMul(x, w)", "layers.0.attention.gate.weight.transposed"),
        ("y = other.MatMul(x, w)", f"{O_PROJ}.transposed"),
        ("t = Neg(w) \n y = MatMul(x, t)", f"{O_PROJ}.transposed"),
        ("y = Add(x, w)", f"{O_PROJ}.transposed"),
    ],
    ids=["not transposed", "no projection", "another domain", "not an initializer", "no product"],
)
def test_what_is_no_projection_stays_float32(body: str, name: str) -> None:
    assert_left_alone(QuantizeProjections(quantizing()), projecting(body, name))


def test_a_projection_that_has_its_value_stays_float32() -> None:
    assert_left_alone(QuantizeProjections(quantizing()), projecting(valued=True))


@pytest.mark.parametrize("recipe", [FP32, quantizing(quantization=None)], ids=["fp32", "only the embedding"])
def test_a_recipe_that_does_not_quantise_projections_leaves_them(recipe: ExportRecipe) -> None:
    assert_left_alone(QuantizeProjections(recipe), projecting())


def test_a_projection_that_something_else_reads_keeps_its_float32_values_too() -> None:
    recipe = quantizing()
    model = projecting("p = MatMul(x, w) \n s = ReduceSum(w) \n y = Mul(p, s)")
    assert QuantizeProjections(recipe)(model).modified is True
    attach(model, {O_PROJ: WEIGHT}, recipe)
    expected = WIDE @ rounded(WEIGHT, recipe.quantization).T * WEIGHT.sum()
    np.testing.assert_allclose(run(model, x=WIDE), expected, rtol=1e-4, atol=1e-3)


# QuantizeEmbedding

TABLE = matrix(20, 32)
IDS = np.array([[1, 0, 19], [3, 2, 2]])
TIED = "x = Gather(w, ids) \n t = Transpose<perm = [1, 0]>(w) \n y = MatMul(x, t)"


def tied(body: str = TIED, name: str = EMBEDDING, *, valued: bool = False, **kwargs: str) -> ir.Model:
    """`body`, with the shape of x known as (B, T, D), as in a trace."""
    model = build(body, {"w": TABLE, "v": TABLE}, valued=valued, names={"w": name}, **kwargs)
    x = next((output for node in model.graph for output in node.outputs if output.name == "x"), None)
    if x is not None:
        x.shape, x.type = ir.Shape(["B", "T", 32]), ir.TensorType(ir.DataType.FLOAT)
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32])
def test_lookup_and_projection_read_one_quantised_table(bits: int, block_size: int) -> None:
    recipe = quantizing(embedding=Quantization(bits, block_size, symmetric=True, accuracy_level=1))
    model = tied()
    assert QuantizeEmbedding(recipe)(model).modified is True
    assert list(model.graph.initializers) == [f"{EMBEDDING}.blocks", f"{EMBEDDING}.scales"]
    assert {"GatherBlockQuantized", "MatMulNBits"} < set(operators(model))
    assert not {"Gather", "MatMul", "Transpose"} & set(operators(model))
    assert_left_alone(QuantizeEmbedding(recipe), model)
    attach(model, {EMBEDDING: TABLE}, recipe)
    table = rounded(TABLE, recipe.embedding)
    np.testing.assert_allclose(run(model, ids=IDS), table[IDS] @ table.T, rtol=1e-4, atol=1e-4)


def test_a_lookup_alone_is_exact() -> None:
    recipe = quantizing()
    model = tied("y = Gather(w, ids)")
    assert QuantizeEmbedding(recipe)(model).modified is True
    attach(model, {EMBEDDING: TABLE}, recipe)
    np.testing.assert_array_equal(run(model, ids=IDS), rounded(TABLE, recipe.embedding)[IDS])


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (TIED, "positions.weight"),
        (TIED.replace("Gather", "Gather<axis = 1>"), EMBEDDING),
        (TIED.replace("Gather", "other.Gather"), EMBEDDING),
        (TIED.replace("Gather(w", "Gather(v"), EMBEDDING),
    ],
    ids=["another table", "columns", "another domain", "no lookup"],
)
def test_what_is_no_lookup_in_the_embedding_stays(body: str, name: str) -> None:
    assert_left_alone(QuantizeEmbedding(quantizing()), tied(body, name))


@pytest.mark.parametrize(
    "recipe",
    [FP32, quantizing(embedding=None), quantizing(embedding=Quantization(8, 16, symmetric=False, accuracy_level=1))],
    ids=["fp32", "embedding in float32", "zero points"],
)
def test_a_recipe_that_does_not_quantise_the_embedding_leaves_it(recipe: ExportRecipe) -> None:
    assert_left_alone(QuantizeEmbedding(recipe), tied())


def test_an_embedding_that_has_its_value_stays() -> None:
    assert_left_alone(QuantizeEmbedding(quantizing()), tied(valued=True))


def test_another_reader_of_the_transposed_table_keeps_it() -> None:
    recipe = quantizing()
    model = tied("x = Gather(w, ids) \n t = Transpose(w) \n s = ReduceSum(t) \n y = Mul(x, s)", output="[B, T, 32]")
    QuantizeEmbedding(recipe)(model)
    attach(model, {EMBEDDING: TABLE}, recipe)
    result = run(model, ids=IDS)
    np.testing.assert_allclose(result, rounded(TABLE, recipe.embedding)[IDS] * TABLE.sum(), rtol=1e-4, atol=1e-3)


def test_a_lookup_by_one_axis_of_ids() -> None:
    recipe = quantizing()
    model = tied("y = Gather(w, ids)", inputs="int64[T] ids", output="[T, 32]")
    QuantizeEmbedding(recipe)(model)
    attach(model, {EMBEDDING: TABLE}, recipe)
    np.testing.assert_array_equal(run(model, ids=IDS[0]), rounded(TABLE, recipe.embedding)[IDS[0]])
