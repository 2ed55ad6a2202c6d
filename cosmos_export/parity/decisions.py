"""What a model with capability heads decides from its scores, and which decisions are too close to call.

B  batch    R  evaluation rounds

A score that lies as near to its threshold as rounding may move it can fall on either side. What follows from it is then
another computation, so that numbers behind it cannot be compared, and neither side is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosmos_runtime import THRESHOLDS

Scores = Mapping[str, NDArray[Any]]


class Decision(NamedTuple):
    """A score (B,) in float64 less its threshold; above 0 means that something is done."""

    name: str
    margin: NDArray[np.float64]


class Difference(NamedTuple):
    """The first decision of a row that falls otherwise, and how far from its threshold the exact score is."""

    name: str
    margin: float


def decisions(scores: Scores) -> list[Decision]:
    """Every decision that these scores (of a call, or of one row with a batch axis of 1) stand for, as they are
    taken one after another: a later one may depend on how an earlier one fell."""
    taken = [_decision(scores, name, threshold, ...) for name, threshold in _SAFETY if name in scores]
    for index in range(_rounds(scores)):
        taken += [
            _decision(scores, name, threshold, index)
            for name, threshold in _EVALUATION
            if name in scores and _is_of_rounds(scores, name)
        ]
    return taken


def first_differences(actual: Scores, exact: Scores) -> list[Difference | None]:
    """For each row, the first decision that is not the exact one's; None where all are the same."""
    pairs = list(zip(decisions(actual), decisions(exact), strict=True))
    rows = len(next(iter(exact.values()), ()))
    return [next(_differing(pairs, row), None) for row in range(rows)]


def _differing(pairs: list[tuple[Decision, Decision]], row: int) -> Iterator[Difference]:
    for mine, theirs in pairs:
        if (mine.margin[row] > 0) != (theirs.margin[row] > 0):
            yield Difference(theirs.name, float(abs(theirs.margin[row])))


# Scores and their thresholds, in the order in which a call takes the decisions; of labelled scores the largest counts.
_SAFETY = (
    ("safety.harmful", "safety.harmful"),
    ("safety.toxicity", "safety.toxic"),
    ("safety.overall_bias", "safety.biased"),
    ("safety.pii", "safety.private"),
    ("safety.attack", "safety.adversarial"),
    ("safety.jailbreak", "safety.jailbreak"),
)
# Of each round; without quality scores there is only the final assessment's, which decides nothing.
_EVALUATION = (
    ("evaluation.errors", "evaluation.erroneous"),
    ("evaluation.overall_quality", "evaluation.excellent"),
)


def _rounds(scores: Scores) -> int:
    return scores["evaluation.factuality"].shape[1] if "evaluation.factuality" in scores else 0


def _is_of_rounds(scores: Scores, name: str) -> bool:
    return name == "evaluation.errors" or scores[name].shape[1] > 1


def _decision(scores: Scores, name: str, threshold: str, index: Any) -> Decision:
    score = np.asarray(scores[name], np.float64)
    score = score if index is ... else score[:, index]
    largest = score if score.ndim == 1 else score.max(-1)
    return Decision(name, largest - THRESHOLDS[threshold])
