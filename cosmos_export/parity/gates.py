"""The gates: how large an error may be, and why. The only place with a tolerance in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Verdict(StrEnum):
    """AMBIGUOUS: within the gate, but a best token changed whose lead is smaller than what the gate allows."""

    PASS = "PASS"
    AMBIGUOUS = "AMBIGUOUS"
    FAIL = "FAIL"


class Arithmetic(StrEnum):
    """What a graph's products compute with, whatever the weights are stored as."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8_ACTIVATIONS = "int8 activations"


@dataclass(frozen=True)
class LogitGate:
    """Allowed error against float64: `eager_factor` times the error of the eager model in the bundle's arithmetic, plus
    a share of the range."""

    eager_factor: float
    range_fraction: float
    reason: str

    def allowed(self, eager_error: float, logit_range: float) -> float:
        """The largest absolute error that passes, in logits."""
        return self.eager_factor * eager_error + self.range_fraction * logit_range


# Both sides have the same weights: where a recipe rounds them, the reference computes with the rounded ones.
LOGIT_GATES = {
    Arithmetic.FLOAT32: LogitGate(
        eager_factor=4.0,
        range_fraction=1e-5,
        reason="both sides round in float32, in different orders: sums of other blocks and other SIMD widths were seen "
        "to differ by up to 2.5 times the eager error; 1e-5 of the range keeps a case whose eager error happens to be "
        "near zero from failing on one rounding. The smallest real fault that the mutation tests make is far above",
    ),
    Arithmetic.FLOAT16: LogitGate(
        eager_factor=4.0,
        range_fraction=1e-3,
        reason="both sides store every activation in 11 bits; kernels differ in what they keep in float32 between "
        "(fused norms, attention, rotary tables rounded to float16), and in few positions the largest errors fall "
        "differently: 1e-3 of the range, two roundings of the largest logit, keeps a small case from failing on that",
    ),
    Arithmetic.BFLOAT16: LogitGate(
        eager_factor=4.0,
        range_fraction=8e-3,
        reason="as for float16, with 8 bits: two roundings of the largest logit are 8e-3 of the range",
    ),
    Arithmetic.INT8_ACTIVATIONS: LogitGate(
        eager_factor=4.0,
        range_fraction=1e-5,
        reason="the eager model with its activations rounded to 8 bits in the same blocks errs by as much as the "
        "kernels may, and shows how much that is for this model; roundings fall differently, so the largest differ. "
        "It finds a wrong graph. How good the numbers are is the quality gate's to say, and that graph and stored "
        "numbers are right the float32 gate's, on the same bytes",
    ),
}


# Hidden states after one piece of the model (the embedding, a layer, a step of it) that computed on float64's own
# input, rounded to the graph's type. What is measured is what the piece adds to its input, so the range is that of the
# sum's new part: a hidden state has channels many times as large as what a layer changes, and a share of these would
# hide it. A fifth of the logits' share of the range: a piece rounds that much less often than a model, and has so many
# values that the eager error is not near zero by accident.
_PIECE_REASON = (
    "the logits' gate, applied to what one piece adds to the hidden state: the eager model's same piece in the same "
    "arithmetic shows what rounding costs there"
)
PIECE_GATES = {
    arithmetic: replace(gate, range_fraction=gate.range_fraction / 5, reason=_PIECE_REASON)
    for arithmetic, gate in LOGIT_GATES.items()
}
PIECE_GATES[Arithmetic.FLOAT32] = replace(
    PIECE_GATES[Arithmetic.FLOAT32],
    eager_factor=8.0,
    reason=f"{_PIECE_REASON}. ONNX Runtime's MatMulNBits in float32 erred 9 and 11 times as much as PyTorch's product "
    "with 4,096 and 11,008 inputs (random ones; its plain MatMul as much), and that is most of what a layer adds",
)


# Scores of capability heads: probabilities mostly, so that the range is 1, or the largest where they are not bounded.
# A case has few values of them, so the eager error is this case's or what it usually is (`heads_verify.usual_noise`).
SCORE_GATES = {
    Arithmetic.FLOAT32: LogitGate(
        eager_factor=4.0,
        range_fraction=1e-5,
        reason="as for logits: the heads round as often as the decoder before them, and a sigmoid makes less of it",
    ),
    Arithmetic.FLOAT16: LogitGate(4.0, 2e-3, reason="as for logits: two roundings of a logit of magnitude 4 and more"),
    Arithmetic.BFLOAT16: LogitGate(4.0, 1.6e-2, reason="as for float16, with 8 bits"),
    Arithmetic.INT8_ACTIVATIONS: LogitGate(
        4.0,
        1e-2,
        reason="the eager model with rounded activations shows what rounding does here, but a case has one value of a "
        "score a row, and that one may happen to be exact: one hundredth, about one level of an activation rounded to "
        "127 of them, was enough by far. It finds a wrong graph; the tight gate is float32's, on the same bytes",
    ),
}


@dataclass(frozen=True)
class QualityGate:
    """What rounding weights and activations may cost against the unrounded float32 model, on its own text."""

    mean_kl_divergence: float  # nats per token, at most
    top1_agreement: float  # share of tokens with the same best token, at least
    reason: str


QUALITY_GATES = {
    "fp16": QualityGate(0.0001, 0.99, reason="11 bits cost next to nothing; best tokens change at near ties only"),
    "bf16": QualityGate(0.005, 0.97, reason="8 bits in weights and activations cost about what int8 does"),
    "int8": QualityGate(0.005, 0.985, reason="8 bits in small blocks should be hard to tell from float32"),
    "int8-dynamic": QualityGate(
        0.005,
        0.96,
        reason="activations in 7 bits, one range for a whole tensor, are all that PyTorch's dynamic quantisation has: "
        "distributions are held to what int8 is, and best tokens that lead by little may change more often",
    ),
    "int4": QualityGate(0.05, 0.90, reason="4 bits cost something; more than this and text reads worse"),
}


@dataclass(frozen=True)
class CalibrationGate:
    """How far a calibrated row of weights may lie from the checkpoint's, as a share of the row's length."""

    row_error: float
    reason: str


CALIBRATION_GATES = {
    4: CalibrationGate(
        0.5,
        reason="rounding alone is 0.1 to 0.15 away, calibration on the demo model went up to 0.24; a row of another "
        "matrix, or one with its scales misplaced, is 1 and more away. Smaller faults are the quality gate's to find",
    ),
    8: CalibrationGate(0.05, reason="rounding alone is 0.01 away, and calibration moves few levels, each far smaller"),
}


# Activations beyond this share of float16's range are warned of: another text may well be twice as loud.
OVERFLOW_SHARE = 0.25


def judge(error: float, allowed: float, flipped_margin: float | None) -> Verdict:
    """The verdict on one measurement.

    `flipped_margin` is the largest lead that the reference gives to a best token which changed; None where none
    does. Two logits that are each within `allowed` can change places when they are less than twice that apart.
    """
    if not error <= allowed:  # so that NaN fails
        return Verdict.FAIL
    if flipped_margin is None:
        return Verdict.PASS
    return Verdict.AMBIGUOUS if flipped_margin <= 2 * allowed else Verdict.FAIL
