"""The comparison itself: a bundle's bytes, run by the runtime, against the eager model in float64."""

from __future__ import annotations

from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.parity import metrics
from cosmos_export.parity.cases import Case, build_cases
from cosmos_export.parity.gates import GATES, LogitGate, judge
from cosmos_export.parity.reference import EagerReference
from cosmos_export.parity.report import CaseResult, Measurement, ParityReport
from cosmos_export.parity.stored import compare_stored
from cosmos_export.progress import Progress, Silent
from cosmos_runtime import FULL_SEQUENCE, Session, load

# Where errors are looked at: a fault at the first or last position must not hide behind the others' larger range.
_POSITIONS = {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}


class Effort(StrEnum):
    """How much to verify: every length up to the maximum, short sequences only, or nothing."""

    FULL = "full"
    QUICK = "quick"
    OFF = "off"


def verify_bundle(
    folder: str | Path,
    checkpoint: Checkpoint,
    *,
    causal: bool = True,
    effort: Effort = Effort.FULL,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> ParityReport:
    """Compares a bundle with the model of `checkpoint`; the report's `passed` is the verdict.

    Raises the runtime's errors when the bundle cannot be run at all, CheckpointError when the checkpoint does not load.
    """
    progress = progress or Silent()
    progress.stage("Comparing stored tensors")
    session = load(folder, provider=provider)
    manifest = session.manifest
    stored = compare_stored(session.bundle.file(manifest.graph(FULL_SEQUENCE).file), checkpoint)
    progress.stage("Loading the float64 reference")
    reference = EagerReference(checkpoint, causal=causal)
    cases, skipped = build_cases(checkpoint.config, quick=effort is Effort.QUICK)
    gate = GATES[manifest.recipe["precision"]]
    progress.stage("Comparing logits with float64")
    results = []
    for done, case in enumerate(cases):
        progress.update(done, len(cases))
        results.append(_run_case(session, reference, case, gate))
    progress.update(len(cases), len(cases))
    return ParityReport(
        bundle=manifest.name,
        source=dict(manifest.source),
        precision=manifest.recipe["precision"],
        provider=provider,
        versions={"onnxruntime": onnxruntime.__version__, "torch": version("torch")},
        max_sequence_length=checkpoint.config.max_sequence_length,
        stored=stored,
        cases=tuple(results),
        skipped=tuple(skipped),
    )


def _run_case(session: Session, reference: EagerReference, case: Case, gate: LogitGate) -> CaseResult:
    actual = session.logits(case.input_ids)
    exact = reference.exact(case.input_ids)
    eager = reference.eager(case.input_ids)
    batch, length = case.input_ids.shape
    return CaseResult(
        name=case.name,
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
