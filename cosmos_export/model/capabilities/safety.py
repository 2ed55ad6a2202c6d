"""Safety head (cosmos_reference, section 6): checks in a row, three of which may change the vector.

    B  batch    D  dim    N  labels of a check

Each check takes the vector (B, D) as the ones before left it, and gives it on with its scores and, where it can, with
which rows (B,) are unsafe.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities.layers import (
    Scores,
    choose,
    detector,
    distribution,
    perceptron,
    probabilities,
    probability,
)
from cosmos_runtime import BLOCKING_LEVELS, LABELS, THRESHOLDS


class Checked(NamedTuple):
    """The vector (B, D) after a check, its scores by name, and the rows (B,) that it found unsafe (None: cannot)."""

    vector: Tensor
    scores: Scores
    unsafe: Tensor | None = None


class ContentFilter(nn.Module):
    """How harmful, and in which way."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.harmful_detector = detector(dim, dim // 2, 1, dropout=0.1)
        self.category_classifier = perceptron(dim, dim, len(LABELS["safety.categories"]))

    def forward(self, x: Tensor) -> Checked:
        harmful = probability(self.harmful_detector(x))
        scores = {"safety.harmful": harmful, "safety.categories": distribution(self.category_classifier(x))}
        return Checked(x, scores, harmful >= THRESHOLDS["safety.harmful"])


class ToxicityDetector(nn.Module):
    """Kinds of toxicity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.toxicity_scorer = detector(dim, dim, len(LABELS["safety.toxicity"]), norm=True)

    def forward(self, x: Tensor) -> Checked:
        scores = probabilities(self.toxicity_scorer(x))
        return Checked(x, {"safety.toxicity": scores}, scores.amax(-1) > THRESHOLDS["safety.toxic"])


class BiasDetector(nn.Module):
    """Kinds of bias; a vector that is biased on the whole is replaced."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias_analyzer = detector(dim, dim, len(LABELS["safety.bias"]))
        self.debiaser = perceptron(dim, 2 * dim, dim)

    def forward(self, x: Tensor) -> Checked:
        bias = probabilities(self.bias_analyzer(x))
        overall = bias.mean(-1, keepdim=True)
        vector = choose(overall > THRESHOLDS["safety.biased"], self.debiaser(x), x)
        return Checked(vector, {"safety.bias": bias, "safety.overall_bias": overall.squeeze(-1)})


class HallucinationDetector(nn.Module):
    """Confidence beside factuality: much of the one with little of the other is worth a warning."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.confidence_estimator = perceptron(dim, dim // 2, 1)
        self.factuality_checker = perceptron(dim, dim, 1, norm=True)

    def forward(self, x: Tensor) -> Checked:
        confidence, factuality = probability(self.confidence_estimator(x)), probability(self.factuality_checker(x))
        return Checked(x, {"safety.confidence": confidence, "safety.factuality": factuality})


class PrivacyProtector(nn.Module):
    """Kinds of personal information; a vector that holds any is anonymised."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pii_detector = detector(dim, dim, len(LABELS["safety.pii"]))
        self.anonymizer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Checked:
        scores = probabilities(self.pii_detector(x))
        vector = choose(scores.amax(-1, keepdim=True) > THRESHOLDS["safety.private"], self.anonymizer(x), x)
        return Checked(vector, {"safety.pii": scores})


class AdversarialDefense(nn.Module):
    """Attack or not; a vector under attack is mixed with its cleaned form."""

    CLEANED, KEPT = 0.7, 0.3  # shares of the cleaned form and of the vector as it was

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attack_detector = detector(dim, dim, 1)
        self.perturbation_cleaner = perceptron(dim, 2 * dim, dim, dropout=0.2)

    def forward(self, x: Tensor) -> Checked:
        attack = probabilities(self.attack_detector(x))  # (B, 1)
        mixed = self.CLEANED * self.perturbation_cleaner(x) + self.KEPT * x
        vector = choose(attack > THRESHOLDS["safety.adversarial"], mixed, x)
        return Checked(vector, {"safety.attack": attack.squeeze(-1)})


class JailbreakPrevention(nn.Module):
    """Patterns of getting round the model's rules."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.jailbreak_detector = detector(dim, dim, len(LABELS["safety.jailbreak"]))

    def forward(self, x: Tensor) -> Checked:
        scores = probabilities(self.jailbreak_detector(x))
        return Checked(x, {"safety.jailbreak": scores}, scores.amax(-1) > THRESHOLDS["safety.jailbreak"])


class EthicalGuardian(nn.Module):
    """Ethical principles; a vector that neglects them is worth a warning."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ethical_principles = perceptron(dim, dim, len(LABELS["safety.ethics"]))

    def forward(self, x: Tensor) -> Checked:
        scores = probabilities(self.ethical_principles(x))
        return Checked(x, {"safety.ethics": scores, "safety.overall_ethics": scores.mean(-1)})


# In the order in which they run: the switch of the configuration (None: always on), and the module.
_CHECKS: tuple[tuple[str | None, str], ...] = (
    ("content_filtering", "content_filter"),
    ("toxicity_detection", "toxicity_detector"),
    ("bias_mitigation", "bias_detector"),
    (None, "hallucination_detector"),
    ("privacy_protection", "privacy_protector"),
    ("adversarial_defense", "adversarial_defense"),
    ("jailbreak_prevention", "jailbreak_prevention"),
    ("ethical_guidelines", "ethical_guardian"),
)


class SafetySystem(nn.Module):
    """All checks have weights; the switches of `config.safety` say which of them run."""

    def __init__(self, config: CosmosAdvancedConfig) -> None:
        super().__init__()
        self.config = config
        self.content_filter = ContentFilter(config.dim)
        self.toxicity_detector = ToxicityDetector(config.dim)
        self.bias_detector = BiasDetector(config.dim)
        self.hallucination_detector = HallucinationDetector(config.dim)
        self.privacy_protector = PrivacyProtector(config.dim)
        self.adversarial_defense = AdversarialDefense(config.dim)
        self.jailbreak_prevention = JailbreakPrevention(config.dim)
        self.ethical_guardian = EthicalGuardian(config.dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Scores]:
        """x (B, D) to (B, D), and the scores of every check, "safety.is_safe" (B,) and, at a level that blocks unsafe
        rows, "output_blocked" (B,)."""
        scores: Scores = {}
        vector, flags = x, []
        for switch, module in _CHECKS:
            if switch is None or getattr(self.config.safety, switch):
                vector, found, flagged = getattr(self, module)(vector)
                flags += [] if flagged is None else [flagged]
                scores |= found
        unsafe = reduce(torch.bitwise_or, flags) if flags else torch.zeros_like(x[:, 0], dtype=torch.bool)
        scores["safety.is_safe"] = ~unsafe
        if self.config.safety.safety_level in BLOCKING_LEVELS:
            scores["output_blocked"] = unsafe
        return vector, scores
