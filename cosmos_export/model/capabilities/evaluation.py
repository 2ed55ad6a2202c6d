"""Evaluation head (cosmos_reference, section 7): rounds of scoring and correcting, then a final assessment.

    B  batch    D  dim    R  rounds (`verification_depth`)    N  scores of an assessment

Rows leave the loop one by one; the rounds are unrolled, and a row that has left keeps its vector. A vector that was not
corrected keeps its assessment, too. What a row's unused rounds hold is not part of its report ("evaluation.rounds" says
how many are).

Errors and quality decide what becomes of a vector. What a report says of the vectors that came of it is computed from
these, apart from how they came. So a graph can leave out what only a report reads (`onnx.passes.ScoresOnDemand`), and
compute a round only where some row was corrected in the one before (`onnx.passes.SkipUnchosen`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

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
_FINAL = {"confidence": 1, "uncertainty": 1, "quality": len(LABELS["evaluation.quality"])}
_OF_ROUNDS = {"factuality": 1, "completeness": 1, "verification": 1, "errors": len(LABELS["evaluation.errors"])}
# Switches of what a round may leave out.
_SWITCHES = {
    "confidence": "confidence_estimation",
    "uncertainty": "confidence_estimation",
    "quality": "quality_scoring",
    "verification": "answer_verification",
    "errors": "self_correction",
}


class _Deciding(NamedTuple):
    """What is decided by, of a vector: kinds of errors (B, 5), or (B, 0) where nobody corrects, and quality (B, 8)."""

    errors: Tensor
    quality: Tensor

    @property
    def is_excellent(self) -> Tensor:
        """Rows (B, 1) that need no other round."""
        return self.quality.mean(-1, keepdim=True) > THRESHOLDS["evaluation.excellent"]


class _Round(NamedTuple):
    """Which rows (B, 1) a round corrected, and the vector (B, 2D) after it, with the query beside it."""

    corrected: Tensor
    with_query: Tensor


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
        deciding, rounds = self._deciding(x), settings.verification_depth
        corrections = self._corrections(with_query, deciding, rounds) if settings.self_correction and rounds else []
        last = corrections[-1].with_query if corrections else with_query
        return self._vector(last), self._report(with_query, deciding, corrections)

    def _corrections(
        self, with_query: Tensor, deciding: _Deciding, rounds: int, among: Tensor | None = None
    ) -> list[_Round]:
        """So many rounds from here on, in which the rows `among` (B, 1) take part (None: all).

        A round that corrects nothing is a row's last, so all later ones are part of what this one chooses.
        """
        better, erroneous = self.self_correction(with_query, deciding.errors)
        corrected = erroneous if among is None else erroneous & among
        after = torch.cat((better, with_query[:, self.config.dim :]), dim=-1)
        found = [_Round(corrected, after)]
        if rounds > 1:
            going_on = ~deciding.is_excellent if self.config.evaluation.quality_scoring else None
            found += self._corrections(after, self._deciding(better), rounds - 1, going_on)
        chosen = [choose(corrected, one.with_query, with_query) for one in found]
        which = [corrected, *(_choose_rows(corrected, one.corrected) for one in found[1:])]
        return list(map(_Round, which, chosen))

    def _deciding(self, vector: Tensor) -> _Deciding:
        corrects = self.config.evaluation.self_correction
        errors = self.self_correction.errors(vector) if corrects else torch.zeros_like(vector[:, :0])
        return _Deciding(errors, self.quality_scorer(vector))

    def _vector(self, with_query: Tensor) -> Tensor:
        return with_query[:, : self.config.dim]

    def _report(self, with_query: Tensor, deciding: _Deciding, corrections: Sequence[_Round]) -> Scores:
        """One tensor a score, with an axis after the batch for the rounds that report it, and for the end."""
        rounds = self.config.evaluation.verification_depth
        assessments = [self._assess(with_query, deciding)]
        for index, one in enumerate(corrections):
            before = assessments[-1]
            anew = self._assess(one.with_query, before=before if index == rounds - 1 else None)
            assessments.append(choose(one.corrected, anew, before))
        assessments += assessments[-1:] * (rounds + 1 - len(assessments))
        scores = self._gathered(assessments)
        if self.config.evaluation.self_correction:
            none = torch.zeros_like(with_query[:, :0], dtype=torch.bool)
            scores["evaluation.corrected"] = torch.cat([none, *(one.corrected for one in corrections)], dim=-1)
        return scores | {"evaluation.rounds": self._count(deciding, corrections)}

    def _assess(self, with_query: Tensor, deciding: _Deciding | None = None, before: Tensor | None = None) -> Tensor:
        """Scores (B, N) of a vector, which has the query beside it. At the end of the loop those of rounds alone are
        not asked: they stay what they were `before`."""
        vector = self._vector(with_query)
        scores = self.confidence_estimator(vector)
        scores["quality"] = self.quality_scorer(vector) if deciding is None else deciding.quality
        if before is not None:
            return torch.cat([*scores.values(), before[:, sum(_FINAL.values()) :]], dim=-1)
        scores |= self.factuality_checker(vector) | self.completeness_checker(with_query)
        if self.config.evaluation.answer_verification:
            scores |= self.answer_verifier(with_query)
        if self.config.evaluation.self_correction:
            scores["errors"] = self.self_correction.errors(vector) if deciding is None else deciding.errors
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
        """One tensor a score of assessments (B, N) of the rounds and of the end."""
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
        scores["evaluation.overall_quality"] = scores["evaluation.quality"].mean(-1)
        return scores

    def _count(self, deciding: _Deciding, corrections: Sequence[_Round]) -> Tensor:
        """How many rounds each row (B,) keeps: the first, and those that correct something or, where none may, all
        unless the vector is excellent."""
        settings, rounds = self.config.evaluation, self.config.evaluation.verification_depth
        all_rows = torch.ones_like(deciding.quality[:, :1], dtype=torch.bool)
        if corrections:
            return torch.cat([all_rows, *(one.corrected for one in corrections[1:])], dim=-1).sum(-1)
        more = ~deciding.is_excellent if settings.quality_scoring else all_rows
        return torch.cat([all_rows] * min(rounds, 1) + [more] * (rounds - 1) + [~all_rows], dim=-1).sum(-1)


def _choose_rows(among: Tensor, these: Tensor) -> Tensor:
    """Rows (B, 1) that are among both, as a choice of the first. ONNX Runtime has none between booleans."""
    return choose(among, these.to(torch.uint8), among.to(torch.uint8)).to(torch.bool)
