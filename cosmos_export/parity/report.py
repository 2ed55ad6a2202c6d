"""What verification found: case by case, as a table, as JSON, and as the few facts that a manifest keeps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cosmos_export.parity.cases import Skipped
from cosmos_export.parity.gates import LOGIT_GATES, PIECE_GATES, QUALITY_GATES, Arithmetic, Verdict
from cosmos_export.parity.quality import Quality
from cosmos_export.parity.stored import StoredTensors

# How a model is compared.
WHOLE_GRAPH, LAYER_BY_LAYER = "whole graph", "layer by layer"


@dataclass(frozen=True)
class Measurement:
    """Errors of one case at some of its positions, in logits: the bundle's, the eager model's in the same arithmetic,
    and the one that the gate allows."""

    positions: str
    error: float
    eager_error: float
    allowed: float
    verdict: Verdict


@dataclass(frozen=True)
class CaseResult:
    """One case: its shape, its measurements, how many values were NaN or infinite and how many best tokens changed."""

    name: str
    arithmetic: Arithmetic
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
class PieceResult:
    """One piece of the model (embedding, a layer, norm and logits), alone on float64's own input: the measurement that
    is nearest to its gate, and the case that it is of."""

    name: str
    arithmetic: Arithmetic
    case: str
    measurement: Measurement

    @property
    def verdict(self) -> Verdict:
        return self.measurement.verdict


@dataclass(frozen=True)
class ParityReport:
    """Everything that was compared, and the verdict."""

    bundle: str
    source: dict[str, Any]
    precision: str
    provider: str
    versions: dict[str, str]
    max_sequence_length: int
    stored: tuple[StoredTensors, ...]
    cases: tuple[CaseResult, ...]
    skipped: tuple[Skipped, ...] = ()
    quality: Quality | None = None
    warnings: tuple[str, ...] = ()
    """What does not fail the bundle, and its user should know."""
    pieces: tuple[PieceResult, ...] = ()
    """Of a model that was compared layer by layer; the cases are then those of its chained pieces."""

    @property
    def layer_by_layer(self) -> bool:
        """Whether the model was never whole in memory."""
        return bool(self.pieces)

    @property
    def failed_pieces(self) -> list[PieceResult]:
        return [piece for piece in self.pieces if piece.verdict is Verdict.FAIL]

    @property
    def passed(self) -> bool:
        """True when every stored tensor is equal, no case failed and quality holds. No case at all is not a pass."""
        stored = bool(self.stored) and all(s.passed for s in self.stored)
        cases = bool(self.cases) and not any(c.verdict is Verdict.FAIL for c in self.cases)
        return (
            stored and cases and not self.failed_pieces and (self.quality is None or self.quality.passed is not False)
        )

    @property
    def stored_equal(self) -> int:
        """Stored tensors that are equal, over all graphs."""
        return sum(s.equal for s in self.stored)

    @property
    def stored_kind(self) -> str:
        """What the tensors that are as they should be are equal to."""
        calibrated = sum(s.calibrated for s in self.stored)
        near = f", {calibrated} of them calibrated, each row near the checkpoint's" if calibrated else ""
        return f"equal bit for bit{near}"

    @property
    def stored_problems(self) -> list[str]:
        return [problem for s in self.stored for problem in s.problems]

    @property
    def longest(self) -> int:
        """The longest sequence that was run, in tokens."""
        return max((c.length for c in self.cases), default=0)

    @property
    def mode(self) -> str:
        """How the model was compared."""
        return LAYER_BY_LAYER if self.layer_by_layer else WHOLE_GRAPH

    def count(self, verdict: Verdict) -> int:
        return sum(c.verdict is verdict for c in self.cases)

    def summary(self) -> str:
        """One sentence for a terminal's last line."""
        if self.stored_problems:
            return f"{len(self.stored_problems)} stored tensors differ: {self.stored_problems[0]}"
        if not self.cases:
            return "no case was run, so nothing is proven"
        failed = [c for c in self.cases if c.verdict is Verdict.FAIL]
        if self.failed_pieces:
            first = self.failed_pieces[0]
            return (
                f"layer by layer: {first.name} alone is wrong ({len(self.failed_pieces)} of {len(self.pieces)} "
                f"comparisons failed): error {first.measurement.error:.3g} where the gate allows "
                f"{first.measurement.allowed:.3g}"
            )
        if failed:
            worst = max(failed, key=lambda c: gate_share(c.worst)).worst
            return (
                f"{len(failed)} of {len(self.cases)} cases failed; the worst error is {worst.error:.3g} where the gate "
                f"allows {worst.allowed:.3g}"
            )
        if self.quality is not None and self.quality.passed is False:
            return f"rounding costs more than the {self.precision} gate allows: {_quality_words(self.quality)}"
        return self._proven()

    def _proven(self) -> str:
        share = max(gate_share(c.worst) for c in self.cases)
        ambiguous = self.count(Verdict.AMBIGUOUS)
        ties = f", {ambiguous} of them with a best token that changed at a near tie" if ambiguous else ""
        model = "float64 on the rounded weights" if self.precision in QUALITY_GATES else "float64"
        quality = "" if self.quality is None else f"; against the model before rounding: {_quality_words(self.quality)}"
        pieces = len({piece.name for piece in self.pieces})
        layers = f"layer by layer: each of {pieces} pieces alone, and " if pieces else ""
        # Layer by layer, the last positions are reached behind a cache that was filled at random.
        reach = f"{self.longest} of {self.max_sequence_length} {'positions' if pieces else 'tokens'}"
        return (
            f"{layers}{len(self.cases)} cases up to {reach} equal {model} "
            f"within the gate{ties} (largest error {share:.0%} of what it allows); "
            f"{self.stored_equal} stored tensors {self.stored_kind}{quality}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON values; an infinite error becomes null."""
        return {
            "passed": self.passed,
            "bundle": self.bundle,
            "source": self.source,
            "precision": self.precision,
            "gates": self._gates(),
            "mode": self.mode,
            "provider": self.provider,
            "versions": self.versions,
            "longest_sequence": self.longest,
            "max_sequence_length": self.max_sequence_length,
            "stored_tensors": {
                "expected": sum(s.expected for s in self.stored),
                "equal": self.stored_equal,
                "calibrated": sum(s.calibrated for s in self.stored),
                "problems": self.stored_problems,
            },
            "cases": [_case_dict(c) for c in self.cases],
            "pieces": [_piece_dict(p) for p in self.pieces],
            "skipped": [asdict(s) for s in self.skipped],
            "quality": _finite_dict(asdict(self.quality)) if self.quality else None,
            "warnings": list(self.warnings),
        }

    def digest(self) -> dict[str, Any]:
        """The facts that a bundle's manifest keeps."""
        worst = max((c.worst for c in self.cases), key=gate_share)
        return {
            "passed": self.passed,
            "reference": "eager PyTorch model in float64",
            "mode": self.mode,
            "gates": self._gates(),
            "provider": self.provider,
            "versions": self.versions,
            "cases": len(self.cases),
            "ambiguous": self.count(Verdict.AMBIGUOUS),
            "skipped": [asdict(s) for s in self.skipped],
            "longest_sequence": self.longest,
            "stored_tensors_equal": self.stored_equal,
            "worst_error": worst.error,
            "worst_error_allowed": worst.allowed,
            "quality": _finite_dict(asdict(self.quality)) if self.quality else None,
        }

    def _gates(self) -> dict[str, Any]:
        gates: dict[str, Any] = {a: asdict(LOGIT_GATES[a]) for a in dict.fromkeys(c.arithmetic for c in self.cases)}
        quality = QUALITY_GATES.get(self.precision)
        gates |= {f"piece, {a}": asdict(PIECE_GATES[a]) for a in dict.fromkeys(p.arithmetic for p in self.pieces)}
        return gates | ({"quality": asdict(quality)} if quality else {})


def _quality_words(quality: Quality) -> str:
    note = "" if quality.passed is not None else ", not gated"
    return (
        f"mean KL divergence {quality.mean_kl_divergence:.2g} nats, same best token {quality.top1_agreement:.1%} "
        f"of {quality.tokens}{note}"
    )


def gate_share(measurement: Measurement) -> float:
    """Error over what the gate allows: 1 is the gate."""
    if measurement.allowed > 0:
        return measurement.error / measurement.allowed
    return 0.0 if measurement.error == 0 else math.inf


def _case_dict(case: CaseResult) -> dict[str, Any]:
    measurements = [_finite_dict(asdict(m)) for m in case.measurements]
    return {**asdict(case), "measurements": measurements, "verdict": case.verdict}


def _piece_dict(piece: PieceResult) -> dict[str, Any]:
    measurement = _finite_dict(asdict(piece.measurement))
    return {"name": piece.name, "arithmetic": piece.arithmetic, "case": piece.case, **measurement}


def _finite_dict(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
