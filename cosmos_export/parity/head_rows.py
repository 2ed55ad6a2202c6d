"""Rows of what a model with capability heads computes, each looked at by itself: where it decided as the float64 model
does, its numbers are compared.

    n  positions    V  vocab_size    D  dim
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_export.parity import metrics
from cosmos_export.parity.decisions import Difference, first_differences
from cosmos_export.parity.gates import LOGIT_GATES, PIECE_GATES, SCORE_GATES, Arithmetic, LogitGate, Verdict, judge
from cosmos_export.parity.heads_reference import Choice
from cosmos_export.parity.report import CaseResult, Measurement, gate_share

# Where errors of logits are looked at, as in a plain decoder's verification.
POSITIONS = {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}

# What else a measurement can be of, besides positions, scores and vectors.
DECISIONS, MEMORY_CHOICE = "decisions", "choice of the working memory"


Numbers = dict[str, NDArray]


@dataclass(frozen=True, eq=False)
class Row:
    """One row of one call: its numbers (logits (n, V) by position, scores by name) as the bundle, float64 and the eager
    model in the bundle's arithmetic have them, and what was decided otherwise than in float64."""

    actual: Numbers
    exact: Numbers
    eager: Numbers
    difference: Difference | None
    eager_difference: Difference | None
    lead: float = np.inf
    """How far the last entry that the working memory reads is ahead of the next one."""
    similarity_error: float = 0.0
    """Of the eager model."""
    eager_reads_others: bool = False

    @property
    def shows_rounding(self) -> bool:
        """Whether the eager model did what the exact one does: if not, its errors are no measure of rounding."""
        return self.eager_difference is None and not self.eager_reads_others


class RowComparison:
    """Rows of what a bundle found, judged together.

    `usual` is the eager model's usual error in each kind of number, as a share of the span of that. Of the numbers,
    `vectors` are what one piece of the heads gives to the next, and have `vector_gates`.
    """

    def __init__(
        self,
        arithmetic: Arithmetic,
        rows: Sequence[Row],
        usual: Mapping[str, float] | None = None,
        vectors: Collection[str] = (),
        vector_gates: Mapping[Arithmetic, LogitGate] = PIECE_GATES,
    ) -> None:
        self.arithmetic, self.rows, self._usual = arithmetic, rows, usual or {}
        self._vectors, self._vector_gates = vectors, vector_gates

    def measurements(self) -> Iterator[Measurement]:
        """The largest errors of logits and of each score; and what was decided otherwise, if anything was."""
        alike = [row for row in self.rows if row.difference is None]
        chose_otherwise = [row for row in alike if self._is_tie(row) and not self._within(row)]
        compared = [row for row in alike if row not in chose_otherwise]
        if compared:
            yield from (self._measure(name, compared) for name in self._gates)
        if chose_otherwise:
            yield self._of_choices(chose_otherwise)
        if len(alike) < len(self.rows):
            yield self._of_decisions([row for row in self.rows if row.difference is not None])

    def result(self, name: str, batch: int, length: int) -> CaseResult:
        """Of rows that are a case of this name and shape, and have logits."""
        return CaseResult(
            name=name,
            arithmetic=self.arithmetic,
            batch=batch,
            length=length,
            measurements=tuple(self.measurements()),
            nonfinite=sum(metrics.nonfinite_count(row.actual["all"]) for row in self.rows),
            top1_changes=sum(int(metrics.top1_differs(r.actual["all"], r.exact["all"]).sum()) for r in self.rows),
        )

    def noise_shares(self) -> dict[str, float]:
        """The eager model's largest error in each kind of number, as a share of the span of that."""
        return {name: error / span if (span := self._span(name)) else 0.0 for name, error in self._noise.items()}

    @cached_property
    def _noise(self) -> dict[str, float]:
        steady = [row for row in self.rows if row.shows_rounding]
        return {name: _largest_error((r.eager[name], r.exact[name]) for r in steady) for name in self.rows[0].exact}

    @cached_property
    def _gates(self) -> dict[str, tuple[float, float]]:
        """For each kind of number, the eager model's largest error, here or as usual, and the error that is allowed."""
        noise = {n: max(error, self._usual.get(n, 0.0) * self._span(n)) for n, error in self._noise.items()}
        return {name: (error, self._allowed(name, error)) for name, error in noise.items()}

    def _allowed(self, name: str, noise: float) -> float:
        others = LOGIT_GATES if name in POSITIONS else SCORE_GATES
        gates = self._vector_gates if name in self._vectors else others
        span = self._span(name)
        return gates[self.arithmetic].allowed(noise, span) if span else 0.0

    def _span(self, name: str) -> float:
        """The range of the logits at these positions, or of a vector, or the largest magnitude of a score, 1 at least;
        0 for what is no number."""
        exact = [row.exact[name] for row in self.rows]
        if name in POSITIONS or name in self._vectors:
            return max(float(e.max()) for e in exact) - min(float(e.min()) for e in exact)
        if exact[0].dtype.kind != "f":
            return 0.0
        return max(1.0, *(float(np.abs(e).max()) for e in exact))

    def _measure(self, name: str, rows: list[Row]) -> Measurement:
        noise, allowed = self._gates[name]
        error = _largest_error((row.actual[name], row.exact[name]) for row in rows)
        leads = [_lead_lost(row.actual[name], row.exact[name]) for row in rows] if name in POSITIONS else []
        lost = max((lead for lead in leads if lead is not None), default=None)
        return Measurement(name, error, noise, allowed, judge(error, allowed, lost))

    def _is_tie(self, row: Row) -> bool:
        """Whether rounding may have the working memory read another entry."""
        noise = max(r.similarity_error for r in self.rows)
        return row.eager_reads_others or row.lead <= self._tie(noise)

    def _tie(self, similarity_error: float) -> float:
        """The lead that two similarities may lose to each other."""
        return 2 * SCORE_GATES[self.arithmetic].allowed(similarity_error, 1.0)

    def _within(self, row: Row) -> bool:
        errors = {name: _largest_error([(row.actual[name], row.exact[name])]) for name in self._gates}
        return all(errors[name] <= allowed for name, (_, allowed) in self._gates.items())

    def _of_choices(self, rows: list[Row]) -> Measurement:
        lead = max(row.lead for row in rows)
        noise = max(row.similarity_error for row in self.rows)
        allowed = max(self._tie(noise), lead)  # where the eager model chose otherwise, the lead may be any
        return Measurement(MEMORY_CHOICE, lead, noise, allowed, Verdict.AMBIGUOUS)

    def _of_decisions(self, rows: list[Row]) -> Measurement:
        """Of all decisions that fell otherwise, the one whose score is furthest beyond what is too near to call."""
        found = [self._of_decision(row, row.difference) for row in rows if row.difference is not None]
        return max(found, key=gate_share)

    def _of_decision(self, row: Row, difference: Difference) -> Measurement:
        """The score's distance from its threshold, and what rounding may make of it: also in this very row, where it
        took the eager model to the other side as well."""
        name = difference.name
        noise = self._gates[name][0]
        if row.eager_difference is not None and row.eager_difference.name == name:
            noise = max(noise, _largest_error([(row.eager[name], row.exact[name])]))
        allowed = self._allowed(name, noise)
        verdict = Verdict.AMBIGUOUS if difference.margin <= allowed else Verdict.FAIL
        return Measurement(DECISIONS, difference.margin, noise, allowed, verdict)


def rows_of(
    actual: Sequence[Numbers],
    exact: Sequence[Numbers],
    eager: Sequence[Numbers],
    scores: Sequence[Mapping[str, NDArray]],
    choices: tuple[Choice, Choice] | None,
) -> Iterator[Row]:
    """Rows of the same numbers by the bundle, float64 and the eager model. `scores` of the three, (B, ...) each, say
    what was decided; `choices` are what the memory chose from, in float64 and in the eager model."""
    of_bundle, of_exact, of_eager = scores
    differences = first_differences(of_bundle, of_exact)
    eager_differences = first_differences(of_eager, of_exact)
    for row, numbers in enumerate(zip(actual, exact, eager, strict=True)):
        choice: dict[str, float | bool] = {}
        if choices is not None:
            choice = {
                "lead": float(choices[0].lead[row]),
                "similarity_error": choices[0].error_of(choices[1], row),
                "eager_reads_others": not choices[0].same_entries(choices[1])[row],
            }
        yield Row(
            *numbers,
            differences[row] if differences else None,
            eager_differences[row] if eager_differences else None,
            **choice,  # type: ignore[arg-type]
        )


def rows_between(
    names: Sequence[str],
    scores: Sequence[str],
    found: Sequence[Mapping[str, Tensor]],
    choices: tuple[Choice | None, Choice | None],
    logits: Sequence[Sequence[NDArray]] | None = None,
) -> Iterator[Row]:
    """Rows of what the bundle, float64 and the eager model found: these numbers, and their logits where given."""
    arrays = [{name: array_of(values[name]) for name in names} for values in found]
    count = len(next(iter(arrays[0].values()))) if names else len(logits[0]) if logits else 0
    numbers: list[list[Numbers]] = []
    for which, values in enumerate(arrays):
        of_row = [{name: np.asarray(value[row]) for name, value in values.items()} for row in range(count)]
        if logits is not None:
            of_row = [in_positions(logits[which][row]) | each for row, each in enumerate(of_row)]
        numbers.append(of_row)
    deciding = [{name: values[name] for name in scores} for values in arrays]
    exact, eager = choices
    pair = None if exact is None or eager is None else (exact, eager)
    yield from rows_of(numbers[0], numbers[1], numbers[2], deciding, pair)


def in_positions(logits: NDArray) -> Numbers:
    """A row's logits (n, V) as the numbers that are looked at."""
    return {name: logits[part] for name, part in POSITIONS.items()}


def worst_of(compared: RowComparison) -> tuple[str, Measurement]:
    """What is nearest to its gate, or furthest beyond it, and what that is."""
    found = ((f"{m.positions} of {len(compared.rows)} calls", m) for m in compared.measurements())
    return max(found, key=nearness)


def nearness(found: tuple[str, Measurement]) -> tuple[bool, float]:
    """How near a measurement, with what it is of, is to its gate: a failure first, whatever its error."""
    return found[1].verdict is Verdict.FAIL, gate_share(found[1])


def _largest_error(pairs: Iterable[tuple[NDArray, NDArray]]) -> float:
    """Of (given, expected) pairs; 0 where there is none."""
    return max((metrics.max_abs_error(given, expected.astype(np.float64)) for given, expected in pairs), default=0.0)


def _lead_lost(actual: NDArray, exact: NDArray) -> float | None:
    """The largest lead of a best token that is no longer the best; None where all still are."""
    changed = metrics.top1_differs(actual, exact)
    return float(np.max(metrics.top1_margins(exact)[changed])) if changed.any() else None


def array_of(tensor: Tensor) -> NDArray[Any]:
    """As numbers that numpy knows."""
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
