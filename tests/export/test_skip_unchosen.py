"""Branches in the place of selections: what they match, what they leave alone, and that the result is the same."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cosmos_export.onnx.head_signature import WANTS_SCORES
from cosmos_export.onnx.passes import ScoresOnDemand, SkipUnchosen, run_passes
from cosmos_export.onnx.signature import graph_spec, parts_of
from cosmos_export.onnx.trace import trace, traceable
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import CAPABILITIES, DECODER

from .capability_models import small_config
from .hand_made_graphs import CHOOSING, assert_left_alone, choosing, operators, run, with_values

RNG = np.random.default_rng(0)
SCORE = "s = MatMul(x, g) \n c = Greater(s, z) \n"
ONE = SCORE + "f = MatMul(x, w) \n a = Relu(f) \n y = Where(c, a, x)"
# What the second selection chooses is made of what the first one gave, which is read behind it, too.
TWO = SCORE + "f = MatMul(x, w) \n a = Where(c, f, x) \n h = MatMul(a, v) \n b = Where(c, h, x) \n y = Add(a, b)"
# Behind the first selection, and before the second: nothing of a branch can come between its nodes.
APART = (
    SCORE
    + "f = MatMul(x, w) \n a = Where(c, f, x) \n n = Relu(a) \n h = MatMul(n, v) \n b = Where(c, h, n) \n y = Add(n, b)"
)
# Of rows that the first selection chose, some are chosen again.
CHAIN = SCORE + "f = MatMul(x, w) \n a = Where(c, f, x) \n t = MatMul(a, g) \n p = Greater(t, z) \n d = And(c, p) \n"
CHAIN += "h = MatMul(a, v) \n y = Where(d, h, a)"


def rows(*signs: int) -> np.ndarray:
    """Rows that the score chooses (1) or does not (-1)."""
    away = RNG.standard_normal((len(signs), 4)).astype(np.float32)
    score = away @ CHOOSING["g"]
    return (away * np.sign(score) * np.array(signs)[:, None]).astype(np.float32)


def branches(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "If"]


def within(branch: ir.Node, name: str = "then_branch") -> list[str]:
    return [node.op_type for node in branch.attributes.get_graph(name)]


@pytest.mark.parametrize(
    ("body", "count"), [(ONE, 1), (TWO, 1), (APART, 2), (CHAIN, 2)], ids=["one", "two", "apart", "chain"]
)
@pytest.mark.parametrize("signs", [(-1,), (1,), (-1, -1, -1), (1, -1, 1), (1, 1)])
def test_a_branch_gives_what_the_selection_gave(body: str, count: int, signs: tuple[int, ...]) -> None:
    x = rows(*signs)
    expected = run(with_values(choosing(body)), x=x)
    model = choosing(body)
    assert SkipUnchosen()(model).modified is True
    assert len(branches(model)) == count
    assert "MatMul" not in operators(model)[operators(model).index("If") :] or body is CHAIN
    assert_left_alone(SkipUnchosen(), model)
    np.testing.assert_array_equal(run(with_values(model), x=x), expected)


def test_what_only_the_branch_needs_is_in_it() -> None:
    model = choosing(ONE)
    SkipUnchosen()(model)
    (branch,) = branches(model)
    assert within(branch) == ["MatMul", "Relu", "Where"]
    assert within(branch, "else_branch") == ["Identity"]
    assert operators(model) == ["MatMul", "Greater", "ReduceMax", "If"]


@pytest.mark.parametrize(
    "body",
    [
        SCORE + "a = Relu(x) \n y = Where(c, a, x)",
        "c = Greater(x, z) \n f = MatMul(x, w) \n y = Where(c, f, x)",
        SCORE + "f = MatMul(x, w) \n a = Where(c, f, x) \n y = Add(a, f)",
        SCORE + "f = MatMul(x, w) \n y = Where(c, x, f)",
    ],
    ids=["no matrix", "the condition is the caller's", "read elsewhere, too", "what is kept"],
)
def test_what_is_no_such_selection_stays(body: str) -> None:
    model = choosing(body)
    run(with_values(choosing(body)), x=rows(1, -1))
    assert_left_alone(SkipUnchosen(), model)


# Scores that only a report reads

TOLD = SCORE + "h = MatMul(x, w) \n f = Relu(h) \n y = Where(c, f, x) \n t = MatMul(x, v)"


def with_scores(body: str, scores: dict[str, str]) -> ir.Model:
    """The graph with scores (values of `body`, by their names as outputs), and whether a run wants them."""
    model = choosing(body)
    values = {output.name: output for node in model.graph for output in node.outputs}
    for name, source in scores.items():
        values[source].name, values[source].type = name, ir.TensorType(ir.DataType.FLOAT)
        values[source].shape = ir.Shape(["B", 1 if source == "s" else 4])
        model.graph.outputs.append(values[source])
    model.graph.inputs.append(ir.Value(name=WANTS_SCORES, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1])))
    return model


def outputs(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(with_values(model)).SerializeToString())
    return session.run(None, feeds)


@pytest.mark.parametrize("signs", [(-1,), (1, -1, 1)])
def test_scores_are_there_where_they_are_wanted_and_have_no_rows_elsewhere(signs: tuple[int, ...]) -> None:
    model = with_scores(TOLD, {"safety.told": "t", "safety.decides": "s"})
    assert ScoresOnDemand()(model).modified is True
    assert_left_alone(ScoresOnDemand(), model)
    (branch,) = branches(model)
    assert within(branch) == ["MatMul"], "the other score decides something, and is computed in any case"
    SkipUnchosen()(model)
    x = rows(*signs)
    y, told, decides = outputs(model, x=x, wants_scores=np.array([True]))
    np.testing.assert_allclose(told, x @ CHOOSING["v"], rtol=1e-5)
    without = outputs(model, x=x, wants_scores=np.array([False]))
    np.testing.assert_array_equal(without[0], y)
    assert without[1].shape == (0, 4)
    np.testing.assert_array_equal(without[2], decides)


def test_a_selection_stays_with_what_it_may_choose() -> None:
    """The score is the choice between x and f, and f is read by another choice, too."""
    body = SCORE + "h = MatMul(x, w) \n f = Relu(h) \n y = Where(c, f, x) \n t = Where(c, f, z) \n u = Relu(t)"
    model = with_scores(body, {"safety.told": "u"})
    ScoresOnDemand()(model)
    SkipUnchosen()(model)
    chosen, told = branches(model)
    assert within(chosen) == ["MatMul", "Relu", "Where", "Where"]
    assert within(told) == ["Relu"]


@pytest.mark.parametrize("name", ["output_blocked", "logits"])
def test_what_is_no_score_is_computed_in_any_case(name: str) -> None:
    assert_left_alone(ScoresOnDemand(), with_scores(TOLD, {name: "t"}))


def test_without_the_input_scores_are_always_computed() -> None:
    model = with_scores(TOLD, {"safety.told": "t"})
    model.graph.inputs.pop()
    assert_left_alone(ScoresOnDemand(), model)


# In the graph of a model


def decoder(recipe: ExportRecipe, *, on_demand: bool = False) -> ir.Model:
    config = small_config(head_dim=16)
    fused = recipe.fuses_attention(config)
    spec = graph_spec(
        DECODER,
        config,
        recipe.opset,
        activations=recipe.activations,
        capabilities=CAPABILITIES,
        on_demand=on_demand,
    )
    model = traceable(config, recipe.activations, fused_attention=fused, capabilities=CAPABILITIES)
    return run_passes(trace(model, DECODER, spec, fused_attention=fused), recipe)


def weights(graph: ir.Graph) -> set[str]:
    """Names of the initializers that a graph's own nodes read."""
    return {value.name or "" for node in graph for value in node.inputs if value is not None and value.is_initializer()}


def test_what_vectors_are_replaced_by_is_computed_in_branches() -> None:
    model = decoder(ExportRecipe.load("cpu-fp32"))
    skipped = {
        value.name
        for branch in branches(model)
        for node in branch.attributes.get_graph("then_branch")
        for value in node.inputs
        if value is not None and value.is_initializer()
    }
    always = {
        value.name for node in model.graph for value in node.inputs if value is not None and value.is_initializer()
    }
    for network in (
        "bias_detector.debiaser.0",
        "privacy_protector.anonymizer",
        "perturbation_cleaner.3",
        "corrector.0",
    ):
        names = {name for name in skipped if name and f"{network}.weight" in name}
        assert names, network
        assert not names & always, network
    of_rounds = {name for name in skipped if name and "evaluation_system.factuality_checker" in name}
    assert of_rounds <= always, "the first round is always computed, the second one in a branch"
    assert of_rounds


def test_without_a_report_only_what_is_decided_by_is_computed() -> None:
    """Above all, neither a correction nor what follows it is: scores read what came of it, not how."""
    model = decoder(ExportRecipe.load("cpu-fp32"), on_demand=True)
    always = {part for name in weights(model.graph) for part in parts_of(name)}
    for module in (
        "evaluation_system.self_correction.corrector",
        "evaluation_system.factuality_checker",
        "evaluation_system.confidence_estimator",
        "safety_system.hallucination_detector",
        "safety_system.ethical_guardian",
        "safety_system.content_filter.category_classifier",
    ):
        assert not [name for name in always if module in name], module
    for module in (
        "self_correction.error_detector",
        "content_filter.harmful_detector",
        "privacy_protector.pii_detector",
    ):
        assert [name for name in always if module in name], module


@pytest.mark.parametrize("name", ["cuda-fp16", "portable-fp32"])
def test_graphs_for_other_devices_and_runtimes_have_no_branches(name: str) -> None:
    assert not branches(decoder(ExportRecipe.load(name)))
