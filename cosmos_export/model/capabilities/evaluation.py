"""Evaluation head (cosmos_reference, section 7): rounds of scoring and correcting, then a final assessment.

    B  batch    D  dim    R  rounds (`verification_depth`)

Rows leave the loop one by one; the rounds are unrolled, and a row that has left keeps its vector. What a row's unused
rounds hold is not part of its report ("evaluation.rounds" says how many are).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities.layers import (
    Scores,
    choose,
    detector,
    in_score_precision,
    perceptron,
    probabilities,
    probability,
)
from cosmos_runtime import LABELS, THRESHOLDS


class ConfidenceEstimator(nn.Module):
    """How sure the vector is of itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.confidence_network = perceptron(dim, dim // 2, 1, dropout=0.1)
        self.uncertainty_estimator = perceptron(dim, dim // 2, 1)

    def forward(self, x: Tensor) -> Scores:
        uncertainty = F.softplus(in_score_precision(self.uncertainty_estimator(x))).squeeze(-1)
        return {"confidence": probability(self.confidence_network(x)), "uncertainty": uncertainty}


class QualityScorer(nn.Module):
    """Dimensions of quality, of the vector alone, and their mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.quality_dimensions = perceptron(dim, dim, len(LABELS["evaluation.quality"]))

    def forward(self, x: Tensor) -> Scores:
        quality = probabilities(self.quality_dimensions(x))
        return {"quality": quality, "overall_quality": quality.mean(-1)}


class FactualityChecker(nn.Module):
    """How factual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.factual_scorer = perceptron(dim, dim, 1)

    def forward(self, x: Tensor) -> Scores:
        return {"factuality": probability(self.factual_scorer(x))}


class CompletenessChecker(nn.Module):
    """How much of the query is answered; takes the vector and the query side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.completeness_scorer = perceptron(2 * dim, dim, 1)

    def forward(self, with_query: Tensor) -> Scores:
        return {"completeness": probability(self.completeness_scorer(with_query))}


class AnswerVerifier(nn.Module):
    """Whether the vector answers the query; takes both side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.verification_network = perceptron(2 * dim, dim, 1, norm=True)

    def forward(self, with_query: Tensor) -> Scores:
        return {"verification": probability(self.verification_network(with_query))}


class SelfCorrection(nn.Module):
    """Kinds of errors, and the vector that there should be instead."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.error_detector = detector(dim, dim, len(LABELS["evaluation.errors"]), norm=True)
        self.corrector = perceptron(2 * dim, 2 * dim, dim, dropout=0.1)

    def forward(self, x: Tensor, with_query: Tensor) -> tuple[Tensor, Tensor, Scores]:
        """The corrected vector (B, D), the rows (B,) that need it, and the scores."""
        errors = probabilities(self.error_detector(x))
        erroneous = errors.amax(-1) > THRESHOLDS["evaluation.erroneous"]
        return self.corrector(with_query), erroneous, {"errors": errors}


class EvaluationSystem(nn.Module):
    """All scorers have weights; the switches of `config.evaluation` say which of them run in a round."""

    def __init__(self, config: CosmosAdvancedConfig) -> None:
        super().__init__()
        self.config = config
        self.confidence_estimator = ConfidenceEstimator(config.dim)
        self.quality_scorer = QualityScorer(config.dim)
        self.self_correction = SelfCorrection(config.dim)
        self.answer_verifier = AnswerVerifier(config.dim)
        self.factuality_checker = FactualityChecker(config.dim)
        self.completeness_checker = CompletenessChecker(config.dim)

    def forward(self, x: Tensor, query: Tensor) -> tuple[Tensor, Scores]:
        """x and query (B, D) to the vector (B, D) after all corrections, and the scores of rounds and of the end."""
        vector, rounds = x, []
        running = torch.ones_like(x[:, 0], dtype=torch.bool)  # (B,): rows that have not left the loop
        kept_rounds = torch.zeros_like(running, dtype=torch.int64)
        for index in range(self.config.evaluation.verification_depth):
            vector, kept, running, scores = self._round(vector, query, running, first=index == 0)
            kept_rounds = kept_rounds + kept
            rounds.append(scores)
        final = self.confidence_estimator(vector) | self.quality_scorer(vector)
        return vector, _gathered([*rounds, final]) | {"evaluation.rounds": kept_rounds}

    def _round(
        self, vector: Tensor, query: Tensor, running: Tensor, *, first: bool
    ) -> tuple[Tensor, Tensor, Tensor, Scores]:
        """The vector after a round, the rows (B,) that report it, those that go on to the next one, and its scores."""
        switches, with_query = self.config.evaluation, torch.cat((vector, query), dim=-1)
        scores = self._scores(vector, with_query)
        kept = running
        if switches.self_correction:
            better, erroneous, found = self.self_correction(vector, with_query)
            corrected = running & erroneous
            vector = choose(corrected, better, vector)
            kept = running if first else corrected  # from the second round on, one that corrects nothing is the end
            scores |= found | {"corrected": corrected}
        running = kept
        if switches.quality_scoring:
            running = kept & (scores["overall_quality"] <= THRESHOLDS["evaluation.excellent"])
        return vector, kept, running, scores

    def _scores(self, vector: Tensor, with_query: Tensor) -> Scores:
        switches = self.config.evaluation
        scores: Scores = {}
        if switches.confidence_estimation:
            scores |= self.confidence_estimator(vector)
        if switches.quality_scoring:
            scores |= self.quality_scorer(vector)
        scores |= self.factuality_checker(vector) | self.completeness_checker(with_query)
        if switches.answer_verification:
            scores |= self.answer_verifier(with_query)
        return scores


def _gathered(reports: list[Scores]) -> Scores:
    """One tensor a score, with an axis after the batch for the reports that have it, in their order."""
    names = dict.fromkeys(name for report in reports for name in report)
    return {f"evaluation.{n}": torch.stack([r[n] for r in reports if n in r], dim=1) for n in names}
