"""Evaluation head (cosmos_reference, section 7): rounds of scoring and correcting, then a final assessment.

    B  batch    D  dim    R  rounds (`verification_depth`)    N  scores of an assessment

Rows leave the loop one by one; the rounds are unrolled, and a row that has left keeps its vector. A vector that was not
corrected keeps its assessment, too: a graph then computes a round only where some row was corrected in the one before
(`onnx.passes.SkipUnchosen`). What a row's unused rounds hold is not part of its report ("evaluation.rounds" says how
many are).
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities.evaluation_scorers import (
    AnswerVerifier,
    CompletenessChecker,
    ConfidenceEstimator,
    FactualityChecker,
    QualityScorer,
    SelfCorrection,
)
from cosmos_export.model.capabilities.layers import Scores, choose
from cosmos_runtime import LABELS, THRESHOLDS

# The columns of an assessment: first what is asked at the end, too, then what only rounds ask.
_FINAL = {"confidence": 1, "uncertainty": 1, "quality": len(LABELS["evaluation.quality"]), "overall_quality": 1}
_OF_ROUNDS = {"factuality": 1, "completeness": 1, "verification": 1, "errors": len(LABELS["evaluation.errors"])}
# Switches of what a round may leave out.
_SWITCHES = {
    "confidence": "confidence_estimation",
    "uncertainty": "confidence_estimation",
    "quality": "quality_scoring",
    "overall_quality": "quality_scoring",
    "verification": "answer_verification",
    "errors": "self_correction",
}


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
        settings = self.config.evaluation
        with_query = torch.cat((x, query), dim=-1)  # (B, 2D), the vector first
        assessments, corrections, kept_rounds = [self._assess(with_query)], [], []
        running: Tensor | None = None  # the rows (B, 1) that have not left the loop; None for all
        for index in range(settings.verification_depth):
            before, after, kept = assessments[-1], assessments[-1], running
            if settings.self_correction:
                better, erroneous = self.self_correction(with_query, before[:, self._columns["errors"]])
                corrected = _both(running, erroneous)
                with_query = choose(corrected, torch.cat((better, query), dim=-1), with_query)
                anew = self._assess(with_query, before if index == settings.verification_depth - 1 else None)
                after = choose(corrected, anew, before)
                corrections.append(corrected)
                kept = corrected if index else running  # from the second round on, one that corrects nothing is the end
            kept_rounds.append(kept)
            running = kept
            if settings.quality_scoring:
                overall = before[:, self._columns["overall_quality"]]
                running = _both(kept, overall <= THRESHOLDS["evaluation.excellent"])
            assessments.append(after)
        scores = self._gathered(assessments)
        if corrections:
            scores["evaluation.corrected"] = torch.cat(corrections, dim=-1)
        return with_query[:, : x.shape[-1]], scores | {"evaluation.rounds": _count(kept_rounds, x)}

    def _assess(self, with_query: Tensor, before: Tensor | None = None) -> Tensor:
        """Scores (B, N) of a vector, which has the query beside it. At the end of the loop those of rounds alone are
        not asked: they stay what they were `before`."""
        vector = with_query[:, : self.config.dim]
        scores = self.confidence_estimator(vector) | self.quality_scorer(vector)
        if before is not None:
            return torch.cat([*scores.values(), before[:, sum(_FINAL.values()) :]], dim=-1)
        scores |= self.factuality_checker(vector) | self.completeness_checker(with_query)
        if self.config.evaluation.answer_verification:
            scores |= self.answer_verifier(with_query)
        if self.config.evaluation.self_correction:
            scores |= self.self_correction.errors(vector)
        return torch.cat(list(scores.values()), dim=-1)

    @property
    def _columns(self) -> dict[str, slice]:
        """Where in an assessment each score is."""
        widths = _FINAL | {name: width for name, width in _OF_ROUNDS.items() if self._in_rounds(name)}
        ends = accumulate(widths.values())
        return {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}

    def _in_rounds(self, name: str) -> bool:
        return name not in _SWITCHES or getattr(self.config.evaluation, _SWITCHES[name])

    def _gathered(self, assessments: list[Tensor]) -> Scores:
        """One tensor a score, with an axis after the batch for the rounds that report it, and for the end."""
        rounds, columns = len(assessments) - 1, self._columns
        side_by_side = torch.cat(assessments, dim=-1)  # (B, (R + 1) N)
        one_by_one = side_by_side.unflatten(-1, (rounds + 1, -1))  # (B, R + 1, N)
        width = one_by_one.shape[-1]
        scores: Scores = {}
        for name, place in columns.items():
            first, end = 0 if self._in_rounds(name) else rounds, rounds + (name in _FINAL)
            if place.stop - place.start == 1:  # a column of each, in one step
                score = side_by_side[:, first * width + place.start : end * width : width]
            else:
                score = one_by_one[:, first:end, place]
            scores[f"evaluation.{name}"] = score
        return scores


def _both(these: Tensor | None, those: Tensor) -> Tensor:
    """Rows (B, 1) that are among both; None stands for all rows."""
    return those if these is None else these & those


def _count(kept_rounds: list[Tensor | None], like: Tensor) -> Tensor:
    """How many rounds each row (B,) keeps; None stands for a round that all rows keep."""
    always = kept_rounds.count(None)
    some = [kept for kept in kept_rounds if kept is not None]
    if not some:
        return torch.full_like(like[:, 0], always, dtype=torch.int64)
    return torch.cat(some, dim=-1).sum(-1) + always
