"""The score tensors that capability heads give beside the logits: names, shapes, labels and thresholds, each once.

    B  batch    R  evaluation rounds (`verification_depth`)

Which tensors there are follows from a model's *settings*, a plain dict that a manifest can carry. It has one group for
each capability that runs, and no others:

    {
        "reasoning": {"mode": "chain_of_thought", "extended": false, "thoughts": 5, "branches": 3},
        "memory": {"episodes": true},
        "safety": {"level": "high", "checks": ["content_filtering", "toxicity_detection", ...]},
        "evaluation": {"rounds": 2, "checks": ["confidence_estimation", ...], "confidence_threshold": 0.8},
    }

`checks` lists the switches that are on, by their names in the model's configuration.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

# In the order in which they run, and in which a report shows them.
CAPABILITIES = ("reasoning", "memory", "safety", "evaluation")

Settings: TypeAlias = Mapping[str, Mapping[str, Any]]

# At these safety levels an unsafe row is blocked: its logits are zero, and it is not evaluated.
SAFETY_LEVELS = ("low", "medium", "high", "strict")
BLOCKING_LEVELS = ("high", "strict")

# Switches of the configuration, in the order in which the checks run.
SAFETY_CHECKS = (
    "content_filtering",
    "toxicity_detection",
    "bias_mitigation",
    "privacy_protection",
    "adversarial_defense",
    "jailbreak_prevention",
    "ethical_guidelines",
)
EVALUATION_CHECKS = ("confidence_estimation", "quality_scoring", "answer_verification", "self_correction")

# What the last axis of a score tensor counts.
LABELS: Mapping[str, tuple[str, ...]] = {
    "safety.categories": (
        "violence",
        "hate_speech",
        "sexual_content",
        "self_harm",
        "illegal_activity",
        "misinformation",
        "privacy_violation",
    ),
    "safety.toxicity": ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"),
    "safety.bias": ("gender_bias", "racial_bias", "age_bias", "religious_bias", "political_bias"),
    "safety.pii": (
        "name",
        "email",
        "phone",
        "address",
        "ssn",
        "credit_card",
        "ip_address",
        "medical_info",
        "financial_info",
        "credentials",
    ),
    "safety.jailbreak": (
        "role_play_attack",
        "instruction_override",
        "context_confusion",
        "encoding_bypass",
        "prompt_injection",
    ),
    "safety.ethics": (
        "beneficence",
        "non_maleficence",
        "autonomy",
        "justice",
        "transparency",
        "accountability",
    ),
    "evaluation.quality": (
        "relevance",
        "coherence",
        "accuracy",
        "completeness",
        "clarity",
        "conciseness",
        "informativeness",
        "helpfulness",
    ),
    "evaluation.errors": (
        "logical_error",
        "factual_error",
        "consistency_error",
        "relevance_error",
        "formatting_error",
    ),
}

# What a score must exceed (`harmful`, `ready`: reach; `doubtful`, `fictitious`: stay below) for what the name says.
# A graph and the report built from its scores read the same entry.
THRESHOLDS: Mapping[str, float] = {
    "reasoning.error": 0.5,
    "safety.harmful": 0.5,
    "safety.toxic": 0.5,
    "safety.biased": 0.5,
    "safety.confident": 0.7,
    "safety.fictitious": 0.3,
    "safety.private": 0.6,
    "safety.adversarial": 0.7,
    "safety.jailbreak": 0.65,
    "safety.ethical": 0.6,
    "evaluation.factual": 0.7,
    "evaluation.doubtful": 0.5,
    "evaluation.complete": 0.75,
    "evaluation.verified": 0.7,
    "evaluation.erroneous": 0.5,
    "evaluation.excellent": 0.9,
    "evaluation.ready": 0.6,
}


class ScoreSpec(NamedTuple):
    """A score tensor: its name, its shape after the batch axis, and its dtype."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: Literal["float32", "int64", "bool"] = "float32"


def score_specs(settings: Settings) -> tuple[ScoreSpec, ...]:
    """Every score tensor of a model with these settings, in the order in which its heads give them."""
    return tuple(spec for name in CAPABILITIES if name in settings for spec in _SPECS[name](settings[name]))


def _labelled(name: str, *leading: int) -> ScoreSpec:
    return ScoreSpec(name, (*leading, len(LABELS[name])))


def _reasoning(settings: Mapping[str, Any]) -> list[ScoreSpec]:
    score = {"self_consistency": "reasoning.consistency", "reflexion": "reasoning.error"}.get(settings["mode"])
    return [ScoreSpec(score)] if score else []


def _memory(settings: Mapping[str, Any]) -> list[ScoreSpec]:
    return [ScoreSpec("memory.calls", dtype="int64")]


# In the order in which the checks run. The one that is no switch always does.
_SAFETY_SCORES = {
    "content_filtering": (ScoreSpec("safety.harmful"), _labelled("safety.categories")),
    "toxicity_detection": (_labelled("safety.toxicity"),),
    "bias_mitigation": (_labelled("safety.bias"), ScoreSpec("safety.overall_bias")),
    "hallucination_detection": (ScoreSpec("safety.confidence"), ScoreSpec("safety.factuality")),
    "privacy_protection": (_labelled("safety.pii"),),
    "adversarial_defense": (ScoreSpec("safety.attack"),),
    "jailbreak_prevention": (_labelled("safety.jailbreak"),),
    "ethical_guidelines": (_labelled("safety.ethics"), ScoreSpec("safety.overall_ethics")),
}


def _safety(settings: Mapping[str, Any]) -> list[ScoreSpec]:
    running = [check for check in _SAFETY_SCORES if check in settings["checks"] or check not in SAFETY_CHECKS]
    specs = [spec for check in running for spec in _SAFETY_SCORES[check]]
    specs.append(ScoreSpec("safety.is_safe", dtype="bool"))
    if settings["level"] in BLOCKING_LEVELS:
        specs.append(ScoreSpec("output_blocked", dtype="bool"))
    return specs


def _evaluation(settings: Mapping[str, Any]) -> list[ScoreSpec]:
    """Scores of each round; where the final assessment has them too, it is the last entry of the axis."""
    rounds, checks = settings["rounds"], settings["checks"]
    assessed = {check: (rounds if check in checks else 0) + 1 for check in EVALUATION_CHECKS}
    specs = [
        ScoreSpec("evaluation.confidence", (assessed["confidence_estimation"],)),
        ScoreSpec("evaluation.uncertainty", (assessed["confidence_estimation"],)),
        _labelled("evaluation.quality", assessed["quality_scoring"]),
        ScoreSpec("evaluation.overall_quality", (assessed["quality_scoring"],)),
        ScoreSpec("evaluation.factuality", (rounds,)),
        ScoreSpec("evaluation.completeness", (rounds,)),
    ]
    if "answer_verification" in checks:
        specs.append(ScoreSpec("evaluation.verification", (rounds,)))
    if "self_correction" in checks:
        specs.append(_labelled("evaluation.errors", rounds))
        specs.append(ScoreSpec("evaluation.corrected", (rounds,), "bool"))
    specs.append(ScoreSpec("evaluation.rounds", dtype="int64"))
    return specs


_SPECS = {"reasoning": _reasoning, "memory": _memory, "safety": _safety, "evaluation": _evaluation}
