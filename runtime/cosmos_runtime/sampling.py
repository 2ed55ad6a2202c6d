"""Choose the next token from logits: pure numpy, deterministic under a seed.

Order: repetition penalty, top-k, temperature, top-p, draw (temperature keeps the k largest the largest). Every
step maps logits (V,) to logits (V,); a token that a step removes gets -inf.
"""

import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import Floats
from cosmos_runtime.errors import CosmosRuntimeError, InputError
from cosmos_runtime.quoting import quoted

# Sorting a whole vocabulary takes milliseconds; a nucleus is seldom larger than the first of these.
_NUCLEUS_SIZES = (256, 4096)


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token; `repetition_penalty` 1 is none; `seed` None
    draws differently every time. Raises: InputError for a value out of range; beyond a million, or below a millionth,
    a penalty takes logits out of the range of float32.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", _is_real(self.temperature) and self.temperature >= 0, "0 or more", self.temperature)
        _check("top_k", _is_count(self.top_k), "an integer, 0 (off) or more", self.top_k)
        _check("top_p", _is_real(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1 (off)", self.top_p)
        penalty = self.repetition_penalty
        _check("repetition_penalty", _is_real(penalty) and 1e-6 <= penalty <= 1e6, "1e-6 to 1e6 (1 is off)", penalty)
        _check("seed", self.seed is None or _is_seed(self.seed), "None or an integer from 0 to 2**128 - 1", self.seed)

    @classmethod
    def greedy(cls) -> "Sampling":
        """Always the most likely token; the lowest id among equals."""
        return cls(temperature=0.0)

    @classmethod
    def or_greedy(cls, given: "Sampling | None") -> "Sampling":
        """What was given, greedy for None. Raises: InputError for what is no `Sampling`."""
        if given is None:
            return cls.greedy()
        _check("sampling", isinstance(given, cls), "a Sampling, such as Sampling(temperature=0.8), or None", given)
        return given

    @property
    def is_greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0

    def seeded(self) -> "Sampling":
        """The same with a seed: the given one, else a random one, so that a run can be reported and repeated."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))

    def generator(self) -> np.random.Generator:
        """A new source of random numbers, the same for the same seed."""
        return np.random.Generator(np.random.PCG64(self.seed))


def sample(
    logits: Floats,
    history: npt.ArrayLike,
    sampling: Sampling,
    rng: np.random.Generator,
    excluded: Sequence[int] = (),
) -> int:
    """The id of the next token, from logits (V,) and the ids so far (prompt and answer); never one of `excluded`.

    Raises: CosmosRuntimeError where a logit is NaN or infinite.
    """
    _check_finite(logits)
    scores = penalise_repetition(logits, history, sampling.repetition_penalty)
    scores = exclude(scores, excluded)
    if sampling.is_greedy:
        return int(scores.argmax())
    scores = keep_top_k(scores, sampling.top_k)
    candidates = np.flatnonzero(np.isfinite(scores))  # after top-k few: the rest is cheap
    scores = scale_by_temperature(scores[candidates].astype(np.float64), sampling.temperature)
    scores = keep_top_p(scores, sampling.top_p)
    return int(candidates[draw(softmax(scores), rng)])


def penalise_repetition(logits: Floats, history: npt.ArrayLike, penalty: float) -> Floats:
    """Make tokens of `history` less likely: divide positive logits by `penalty`, multiply negative ones (CTRL,
    arXiv:1909.05858). A token counts once, however often it occurred."""
    if penalty == 1:
        return logits
    seen = np.asarray(history, dtype=np.int64)
    penalised = logits.astype(np.float64)
    penalised[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return penalised


def exclude(logits: Floats, excluded: Sequence[int]) -> Floats:
    """Remove the tokens of `excluded`."""
    if not excluded:
        return logits
    kept = logits.copy()
    kept[list(excluded)] = -np.inf
    return kept


def scale_by_temperature(logits: Floats, temperature: float) -> Floats:
    """Divide by `temperature` (> 0) relative to the largest logit: however small it is, nothing becomes NaN."""
    with np.errstate(over="ignore"):
        return np.asarray((logits - logits.max()) / temperature)


def keep_top_k(logits: Floats, k: int) -> Floats:
    """Keep the `k` largest logits (all where k is 0); the lowest ids among equals at the border."""
    if k == 0 or k >= logits.size:
        return logits
    border = np.partition(logits, -k)[-k]
    kept = logits > border
    at_border = np.flatnonzero(logits == border)
    kept[at_border[: k - np.count_nonzero(kept)]] = True
    return np.where(kept, logits, -np.inf)


def keep_top_p(logits: Floats, p: float) -> Floats:
    """Keep the nucleus: the smallest set of most likely tokens whose probability reaches `p`, at least one
    (arXiv:1904.09751); the lowest ids among equals."""
    if p == 1:
        return logits
    nucleus = _nucleus(softmax(logits), p)
    kept = np.full_like(logits, -np.inf)
    kept[nucleus] = logits[nucleus]
    return kept


def _nucleus(probabilities: Floats, p: float) -> npt.NDArray[np.intp]:
    """Ids of the nucleus, the most likely first. Sorts the likeliest few only, more where they do not reach `p`."""
    for size in (*_NUCLEUS_SIZES, probabilities.size):
        largest = _largest(probabilities, size)
        reached = np.cumsum(probabilities[largest])
        if reached[-1] >= p:
            break
    return largest[: int(np.searchsorted(reached, p)) + 1]


def _largest(values: Floats, size: int) -> npt.NDArray[np.intp]:
    """Indices of at least the `size` largest values, in falling order, the lowest index first among equals."""
    if size >= values.size:
        return np.argsort(-values, kind="stable")
    found = np.flatnonzero(values >= np.partition(values, -size)[-size])
    return found[np.argsort(-values[found], kind="stable")]


def softmax(logits: Floats) -> Floats:
    """Probabilities (V,) that sum to 1; -inf has probability 0."""
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def draw(probabilities: Floats, rng: np.random.Generator) -> int:
    """One id, drawn with `probabilities` (V,) by inverting their running sum; never one of probability 0."""
    reached = np.cumsum(probabilities)
    return int(np.searchsorted(reached, rng.random() * reached[-1], side="right"))


def _check_finite(logits: Floats) -> None:
    finite = np.isfinite(logits)
    if not finite.all():
        token = int(finite.argmin())
        raise CosmosRuntimeError(
            f"logits: expected finite numbers, got {logits[token]} for token {token}; "
            f"check the bundle with `cosmos-run inspect --check`, or use a recipe of higher precision"
        )


def _check(name: str, valid: bool, expected: str, given: object) -> None:
    if not valid:
        raise InputError(f"{name}: expected {expected}, got {quoted(given)}")


def _is_real(value: SupportsFloat) -> bool:
    if isinstance(value, bool | str):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_count(value: SupportsIndex) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return operator.index(value) >= 0
    except TypeError:
        return False


def _is_seed(value: SupportsIndex) -> bool:
    return _is_count(value) and operator.index(value) < 2**128  # as long as those that numpy draws itself
