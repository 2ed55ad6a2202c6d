"""The nested report that users read, from the flat score tensors that a model gives.

The eager model and the runtime both call `nested_diagnostics`, so their reports cannot differ in form. A score is
compared with its threshold in its own dtype: what a graph decided in float32 is not decided anew in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from cosmos_runtime.scores import BLOCKING_LEVELS, LABELS, THRESHOLDS, Settings

# The scores of one row, by name.
RowScores: TypeAlias = Mapping[str, Any]
Report: TypeAlias = dict[str, Any]

_MODES = {
    "chain_of_thought": "CoT",
    "tree_of_thoughts": "ToT",
    "self_consistency": "Self-Consistency",
    "reflexion": "Reflexion",
}
_CONFIDENCE_LEVELS = ((0.9, "very_high"), (0.7, "high"), (0.5, "medium"), (0.3, "low"))
_GRADES = ((0.9, "A+"), (0.8, "A"), (0.7, "B"), (0.6, "C"), (0.5, "D"))
_EXTREMES = 3  # how many strengths and weaknesses a quality report names


def nested_diagnostics(scores: Mapping[str, npt.ArrayLike], settings: Settings, row: int = 0) -> Report:
    """The report of one row of a batch.

    `scores` holds the tensors of `score_specs(settings)`, the batch first. A blocked row has no "evaluation".
    """
    of_row = {name: np.asarray(tensor)[row] for name, tensor in scores.items()}
    report: Report = {}
    if "reasoning" in settings:
        report["reasoning"] = _reasoning(of_row, settings["reasoning"])
    if "memory" in settings:
        report["memory"] = _memory(of_row, settings["memory"])
    if "safety" in settings:
        report["safety"] = _safety(of_row, settings["safety"])
        report["is_safe"] = bool(of_row["safety.is_safe"])
        if settings["safety"]["level"] in BLOCKING_LEVELS and of_row["output_blocked"]:
            return {**report, "output_blocked": True}
    if "evaluation" in settings:
        report["evaluation"] = _evaluation(of_row, settings["evaluation"])
    return report


def _reasoning(scores: RowScores, settings: Mapping[str, Any]) -> Report:
    mode = settings["mode"]
    report: Report = {}
    if mode == "chain_of_thought":
        report["num_thoughts"] = settings["thoughts"]
    elif mode == "tree_of_thoughts":
        report["num_branches"] = settings["branches"]
    elif mode == "self_consistency":
        report["consistency_score"] = float(scores["reasoning.consistency"])
    elif mode == "reflexion":
        error = scores["reasoning.error"]
        report["error_detected"] = _exceeds(error, "reasoning.error")
        report["confidence"] = 1.0 - float(error)
        report["correction_applied"] = False  # it would need an earlier output, which the model never passes
    report["mode"] = _MODES.get(mode, "Direct")
    return {**report, "extended": True} if settings["extended"] else report


def _memory(scores: RowScores, settings: Mapping[str, Any]) -> Report:
    report = {"similar_episodes_found": 0}  # no episode ever ends
    return {**report, "episode_length": int(scores["memory.calls"])} if settings["episodes"] else report


class _Finding(NamedTuple):
    """What one safety check has to say."""

    report: Report
    warning: str | None = None
    intervention: str | None = None


def _safety(scores: RowScores, settings: Mapping[str, Any]) -> Report:
    checks = [check for check in _CHECKS if check.switch is None or check.switch in settings["checks"]]
    findings = {check.section: check.find(scores) for check in checks}
    warnings = [found.warning for found in findings.values() if found.warning]
    interventions = [found.intervention for found in findings.values() if found.intervention]
    return {
        "checks_performed": [check.name for check in checks],
        "warnings": warnings,
        "interventions": interventions,
        **{section: found.report for section, found in findings.items()},
        "overall_safe": bool(scores["safety.is_safe"]),
        "safety_level": settings["level"],
        "num_warnings": len(warnings),
        "num_interventions": len(interventions),
    }


def _content_filter(scores: RowScores) -> _Finding:
    harmful = _reaches(scores["safety.harmful"], THRESHOLDS["safety.harmful"])
    report = {
        "overall_harmfulness": float(scores["safety.harmful"]),
        "categories": _by_label(scores, "safety.categories"),
        "max_category": _highest(scores, "safety.categories"),
    }
    return _Finding(report, warning="Harmful content detected" if harmful else None)


def _toxicity(scores: RowScores) -> _Finding:
    overall = scores["safety.toxicity"].max()
    toxic = _exceeds(overall, "safety.toxic")
    report = {**_by_label(scores, "safety.toxicity"), "overall": float(overall), "is_toxic": toxic}
    return _Finding(report, warning="Toxic content detected" if toxic else None)


def _bias(scores: RowScores) -> _Finding:
    biased = _exceeds(scores["safety.overall_bias"], "safety.biased")
    report = {
        **_by_label(scores, "safety.bias"),
        "overall_bias": float(scores["safety.overall_bias"]),
        "max_bias_type": _highest(scores, "safety.bias"),
        "debiasing_applied": biased,
    }
    return _Finding(report, intervention="Bias mitigation applied" if biased else None)


def _hallucination(scores: RowScores) -> _Finding:
    confidence, factuality = scores["safety.confidence"], scores["safety.factuality"]
    likely = _exceeds(confidence, "safety.confident") and _stays_below(factuality, "safety.fictitious")
    report = {
        "confidence": float(confidence),
        "factuality": float(factuality),
        "likely_hallucination": likely,
    }
    return _Finding(report, warning="Possible hallucination detected" if likely else None)


def _privacy(scores: RowScores) -> _Finding:
    private = _exceeds(scores["safety.pii"].max(), "safety.private")
    report = {
        "pii_types_detected": _by_label(scores, "safety.pii"),
        "contains_pii": private,
        "max_pii_type": _highest(scores, "safety.pii"),
        "anonymization_applied": private,
    }
    return _Finding(report, intervention="Privacy protection applied" if private else None)


def _adversarial(scores: RowScores) -> _Finding:
    attack = _exceeds(scores["safety.attack"], "safety.adversarial")
    report = {
        "attack_probability": float(scores["safety.attack"]),
        "likely_adversarial": attack,
        "defense_applied": attack,
    }
    return _Finding(report, intervention="Adversarial defense applied" if attack else None)


def _jailbreak(scores: RowScores) -> _Finding:
    risk = scores["safety.jailbreak"].max()
    attempt = _exceeds(risk, "safety.jailbreak")
    report = {
        **_by_label(scores, "safety.jailbreak"),
        "overall_jailbreak_risk": float(risk),
        "detected_pattern": _highest(scores, "safety.jailbreak"),
        "is_jailbreak_attempt": attempt,
    }
    return _Finding(report, warning="Jailbreak attempt detected" if attempt else None)


def _ethics(scores: RowScores) -> _Finding:
    ethical = _exceeds(scores["safety.overall_ethics"], "safety.ethical")
    weakest = LABELS["safety.ethics"][int(scores["safety.ethics"].argmin())]
    report = {
        **_by_label(scores, "safety.ethics"),
        "overall_ethical_score": float(scores["safety.overall_ethics"]),
        "is_ethical": ethical,
        "weakest_principle": weakest,
    }
    return _Finding(report, warning=None if ethical else f"Ethical concern: {weakest}")


class _Check(NamedTuple):
    """A safety check: its switch in the configuration (None: always on), and its two names in a report."""

    switch: str | None
    name: str
    section: str
    find: Callable[[RowScores], _Finding]


_CHECKS = (
    _Check("content_filtering", "content_filtering", "content_filter", _content_filter),
    _Check("toxicity_detection", "toxicity_detection", "toxicity", _toxicity),
    _Check("bias_mitigation", "bias_detection", "bias", _bias),
    _Check(None, "hallucination_detection", "hallucination", _hallucination),
    _Check("privacy_protection", "privacy_protection", "privacy", _privacy),
    _Check("adversarial_defense", "adversarial_defense", "adversarial", _adversarial),
    _Check("jailbreak_prevention", "jailbreak_prevention", "jailbreak", _jailbreak),
    _Check("ethical_guidelines", "ethical_evaluation", "ethics", _ethics),
)


def _evaluation(scores: RowScores, settings: Mapping[str, Any]) -> Report:
    rounds = int(scores["evaluation.rounds"])
    corrections = int(scores["evaluation.corrected"].sum()) if "self_correction" in settings["checks"] else 0
    return {
        "iterations": [_round(scores, settings["checks"], index) for index in range(rounds)],
        "improvements_made": corrections,
        "final_assessment": {
            "confidence": _confidence(scores, -1),
            "quality": _quality(scores, -1),
            "total_iterations": rounds,
            "improvements_made": corrections,
            "ready_for_output": _reaches(scores["evaluation.confidence"][-1], settings["confidence_threshold"])
            and _reaches(scores["evaluation.overall_quality"][-1], THRESHOLDS["evaluation.ready"]),
        },
    }


def _round(scores: RowScores, checks: Sequence[str], index: int) -> Report:
    report: Report = {"iteration": index + 1}
    if "confidence_estimation" in checks:
        report["confidence"] = _confidence(scores, index)
    if "quality_scoring" in checks:
        report["quality"] = _quality(scores, index)
    report["factuality"] = _factuality(scores["evaluation.factuality"][index])
    report["completeness"] = _completeness(scores["evaluation.completeness"][index])
    if "answer_verification" in checks:
        report["verification"] = _verification(scores["evaluation.verification"][index])
    if "self_correction" in checks:
        report["correction"] = _correction(scores, index)
        report["output_updated"] = bool(scores["evaluation.corrected"][index])
    return report


def _confidence(scores: RowScores, index: int) -> Report:
    score = scores["evaluation.confidence"][index]
    confidence, uncertainty = float(score), float(scores["evaluation.uncertainty"][index])
    return {
        "confidence": confidence,
        "uncertainty": uncertainty,
        "reliability": confidence * (1.0 - uncertainty),
        "confidence_level": _level(score, _CONFIDENCE_LEVELS, lowest="very_low"),
    }


def _quality(scores: RowScores, index: int) -> Report:
    names, quality = LABELS["evaluation.quality"], scores["evaluation.quality"][index]
    overall = scores["evaluation.overall_quality"][index]
    best_first, worst_first = (np.argsort(sign * quality, kind="stable")[:_EXTREMES] for sign in (-1, 1))
    return {
        **_named(names, quality),
        "overall_quality": float(overall),
        "quality_grade": _level(overall, _GRADES, lowest="F"),
        "strengths": [names[i] for i in best_first],
        "weaknesses": [names[i] for i in worst_first],
    }


def _factuality(score: np.floating) -> Report:
    return {
        "factuality_score": float(score),
        "likely_factual": _exceeds(score, "evaluation.factual"),
        "confidence_in_facts": float(score),
        "verification_needed": _stays_below(score, "evaluation.doubtful"),
    }


def _completeness(score: np.floating) -> Report:
    return {
        "completeness_score": float(score),
        "is_complete": _exceeds(score, "evaluation.complete"),
        "missing_information": 1.0 - float(score),
    }


def _verification(score: np.floating) -> Report:
    matches = _exceeds(score, "evaluation.verified")
    return {"verification_score": float(score), "answer_matches_query": matches, "overall_verified": matches}


def _correction(scores: RowScores, index: int) -> Report:
    names, errors = LABELS["evaluation.errors"], scores["evaluation.errors"][index]
    corrected = bool(scores["evaluation.corrected"][index])
    return {
        **_named(names, errors),
        "max_error_type": names[int(errors.argmax())],
        "needs_correction": corrected,
        "correction_applied": corrected,
    }


def _named(names: Sequence[str], values: npt.NDArray[np.floating]) -> Report:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _by_label(scores: RowScores, name: str) -> Report:
    return _named(LABELS[name], scores[name])


def _highest(scores: RowScores, name: str) -> str:
    return LABELS[name][int(scores[name].argmax())]


def _exceeds(score: np.floating, threshold: str) -> bool:
    return bool(score > score.dtype.type(THRESHOLDS[threshold]))


def _stays_below(score: np.floating, threshold: str) -> bool:
    return bool(score < score.dtype.type(THRESHOLDS[threshold]))


def _reaches(score: np.floating, threshold: float) -> bool:
    return bool(score >= score.dtype.type(threshold))


def _level(score: np.floating, levels: Sequence[tuple[float, str]], lowest: str) -> str:
    """The first of `levels`, given in falling order, that the score reaches."""
    return next((name for threshold, name in levels if _reaches(score, threshold)), lowest)
