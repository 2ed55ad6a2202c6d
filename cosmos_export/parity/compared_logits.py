"""One case's logits against float64, at all positions and at the first and last, judged by their gate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cosmos_export.parity import metrics
from cosmos_export.parity.gates import LOGIT_GATES, Arithmetic, LogitGate, judge
from cosmos_export.parity.report import CaseResult, Measurement

# Where errors are looked at: a fault at the first or last position must not hide behind the others' larger range.
_POSITIONS = {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}


def case_result(
    name: str,
    shape: tuple[int, int],
    arithmetic: Arithmetic,
    actual: NDArray,
    exact: NDArray,
    eager: NDArray,
) -> CaseResult:
    """What a case of this name and shape (batch, length) found: logits (B, T, V) of the bundle, of float64, and of the
    eager model in the bundle's arithmetic."""
    batch, length = shape
    gate = LOGIT_GATES[arithmetic]
    return CaseResult(
        name=name,
        arithmetic=arithmetic,
        batch=batch,
        length=length,
        measurements=tuple(
            _measure(positions, actual[:, part], exact[:, part], eager[:, part], gate)
            for positions, part in _POSITIONS.items()
        ),
        nonfinite=metrics.nonfinite_count(actual),
        top1_changes=int(metrics.top1_differs(actual, exact).sum()),
    )


def _measure(positions: str, actual: NDArray, exact: NDArray, eager: NDArray, gate: LogitGate) -> Measurement:
    error, eager_error = metrics.max_abs_error(actual, exact), metrics.max_abs_error(eager, exact)
    allowed = gate.allowed(eager_error, metrics.value_range(exact))
    changed = metrics.top1_differs(actual, exact)
    margin = float(np.max(metrics.top1_margins(exact)[changed])) if changed.any() else None
    return Measurement(positions, error, eager_error, allowed, judge(error, allowed, margin))
