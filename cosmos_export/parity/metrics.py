"""How far logits are from their reference: plain numpy, no opinion (opinions are in `gates`).

N  any leading axes (batch, positions)    V  vocab_size
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def max_abs_error(actual: Array, reference: Array) -> float:
    """Largest absolute difference; NaN or infinity in `actual` gives infinity."""
    difference = np.abs(actual.astype(np.float64) - reference)
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def value_range(reference: Array) -> float:
    """Largest minus smallest value: the scale that an absolute error is measured on."""
    return float(reference.max() - reference.min())


def nonfinite_count(actual: Array) -> int:
    """How many values are NaN or infinite."""
    return int(actual.size - np.isfinite(actual).sum())


def top1_margins(reference: Array) -> Array:
    """Distance between the best and the second best logit at every position: (N, V) to (N,); infinite where V is 1."""
    if reference.shape[-1] == 1:
        return np.full(reference.shape[:-1], np.inf)
    second, best = np.moveaxis(np.partition(reference, -2, axis=-1)[..., -2:], -1, 0)
    return best - second


def top1_differs(actual: Array, reference: Array) -> NDArray[np.bool_]:
    """Positions whose best token is another one: (N, V), (N, V) to (N,)."""
    return actual.argmax(-1) != reference.argmax(-1)


def log_softmax(logits: Array) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64: (N, V) to (N, V)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergences(expected: NDArray[np.float64], actual: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(expected, actual) in nats at every position, of two arrays of log-probabilities: (N, V) to (N,)."""
    return (np.exp(expected) * (expected - actual)).sum(-1)
