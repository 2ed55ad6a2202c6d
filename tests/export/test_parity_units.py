"""What judges a bundle, piece by piece: metrics, gates, the report, the pieces of a sequence, the float32 copy."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.onnx.quantize import Quantization
from cosmos_export.parity import metrics
from cosmos_export.parity.arithmetic import arithmetic_of, float32_activations
from cosmos_export.parity.cases import Skipped
from cosmos_export.parity.gates import LOGIT_GATES, QUALITY_GATES, Arithmetic, LogitGate, Verdict, judge
from cosmos_export.parity.quality import Quality
from cosmos_export.parity.report import CaseResult, Measurement, ParityReport, gate_share
from cosmos_export.parity.stepwise import pieces, stepwise_cases
from cosmos_export.parity.stored import StoredTensors
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import Bundle, describe_file

DRAW = np.random.default_rng(0)
LOGITS = DRAW.normal(0, 3, (4, 5, 7))

# Metrics


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_log_softmax_is_normalised_at_any_height(shift: float) -> None:
    result = metrics.log_softmax((LOGITS + shift).astype(np.float32))
    assert result.dtype == np.float64
    np.testing.assert_allclose(np.exp(result).sum(-1), 1, rtol=1e-12)
    expected = np.log(np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True))
    np.testing.assert_allclose(result, expected, atol=1e-5 if shift == 0 else 2e-3)


def test_equal_distributions_do_not_diverge() -> None:
    equal = metrics.log_softmax(LOGITS)
    np.testing.assert_array_equal(metrics.kl_divergences(equal, metrics.log_softmax(LOGITS)), np.zeros((4, 5)))
    np.testing.assert_allclose(metrics.kl_divergences(equal, metrics.log_softmax(LOGITS + 5)), 0, atol=1e-13)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 16), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_divergences_are_positive(seed: int, scale: float) -> None:
    a, b = (metrics.log_softmax(x) for x in np.random.default_rng(seed).normal(0, scale, (2, 3, 11)))
    assert (metrics.kl_divergences(a, b) >= -1e-13).all()


def test_a_divergence_is_taken_under_the_first_distribution() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    r = np.array([0.8, 0.1, 0.1])
    assert metrics.kl_divergences(np.log(p), np.log(q)) == pytest.approx(0.25 * math.log(2))
    forward, backward = metrics.kl_divergences(np.log([p, r]), np.log([r, p]))
    assert forward == pytest.approx(0.5 * math.log(5 / 8) + 0.5 * math.log(2.5))
    assert backward == pytest.approx(0.8 * math.log(8 / 5) + 0.2 * math.log(0.4))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_infinite_error(broken: float) -> None:
    actual = LOGITS.astype(np.float32)
    actual[1, 2, 3] = broken
    assert metrics.max_abs_error(actual, LOGITS) == math.inf
    assert metrics.nonfinite_count(actual) == 1


def test_errors_are_the_largest_anywhere_and_measured_in_float64() -> None:
    actual = LOGITS.astype(np.float32)
    assert 0 < metrics.max_abs_error(actual, LOGITS) < 1e-6
    actual[3, 4, 6] -= 0.5
    assert metrics.max_abs_error(actual, LOGITS) == pytest.approx(0.5, abs=1e-6)
    assert metrics.nonfinite_count(actual) == 0
    assert metrics.value_range(np.array([[1.0, -4.0], [9.0, 0.0]])) == 13


def test_margins_are_the_lead_of_the_best_token() -> None:
    reference = np.array([[1.0, 5.0, 3.5], [2.0, 2.0, 0.0], [-1.0, -9.0, -8.0]])
    np.testing.assert_allclose(metrics.top1_margins(reference), [1.5, 0, 7])
    assert metrics.top1_margins(LOGITS).shape == (4, 5)
    assert metrics.top1_margins(np.zeros((2, 1))).tolist() == [math.inf, math.inf]


def test_another_best_token_is_seen_where_it_is() -> None:
    actual = LOGITS.copy()
    actual[2, 1, (LOGITS[2, 1].argmax() + 1) % 7] = 99
    assert np.argwhere(metrics.top1_differs(actual, LOGITS)).tolist() == [[2, 1]]


# Gates


@pytest.mark.parametrize(
    ("error", "allowed", "margin", "verdict"),
    [
        (0.0, 0.0, None, Verdict.PASS),
        (0.5, 1.0, None, Verdict.PASS),
        (1.0, 1.0, None, Verdict.PASS),
        (1.0 + 1e-9, 1.0, None, Verdict.FAIL),
        (math.inf, 1.0, None, Verdict.FAIL),
        (math.nan, 1.0, None, Verdict.FAIL),
        (0.5, math.nan, None, Verdict.FAIL),
        (0.5, 1.0, 0.1, Verdict.AMBIGUOUS),
        (0.5, 1.0, 2.0, Verdict.AMBIGUOUS),
        (0.5, 1.0, 2.1, Verdict.FAIL),
        (0.5, 1.0, math.nan, Verdict.FAIL),
        (0.5, 1.0, math.inf, Verdict.FAIL),
        (1.5, 1.0, 0.1, Verdict.FAIL),
        (math.nan, 1.0, 0.1, Verdict.FAIL),
        (0.0, 0.0, 0.0, Verdict.AMBIGUOUS),
    ],
)
def test_the_judgement(error: float, allowed: float, margin: float | None, verdict: Verdict) -> None:
    assert judge(error, allowed, margin) is verdict


def test_a_gate_allows_a_multiple_of_the_eager_error_and_a_share_of_the_range() -> None:
    gate = LogitGate(eager_factor=3.0, range_fraction=0.1, reason="")
    assert gate.allowed(0.5, 20.0) == pytest.approx(3.5)
    assert gate.allowed(0.0, 0.0) == 0
    assert math.isnan(gate.allowed(math.nan, 1.0))


def test_the_gates_are_as_tight_as_they_are_said_to_be() -> None:
    """Loosening one is a decision, not a side effect."""
    assert LOGIT_GATES[Arithmetic.FLOAT32].range_fraction <= 1e-5
    assert LOGIT_GATES[Arithmetic.FLOAT32].eager_factor <= 4
    assert LOGIT_GATES[Arithmetic.INT8_ACTIVATIONS].range_fraction <= 2e-2
    limits = {name: (gate.mean_kl_divergence, gate.top1_agreement) for name, gate in QUALITY_GATES.items()}
    for name, divergence, agreement in (("int8", 0.005, 0.985), ("int4", 0.05, 0.90)):
        assert limits[name][0] <= divergence
        assert limits[name][1] >= agreement
    assert set(LOGIT_GATES) == set(Arithmetic)
    assert all(gate.reason for gate in (*LOGIT_GATES.values(), *QUALITY_GATES.values()))


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((1, 1, 0), Arithmetic.FLOAT32),
        ((4, 1, 1), Arithmetic.INT8_ACTIVATIONS),
        ((1, 4, 1), Arithmetic.INT8_ACTIVATIONS),
        ((1, 0, 4), Arithmetic.INT8_ACTIVATIONS),
        ((None, None, None), Arithmetic.FLOAT32),
    ],
)
def test_one_product_with_int8_activations_decides(levels: tuple[int | None, ...], expected: Arithmetic) -> None:
    projections, embedding, override = (
        level if level is None else Quantization(8, 32, True, level) for level in levels
    )
    recipe = replace(
        ExportRecipe.load("cpu-int8"),
        quantization=projections,
        embedding=embedding,
        overrides={"w2": override} if override else {},
    )
    assert arithmetic_of(recipe) is expected


# The report

GOOD = Measurement("all", error=1e-6, eager_error=1e-6, allowed=1e-5, verdict=Verdict.PASS)
NEAR_TIE = replace(GOOD, error=9e-6, verdict=Verdict.AMBIGUOUS)
BAD = replace(GOOD, positions="last", error=2e-5, verdict=Verdict.FAIL)
BROKEN = replace(BAD, error=math.inf)
QUALITY = Quality("a text", 100, 0.001, 0.01, 0.99, 15.0, 14.9, passed=True)


def case(*measurements: Measurement, name: str = "1 x 8 tokens", **changes: Any) -> CaseResult:
    facts = {"arithmetic": Arithmetic.FLOAT32, "batch": 1, "length": 8, "nonfinite": 0, "top1_changes": 0}
    return CaseResult(name=name, measurements=measurements, **{**facts, **changes})


def report(**changes: Any) -> ParityReport:
    facts = {
        "bundle": "b",
        "source": {"kind": "preset", "location": "x"},
        "precision": "int8",
        "provider": "cpu",
        "versions": {"onnxruntime": "1"},
        "max_sequence_length": 64,
        "stored": (StoredTensors(expected=3, equal=3, problems=()),),
        "cases": (case(GOOD), case(GOOD, NEAR_TIE, length=16)),
    }
    return ParityReport(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"quality": QUALITY}, True),
        ({"quality": replace(QUALITY, passed=None)}, True),
        ({"quality": replace(QUALITY, passed=False)}, False),
        ({"cases": ()}, False),
        ({"cases": (case(GOOD), case(GOOD, BAD))}, False),
        ({"stored": ()}, False),
        ({"stored": (StoredTensors(3, 3, ()), StoredTensors(3, 2, ("norm.weight differs",)))}, False),
        ({"stored": (StoredTensors(3, 2, ()),)}, False),
    ],
    ids=[
        "all good",
        "quality good",
        "quality not gated",
        "quality bad",
        "no case",
        "one measurement bad",
        "nothing stored",
        "one graph's tensor bad",
        "fewer equal than expected",
    ],
)
def test_everything_has_to_hold(changes: dict[str, Any], passed: bool) -> None:
    made = report(**changes)
    assert made.passed is passed
    assert made.to_dict()["passed"] is passed


@pytest.mark.parametrize(
    ("measurements", "verdict", "worst"),
    [
        ((GOOD,), Verdict.PASS, GOOD),
        ((GOOD, NEAR_TIE), Verdict.AMBIGUOUS, NEAR_TIE),
        ((NEAR_TIE, BAD, GOOD), Verdict.FAIL, BAD),
        (
            (GOOD, replace(GOOD, positions="last", allowed=2e-6)),
            Verdict.PASS,
            replace(GOOD, positions="last", allowed=2e-6),
        ),
    ],
)
def test_a_case_is_as_good_as_its_worst_measurement(
    measurements: tuple[Measurement, ...], verdict: Verdict, worst: Measurement
) -> None:
    made = case(*measurements)
    assert (made.verdict, made.worst) == (verdict, worst)


def test_the_share_of_a_gate() -> None:
    assert gate_share(GOOD) == pytest.approx(0.1)
    assert gate_share(BROKEN) == math.inf
    assert gate_share(replace(GOOD, error=0.0, allowed=0.0)) == 0
    assert gate_share(replace(GOOD, error=1e-9, allowed=0.0)) == math.inf


def test_the_counts_are_over_cases_and_graphs() -> None:
    made = report(stored=(StoredTensors(3, 3, ()), StoredTensors(4, 2, ("a differs", "b differs"))))
    assert (made.stored_equal, made.stored_problems) == (5, ["a differs", "b differs"])
    assert made.to_dict()["stored_tensors"] == {
        "expected": 7,
        "equal": 5,
        "calibrated": 0,
        "problems": ["a differs", "b differs"],
    }
    assert made.longest == made.to_dict()["longest_sequence"] == 16
    assert [made.count(v) for v in Verdict] == [1, 1, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["2 cases up to 16 of 64 tokens", "within the gate", "1 of them", "90%", "3 stored tensors"]),
        ({"quality": QUALITY}, ["rounded weights", "0.001 nats", "99.0%", "of 100"]),
        ({"quality": replace(QUALITY, passed=None)}, ["not gated"]),
        ({"quality": replace(QUALITY, passed=False)}, ["int8 gate", "0.001 nats"]),
        ({"cases": (case(GOOD), case(BAD), case(BROKEN))}, ["2 of 3 cases failed", "inf"]),
        ({"stored": (StoredTensors(2, 1, ("norm.weight differs",)),)}, ["1 stored tensors differ: norm.weight"]),
    ],
)
def test_the_summary_says_what_was_found(changes: dict[str, Any], words: list[str]) -> None:
    summary = report(**changes).summary()
    assert [word for word in words if word not in summary] == []


def test_a_report_of_no_cases_can_still_be_summed_up() -> None:
    assert "no case" in report(cases=()).summary()


def test_the_whole_report_is_strict_json() -> None:
    made = report(
        cases=(case(GOOD), case(BROKEN, nonfinite=4, arithmetic=Arithmetic.INT8_ACTIVATIONS)),
        skipped=(Skipped("1 x 64 tokens", "too long"),),
        quality=replace(QUALITY, mean_kl_divergence=math.nan, perplexity=math.inf, passed=False),
    )
    values = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert values["cases"][1]["measurements"][0]["error"] is None
    assert values["cases"][1]["verdict"] == "FAIL"
    assert values["cases"][1]["arithmetic"] == "int8 activations"
    assert values["quality"]["mean_kl_divergence"] is None
    assert values["skipped"] == [{"name": "1 x 64 tokens", "reason": "too long"}]
    assert set(values["gates"]) == {"float32", "int8 activations", "quality"}


def test_the_digest_is_strict_json_and_names_the_worst_case() -> None:
    digest = json.loads(json.dumps(report(quality=QUALITY).digest(), allow_nan=False))
    assert (digest["worst_error"], digest["worst_error_allowed"]) == (9e-6, 1e-5)
    assert (digest["cases"], digest["ambiguous"], digest["stored_tensors_equal"]) == (2, 1, 3)
    assert digest["quality"]["passed"] is True


# The pieces of a sequence


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 48])
def test_pieces_cover_the_sequence(length: int) -> None:
    ways = pieces(length)
    assert {sum(sizes) for sizes in ways.values()} == {length}
    assert all(size > 0 for sizes in ways.values() for size in sizes)
    assert ways["decode only"] == [1] * length
    if length > 16:
        assert ways["prefill+decode"][0] > 1 == ways["prefill+decode"][-1]
        assert len(set(ways["uneven chunks"])) > 2


@pytest.mark.parametrize(("limit", "length"), [(512, 48), (20, 20), (1, 1)])
def test_stepwise_cases_fit_the_model(limit: int, length: int) -> None:
    cases = stepwise_cases(96, limit)
    assert len(cases) == 3
    for made, sizes in cases:
        assert made.input_ids.shape == (1, length)
        assert sum(sizes) == length
        assert 0 <= made.input_ids.min() <= made.input_ids.max() < 96
    again = stepwise_cases(96, limit)
    assert all(np.array_equal(a.input_ids, b.input_ids) for (a, _), (b, _) in zip(cases, again, strict=True))


# The copy with float32 activations


@pytest.fixture(scope="module")
def bundle(wide_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic") / "bundle"
    export_bundle(wide_checkpoint, folder, ExportRecipe.load("cpu-int8"), effort=Effort.OFF)
    return folder


def accuracy_levels(graph: Path) -> set[int]:
    nodes = onnx.load(graph, load_external_data=False).graph.node
    return {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"}


def contents(folder: Path) -> dict[str, Any]:
    return {path.name: describe_file(path) for path in sorted(folder.iterdir())}


def test_the_copy_differs_in_arithmetic_only_and_is_whole(bundle: Path) -> None:
    with float32_activations(bundle) as copy:
        opened = Bundle.open(copy)
        opened.check_hashes()
        graph = next(iter(opened.manifest.graphs.values())).file
        assert (accuracy_levels(bundle / graph), accuracy_levels(copy / graph)) == ({4}, {1})
        assert (copy / f"{graph}.data").read_bytes() == (bundle / f"{graph}.data").read_bytes()
        before, after = (onnx.load(f / graph, load_external_data=False) for f in (bundle, copy))
        for node in after.graph.node:
            for attribute in (a for a in node.attribute if a.name == "accuracy_level"):
                attribute.i = 4
        assert after.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


@pytest.mark.parametrize("fails", [False, True])
def test_the_bundle_is_untouched_and_the_copy_goes(bundle: Path, fails: bool) -> None:
    before, around = contents(bundle), sorted(bundle.parent.iterdir())
    try:
        with float32_activations(bundle) as copy:
            assert copy.is_dir()
            assert contents(bundle) == before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not copy.exists()
    assert contents(bundle) == before
    assert sorted(bundle.parent.iterdir()) == around
