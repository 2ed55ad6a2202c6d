"""What verification found: case by case, as a table, as JSON, and as the few facts that a manifest keeps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from cosmos_export.parity.cases import Skipped
from cosmos_export.parity.gates import GATES, Verdict
from cosmos_export.parity.stored import StoredTensors


@dataclass(frozen=True)
class Measurement:
    """Errors of one case at some of its positions, in logits: the bundle's, the eager float32 model's, the gate's."""

    positions: str
    error: float
    eager_error: float
    allowed: float
    verdict: Verdict


@dataclass(frozen=True)
class CaseResult:
    """One case: its shape, its measurements, how many values were NaN or infinite and how many best tokens changed."""

    name: str
    batch: int
    length: int
    measurements: tuple[Measurement, ...]
    nonfinite: int
    top1_changes: int

    @property
    def verdict(self) -> Verdict:
        """The worst of the measurements."""
        verdicts = [m.verdict for m in self.measurements]
        return next(v for v in (Verdict.FAIL, Verdict.AMBIGUOUS, Verdict.PASS) if v in verdicts)

    @property
    def worst(self) -> Measurement:
        """The measurement that is nearest to its gate, or furthest beyond it."""
        return max(self.measurements, key=lambda m: gate_share(m))


@dataclass(frozen=True)
class ParityReport:
    """Everything that was compared, and the verdict."""

    bundle: str
    source: dict[str, Any]
    precision: str
    provider: str
    versions: dict[str, str]
    max_sequence_length: int
    stored: StoredTensors
    cases: tuple[CaseResult, ...]
    skipped: tuple[Skipped, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """True when every stored tensor is equal and no case failed. No case at all is not a pass."""
        return bool(self.cases) and self.stored.passed and not any(c.verdict is Verdict.FAIL for c in self.cases)

    @property
    def longest(self) -> int:
        """The longest sequence that was run, in tokens."""
        return max((c.length for c in self.cases), default=0)

    def count(self, verdict: Verdict) -> int:
        return sum(c.verdict is verdict for c in self.cases)

    def summary(self) -> str:
        """One sentence for a terminal's last line."""
        if not self.stored.passed:
            stored = self.stored
            return f"{len(stored.problems)} of {stored.expected} stored tensors differ: {stored.problems[0]}"
        failed = [c for c in self.cases if c.verdict is Verdict.FAIL]
        if failed:
            worst = max(failed, key=lambda c: gate_share(c.worst)).worst
            return (
                f"{len(failed)} of {len(self.cases)} cases failed; the worst error is {worst.error:.3g} where the gate "
                f"allows {worst.allowed:.3g}"
            )
        share = max(gate_share(c.worst) for c in self.cases)
        ambiguous = self.count(Verdict.AMBIGUOUS)
        ties = f", {ambiguous} of them with a best token that changed at a near tie" if ambiguous else ""
        return (
            f"{len(self.cases)} cases up to {self.longest} of {self.max_sequence_length} tokens equal float64 within "
            f"the {self.precision} gate{ties} (largest error {share:.0%} of what it allows); "
            f"{self.stored.equal} stored tensors equal bit for bit"
        )

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON values; an infinite error becomes null."""
        return {
            "passed": self.passed,
            "bundle": self.bundle,
            "source": self.source,
            "precision": self.precision,
            "gate": asdict(GATES[self.precision]),
            "provider": self.provider,
            "versions": self.versions,
            "longest_sequence": self.longest,
            "max_sequence_length": self.max_sequence_length,
            "stored_tensors": asdict(self.stored),
            "cases": [_case_dict(c) for c in self.cases],
            "skipped": [asdict(s) for s in self.skipped],
        }

    def digest(self) -> dict[str, Any]:
        """The facts that a bundle's manifest keeps."""
        worst = max((c.worst for c in self.cases), key=gate_share)
        return {
            "passed": self.passed,
            "reference": "eager PyTorch model in float64",
            "gate": asdict(GATES[self.precision]),
            "provider": self.provider,
            "versions": self.versions,
            "cases": len(self.cases),
            "ambiguous": self.count(Verdict.AMBIGUOUS),
            "skipped": [asdict(s) for s in self.skipped],
            "longest_sequence": self.longest,
            "stored_tensors_equal": self.stored.equal,
            "worst_error": worst.error,
            "worst_error_allowed": worst.allowed,
        }


def gate_share(measurement: Measurement) -> float:
    """Error over what the gate allows: 1 is the gate."""
    if measurement.allowed > 0:
        return measurement.error / measurement.allowed
    return 0.0 if measurement.error == 0 else math.inf


def _case_dict(case: CaseResult) -> dict[str, Any]:
    measurements = [{k: _finite(v) for k, v in asdict(m).items()} for m in case.measurements]
    return {**asdict(case), "measurements": measurements, "verdict": case.verdict}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
