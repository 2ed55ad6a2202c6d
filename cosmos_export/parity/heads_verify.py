"""Calls of a bundle with capability heads against the eager model in float64: logits, and every score by its name.

Each row of each call is looked at by itself. Where it decided as the float64 model does, its numbers are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cosmos_export.parity.calls import CallSequence, Found
from cosmos_export.parity.gates import Arithmetic
from cosmos_export.parity.head_rows import DECISIONS, MEMORY_CHOICE, Numbers, Row, RowComparison, in_positions, rows_of
from cosmos_export.parity.heads_reference import Expected, HeadsReference
from cosmos_export.parity.report import CaseResult
from cosmos_export.progress import Progress
from cosmos_runtime import Session

__all__ = ["DECISIONS", "MEMORY_CHOICE", "Comparison", "compare_calls", "usual_noise"]

# Tokens of a sequence that costs next to nothing to compute twice.
_SHORT = 300


def compare_calls(
    sessions: Mapping[Arithmetic, Session],
    sequences: Sequence[CallSequence],
    reference: HeadsReference,
    progress: Progress,
) -> list[CaseResult]:
    """Every sequence on every session, sorted by session; the reference is computed once a sequence."""
    results: dict[Arithmetic, list[CaseResult]] = {arithmetic: [] for arithmetic in sessions}
    usual = usual_noise(sequences, reference, tuple(sessions))
    for done, sequence in enumerate(sequences):
        progress.update(done, len(sequences))
        exact = reference.exact(sequence)
        for arithmetic, session in sessions.items():
            eager = reference.eager(sequence, arithmetic)
            compared = Comparison(arithmetic, sequence.run(session, sequence), exact, eager, usual[arithmetic])
            batch, length = len(sequence.case.input_ids), max(max(ends) for ends in sequence.ends)
            results[arithmetic].append(compared.result(sequence.case.name, batch, length))
    progress.update(len(sequences), len(sequences))
    return [result for per_session in results.values() for result in per_session]


def usual_noise(
    sequences: Sequence[CallSequence], reference: HeadsReference, arithmetics: Sequence[Arithmetic]
) -> dict[Arithmetic, dict[str, float]]:
    """For each arithmetic, the eager model's largest error in each kind of number over the short sequences, as a share
    of its span.

    A sequence has few values of a score, and of the logits that heads made, and the eager model may happen to be nearly
    exact in all of them: its error there is no measure of what rounding does to this model.
    """
    usual: dict[Arithmetic, dict[str, float]] = {arithmetic: {} for arithmetic in arithmetics}
    for sequence in sequences:
        if sequence.case.input_ids.size > _SHORT:
            continue
        exact = reference.exact(sequence)
        for arithmetic, shares in usual.items():
            eager = reference.eager(sequence, arithmetic)
            alone = Comparison(arithmetic, [call.found for call in eager], exact, eager)
            for name, share in alone.noise_shares().items():
                shares[name] = max(shares.get(name, 0.0), share)
    return usual


class Comparison(RowComparison):
    """What a bundle found in a sequence of calls, beside what the model finds in float64 and in its arithmetic."""

    def __init__(
        self,
        arithmetic: Arithmetic,
        actual: list[Found],
        exact: list[Expected],
        eager: list[Expected],
        usual: Mapping[str, float] | None = None,
    ) -> None:
        calls = zip(actual, exact, eager, strict=True)
        super().__init__(arithmetic, [row for call in calls for row in _rows(*call)], usual)


def _rows(actual: Found, exact: Expected, eager: Expected) -> Iterator[Row]:
    choices = None if exact.choice is None or eager.choice is None else (exact.choice, eager.choice)
    scores = [actual.scores, exact.found.scores, eager.found.scores]
    yield from rows_of(_numbers(actual), _numbers(exact.found), _numbers(eager.found), scores, choices)


def _numbers(found: Found) -> list[Numbers]:
    """Row by row."""
    return [
        in_positions(logits) | {name: np.asarray(tensor[row]) for name, tensor in found.scores.items()}
        for row, logits in enumerate(found.logits)
    ]
