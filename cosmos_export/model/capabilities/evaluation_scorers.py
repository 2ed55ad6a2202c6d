"""What the evaluation head assesses a vector by: one module a question.

    B  batch    D  dim

Each takes the vector (B, D), or (B, 2D) with the query beside it, and gives scores by name, (B, 1), or the scores that
decide, a column a label.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.model.capabilities.layers import Scores, detector, in_score_precision, perceptron, probabilities
from cosmos_runtime import LABELS, THRESHOLDS


class ConfidenceEstimator(nn.Module):
    """How sure the vector is of itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.confidence_network = perceptron(dim, dim // 2, 1, dropout=0.1)
        self.uncertainty_estimator = perceptron(dim, dim // 2, 1)

    def forward(self, x: Tensor) -> Scores:
        uncertainty = F.softplus(in_score_precision(self.uncertainty_estimator(x)))
        return {"confidence": probabilities(self.confidence_network(x)), "uncertainty": uncertainty}


class QualityScorer(nn.Module):
    """Dimensions of quality, of the vector alone."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.quality_dimensions = perceptron(dim, dim, len(LABELS["evaluation.quality"]))

    def forward(self, x: Tensor) -> Tensor:
        return probabilities(self.quality_dimensions(x))


class FactualityChecker(nn.Module):
    """How factual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.factual_scorer = perceptron(dim, dim, 1)

    def forward(self, x: Tensor) -> Scores:
        return {"factuality": probabilities(self.factual_scorer(x))}


class CompletenessChecker(nn.Module):
    """How much of the query is answered; takes the vector and the query side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.completeness_scorer = perceptron(2 * dim, dim, 1)

    def forward(self, with_query: Tensor) -> Scores:
        return {"completeness": probabilities(self.completeness_scorer(with_query))}


class AnswerVerifier(nn.Module):
    """Whether the vector answers the query; takes both side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.verification_network = perceptron(2 * dim, dim, 1, norm=True)

    def forward(self, with_query: Tensor) -> Scores:
        return {"verification": probabilities(self.verification_network(with_query))}


class SelfCorrection(nn.Module):
    """Kinds of errors, and the vector that there should be instead."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.error_detector = detector(dim, dim, len(LABELS["evaluation.errors"]), norm=True)
        self.corrector = perceptron(2 * dim, 2 * dim, dim, dropout=0.1)

    def forward(self, with_query: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """What to put in the vector's place (B, D), and in which rows (B, 1), going by the errors found in it."""
        erroneous = errors.amax(-1, keepdim=True) > THRESHOLDS["evaluation.erroneous"]
        return self.corrector(with_query), erroneous

    def errors(self, x: Tensor) -> Tensor:
        """What `forward` goes by, (B, 5)."""
        return probabilities(self.error_detector(x))
