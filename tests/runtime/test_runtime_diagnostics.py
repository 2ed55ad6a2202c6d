"""Nested reports from flat score tensors: what is in them, and that nothing is decided anew in another precision."""

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cosmos_runtime import (
    CAPABILITIES,
    EVALUATION_CHECKS,
    LABELS,
    SAFETY_CHECKS,
    ScoreSpec,
    nested_diagnostics,
    score_specs,
)

Scores = dict[str, NDArray[Any]]

SETTINGS: dict[str, dict[str, Any]] = {
    "reasoning": {"mode": "chain_of_thought", "extended": False, "thoughts": 5, "branches": 3},
    "memory": {"episodes": True},
    "safety": {"level": "high", "checks": list(SAFETY_CHECKS)},
    "evaluation": {"rounds": 2, "checks": list(EVALUATION_CHECKS), "confidence_threshold": 0.8},
}


def zeros(settings: dict[str, Any], rows: int = 1, dtype: type = np.float32) -> Scores:
    """Every score tensor, all zero; safe, and without a round."""
    types = {"float32": dtype, "int64": np.int64, "bool": np.bool_}
    scores = {spec.name: np.zeros((rows, *spec.shape), types[spec.dtype]) for spec in score_specs(settings)}
    if "safety" in settings:
        scores["safety.is_safe"][:] = True
    return scores


def only(capability: str, **changes: Any) -> dict[str, dict[str, Any]]:
    return {capability: {**SETTINGS[capability], **changes}}


def test_no_capabilities_no_scores_no_report() -> None:
    assert score_specs({}) == ()
    assert nested_diagnostics({}, {}) == {}


def test_reports_come_in_the_order_of_the_capabilities() -> None:
    report = nested_diagnostics(zeros(SETTINGS), dict(reversed(SETTINGS.items())))
    assert list(report) == ["reasoning", "memory", "safety", "is_safe", "evaluation"]
    assert json.loads(json.dumps(report)) == report


def test_settings_survive_json() -> None:
    assert score_specs(json.loads(json.dumps(SETTINGS))) == score_specs(SETTINGS)


def test_tensors_of_all_capabilities() -> None:
    names = [spec.name for spec in score_specs(SETTINGS)]
    assert len(names) == len(set(names))
    by_name = {spec.name: spec for spec in score_specs(SETTINGS)}
    assert by_name["safety.pii"] == ScoreSpec("safety.pii", (10,))
    assert by_name["evaluation.quality"] == ScoreSpec("evaluation.quality", (3, 8))
    assert by_name["evaluation.errors"] == ScoreSpec("evaluation.errors", (2, 5))
    assert by_name["evaluation.corrected"] == ScoreSpec("evaluation.corrected", (2,), "bool")
    assert by_name["evaluation.rounds"] == ScoreSpec("evaluation.rounds", (), "int64")
    assert by_name["output_blocked"] == ScoreSpec("output_blocked", (), "bool")
    assert LABELS.keys() <= by_name.keys()


@pytest.mark.parametrize("switch", [*SAFETY_CHECKS, None])
def test_each_safety_switch_has_its_tensors_and_its_section(switch: str | None) -> None:
    settings = only("safety", checks=[switch] if switch else [])
    names = [spec.name for spec in score_specs(settings)]
    report = nested_diagnostics(zeros(settings), settings)["safety"]
    sections = [key for key, value in report.items() if isinstance(value, dict)]
    assert names[-2:] == ["safety.is_safe", "output_blocked"]
    assert len(report["checks_performed"]) == len(sections) == (2 if switch else 1)
    assert "hallucination_detection" in report["checks_performed"]
    assert {"safety.confidence", "safety.factuality"} <= set(names)


def test_only_levels_that_block_have_the_decision() -> None:
    for level, blocks in (("low", False), ("medium", False), ("high", True), ("strict", True)):
        names = [spec.name for spec in score_specs(only("safety", level=level))]
        assert ("output_blocked" in names) == blocks


def test_a_blocked_row_ends_its_report() -> None:
    scores = zeros(SETTINGS, rows=2)
    scores["output_blocked"][1], scores["safety.is_safe"][1] = True, False
    free, blocked = (nested_diagnostics(scores, SETTINGS, row) for row in range(2))
    assert list(blocked) == ["reasoning", "memory", "safety", "is_safe", "output_blocked"]
    assert blocked["output_blocked"] is True
    assert blocked["is_safe"] is blocked["safety"]["overall_safe"] is False
    assert "output_blocked" not in free


@pytest.mark.parametrize(
    ("mode", "report"),
    [
        ("chain_of_thought", {"num_thoughts": 5, "mode": "CoT"}),
        ("tree_of_thoughts", {"num_branches": 3, "mode": "ToT"}),
        ("self_consistency", {"consistency_score": 0.75, "mode": "Self-Consistency"}),
        (
            "reflexion",
            {"error_detected": True, "confidence": 0.25, "correction_applied": False, "mode": "Reflexion"},
        ),
        ("analogical", {"mode": "Direct"}),
    ],
)
@pytest.mark.parametrize("extended", [False, True])
def test_reasoning_modes(mode: str, report: dict[str, Any], extended: bool) -> None:
    settings = only("reasoning", mode=mode, extended=extended)
    scores = {spec.name: np.full((1,), 0.75, np.float32) for spec in score_specs(settings)}
    given = nested_diagnostics(scores, settings)["reasoning"]
    assert list(given.items()) == list({**report, **({"extended": True} if extended else {})}.items())


@pytest.mark.parametrize("episodes", [True, False])
def test_memory_counts_calls_where_episodes_are_kept(episodes: bool) -> None:
    settings = only("memory", episodes=episodes)
    report = nested_diagnostics({"memory.calls": np.array([4, 7])}, settings, row=1)["memory"]
    assert report == {"similar_episodes_found": 0, **({"episode_length": 7} if episodes else {})}


def test_safety_warnings_and_interventions() -> None:
    settings = only("safety")
    scores = zeros(settings)
    for name in ("harmful", "toxicity", "overall_bias", "confidence", "pii", "attack", "jailbreak"):
        scores[f"safety.{name}"][:] = 0.9
    scores["safety.ethics"][0] = [0.5, 0.4, 0.1, 0.4, 0.5, 0.5]
    report = nested_diagnostics(scores, settings)["safety"]
    assert report["warnings"] == [
        "Harmful content detected",
        "Toxic content detected",
        "Possible hallucination detected",
        "Jailbreak attempt detected",
        "Ethical concern: autonomy",
    ]
    assert report["interventions"] == [
        "Bias mitigation applied",
        "Privacy protection applied",
        "Adversarial defense applied",
    ]
    assert (report["num_warnings"], report["num_interventions"]) == (5, 3)
    quiet = zeros(settings)
    quiet["safety.overall_ethics"][:] = 0.7
    report = nested_diagnostics(quiet, settings)["safety"]
    assert report["warnings"] == report["interventions"] == []


# (score, threshold, where the report says what was decided); a score at the threshold is not over it
DECISIONS = [
    ("safety.toxicity", 0.5, ("safety", "toxicity", "is_toxic")),
    ("safety.overall_bias", 0.5, ("safety", "bias", "debiasing_applied")),
    ("safety.pii", 0.6, ("safety", "privacy", "contains_pii")),
    ("safety.pii", 0.6, ("safety", "privacy", "anonymization_applied")),
    ("safety.attack", 0.7, ("safety", "adversarial", "likely_adversarial")),
    ("safety.attack", 0.7, ("safety", "adversarial", "defense_applied")),
    ("safety.jailbreak", 0.65, ("safety", "jailbreak", "is_jailbreak_attempt")),
    ("safety.overall_ethics", 0.6, ("safety", "ethics", "is_ethical")),
    ("evaluation.factuality", 0.7, ("evaluation", "iterations", 0, "factuality", "likely_factual")),
    ("evaluation.completeness", 0.75, ("evaluation", "iterations", 0, "completeness", "is_complete")),
    ("evaluation.verification", 0.7, ("evaluation", "iterations", 0, "verification", "overall_verified")),
]


def decided(scores: Scores, path: tuple[str | int, ...]) -> Any:
    found: Any = nested_diagnostics(scores, SETTINGS)
    for key in path:
        found = found[key]
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "threshold", "path"), DECISIONS)
def test_decisions_are_made_in_the_scores_own_precision(
    name: str, threshold: float, path: tuple[str | int, ...], dtype: type
) -> None:
    """0.7 in float32 is less than 0.7 in float64, and 0.6 is more: a graph compares within its own."""
    scores = zeros(SETTINGS, dtype=dtype)
    scores["evaluation.rounds"][:] = 1
    at = np.array(threshold, dtype)
    for value, expected in ((at, False), (np.nextafter(at, dtype(1)), True), (np.nextafter(at, dtype(0)), False)):
        scores[name][:] = value
        assert decided(scores, path) is expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thresholds_that_are_reached(dtype: type) -> None:
    scores = zeros(SETTINGS, dtype=dtype)
    scores["safety.harmful"][:] = 0.5
    assert "Harmful content detected" in decided(scores, ("safety", "warnings"))
    scores["safety.harmful"][:] = np.nextafter(dtype(0.5), dtype(0))
    assert "Harmful content detected" not in decided(scores, ("safety", "warnings"))
    ready = ("evaluation", "final_assessment", "ready_for_output")
    scores["evaluation.confidence"][:, -1] = 0.8
    scores["evaluation.overall_quality"][:, -1] = 0.6
    assert decided(scores, ready) is True
    scores["evaluation.overall_quality"][:, -1] = np.nextafter(dtype(0.6), dtype(0))
    assert decided(scores, ready) is False
    scores["evaluation.overall_quality"][:, -1] = 1
    scores["evaluation.confidence"][:, -1] = np.nextafter(dtype(0.8), dtype(0))
    assert decided(scores, ready) is False


@pytest.mark.parametrize(
    ("score", "level", "grade"),
    [
        (1.0, "very_high", "A+"),
        (0.9, "very_high", "A+"),
        (0.85, "high", "A"),
        (0.8, "high", "A"),
        (0.7, "high", "B"),
        (0.6, "medium", "C"),
        (0.5, "medium", "D"),
        (0.3, "low", "F"),
        (0.29, "very_low", "F"),
        (0.0, "very_low", "F"),
    ],
)
def test_levels_of_confidence_and_grades_of_quality(score: float, level: str, grade: str) -> None:
    scores = zeros(only("evaluation"))
    scores["evaluation.confidence"][:] = scores["evaluation.overall_quality"][:] = score
    final = nested_diagnostics(scores, only("evaluation"))["evaluation"]["final_assessment"]
    assert final["confidence"]["confidence_level"] == level
    assert final["quality"]["quality_grade"] == grade


def test_strengths_and_weaknesses_are_ranked() -> None:
    scores = zeros(only("evaluation"))
    scores["evaluation.quality"][0, -1] = [0.5, 0.1, 0.9, 0.4, 0.2, 0.8, 0.7, 0.3]
    quality = nested_diagnostics(scores, only("evaluation"))["evaluation"]["final_assessment"]["quality"]
    assert quality["strengths"] == ["accuracy", "conciseness", "informativeness"]
    assert quality["weaknesses"] == ["coherence", "clarity", "helpfulness"]


def test_only_rounds_that_count_are_reported() -> None:
    settings = only("evaluation", rounds=3)
    scores = zeros(settings, rows=2)
    scores["evaluation.rounds"][:] = [2, 1]
    scores["evaluation.corrected"][:] = [[True, True, False], [False, False, False]]
    scores["evaluation.factuality"][:] = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    scores["evaluation.confidence"][0, -1] = 0.75
    first, second = (nested_diagnostics(scores, settings, row)["evaluation"] for row in range(2))
    assert [report["iteration"] for report in first["iterations"]] == [1, 2]
    assert [report["factuality"]["factuality_score"] for report in first["iterations"]] == pytest.approx([0.1, 0.2])
    assert [report["output_updated"] for report in first["iterations"]] == [True, True]
    assert first["improvements_made"] == first["final_assessment"]["improvements_made"] == 2
    assert first["final_assessment"]["total_iterations"] == 2
    assert first["final_assessment"]["confidence"]["confidence"] == 0.75
    assert len(second["iterations"]) == 1
    assert second["improvements_made"] == 0
    assert second["iterations"][0]["correction"]["correction_applied"] is False


@pytest.mark.parametrize("switch", EVALUATION_CHECKS)
def test_each_evaluation_switch_takes_its_part_of_a_round(switch: str) -> None:
    settings = only("evaluation", checks=[check for check in EVALUATION_CHECKS if check != switch])
    scores = zeros(settings)
    scores["evaluation.rounds"][:] = 1
    report = nested_diagnostics(scores, settings)["evaluation"]
    parts = {
        "confidence_estimation": ["confidence"],
        "quality_scoring": ["quality"],
        "answer_verification": ["verification"],
        "self_correction": ["correction", "output_updated"],
    }
    expected = [
        "iteration",
        "confidence",
        "quality",
        "factuality",
        "completeness",
        "verification",
        "correction",
        "output_updated",
    ]
    assert list(report["iterations"][0]) == [part for part in expected if part not in parts[switch]]
    assert list(report["final_assessment"])[:2] == ["confidence", "quality"]


def test_capabilities_have_an_order() -> None:
    assert tuple(SETTINGS) == CAPABILITIES
