"""Sampling: each step's defining property, and determinism."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cosmos_runtime import CosmosRuntimeError, InputError, Sampling, sample
from cosmos_runtime.sampling import draw, keep_top_k, keep_top_p, penalise_repetition, scale_by_temperature, softmax

# Whole numbers make ties common.
LOGITS = hnp.arrays(
    np.float64,
    st.integers(1, 40),
    elements=st.one_of(st.integers(-5, 5).map(float), st.floats(-50, 50, allow_nan=False)),
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def kept(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_the_k_largest_lowest_ids_first(logits: np.ndarray, k: int) -> None:
    best = sorted(range(logits.size), key=lambda i: (-logits[i], i))[:k]
    assert kept(keep_top_k(logits, k)) == set(best)


@given(LOGITS)
def test_top_k_zero_and_top_p_one_keep_all(logits: np.ndarray) -> None:
    assert keep_top_k(logits, 0) is logits
    assert keep_top_p(logits, 1.0) is logits


@given(LOGITS, st.floats(0.001, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: np.ndarray, p: float) -> None:
    probabilities = softmax(logits)
    nucleus = kept(keep_top_p(logits, p))
    best = sorted(range(logits.size), key=lambda i: (-probabilities[i], i))
    assert nucleus == set(best[: len(nucleus)])
    assert len(nucleus) >= 1
    assert probabilities[best[: len(nucleus)]].sum() >= p - 1e-12
    assert probabilities[best[: len(nucleus) - 1]].sum() < p + 1e-12


@given(LOGITS)
def test_softmax_is_a_distribution(logits: np.ndarray) -> None:
    probabilities = softmax(logits)
    assert probabilities.min() >= 0
    assert probabilities.sum() == pytest.approx(1)


def test_softmax_of_large_and_removed_logits() -> None:
    np.testing.assert_array_equal(softmax(np.array([1e30, -np.inf, 1e30])), [0.5, 0, 0.5])


@given(LOGITS, st.floats(1.0, 5.0), st.lists(st.integers(0, 0), max_size=3))
def test_penalty_lowers_seen_tokens_only(logits: np.ndarray, penalty: float, history: list[int]) -> None:
    penalised = penalise_repetition(logits, history, penalty)
    seen = np.isin(np.arange(logits.size), history)
    assert (penalised[seen] <= logits[seen]).all()
    np.testing.assert_array_equal(penalised[~seen], logits[~seen])


def test_penalty_divides_positive_and_multiplies_negative_once() -> None:
    logits = np.array([2.0, -2.0, 0.0, 1.0])
    np.testing.assert_array_equal(penalise_repetition(logits, [0, 1, 2, 0], 2.0), [1.0, -4.0, 0.0, 1.0])
    np.testing.assert_array_equal(logits, [2.0, -2.0, 0.0, 1.0])


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 0.5, 1e300])
def test_any_temperature_gives_a_distribution(temperature: float) -> None:
    probabilities = softmax(scale_by_temperature(np.array([1.0, 3.0, 2.0]), temperature))
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities.argmax() == 1 or temperature == 1e300


def test_draw_follows_the_probabilities() -> None:
    probabilities, source = np.array([0.0, 0.25, 0.0, 0.75, 0.0]), rng()
    counts = np.bincount([draw(probabilities, source) for _ in range(4000)], minlength=5)
    assert counts[[0, 2, 4]].sum() == 0
    assert counts[1] / 4000 == pytest.approx(0.25, abs=0.03)


@given(LOGITS)
def test_greedy_takes_the_lowest_of_the_best(logits: np.ndarray) -> None:
    assert sample(logits, [], Sampling.greedy(), rng()) == int(np.flatnonzero(logits == logits.max())[0])


@given(LOGITS, st.integers(0, 2**32))
def test_a_seed_repeats(logits: np.ndarray, seed: int) -> None:
    sampling = Sampling(temperature=1.3, top_k=10, top_p=0.9, seed=seed)
    runs = []
    for _ in range(2):
        source = sampling.generator()
        runs.append([sample(logits, [0], sampling, source) for _ in range(5)])
    assert runs[0] == runs[1]


@given(LOGITS, st.integers(0, 100))
def test_top_k_one_is_greedy(logits: np.ndarray, seed: int) -> None:
    assert sample(logits, [], Sampling(top_k=1), rng(seed)) == sample(logits, [], Sampling.greedy(), rng())


def test_greedy_heeds_the_penalty() -> None:
    logits = np.array([3.0, 2.9], np.float32)
    assert sample(logits, [0], Sampling(temperature=0, repetition_penalty=1.1), rng()) == 1


def test_all_zero_logits_give_the_first_token() -> None:
    assert sample(np.zeros(8, np.float32), [], Sampling.greedy(), rng()) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sampling", [Sampling.greedy(), Sampling()])
def test_logits_that_are_not_finite(bad: float, sampling: Sampling) -> None:
    with pytest.raises(CosmosRuntimeError, match=r"got -?(nan|inf) for token 1"):
        sample(np.array([0.0, bad, 1.0]), [], sampling, rng())


def test_seeded_draws_a_seed_once() -> None:
    assert Sampling(seed=3).seeded() == Sampling(seed=3)
    assert Sampling().seeded().seed is not None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None, True]),
        ("top_k", [-1, 1.5, "5", None, True]),
        ("top_p", [0, 0.0, -0.5, 1.01, float("nan"), "0.9", None]),
        ("repetition_penalty", [0, -1, float("inf"), None]),
        ("seed", [-1, 1.5, "3", True]),
    ],
)
def test_options_out_of_range(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"^{name}: expected"):
            Sampling(**{name: value})


def test_numpy_numbers_are_options_too() -> None:
    Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0])
def test_nucleus_of_a_large_vocabulary(p: float, scale: float) -> None:
    """The nucleus is found without sorting everything where it is small; the result is that of sorting everything."""
    logits = scale * np.random.default_rng(0).normal(size=9000).round(1)  # with many equal ones
    probabilities = np.exp(logits) / np.exp(logits).sum()
    order = np.lexsort((np.arange(9000), -probabilities))
    size = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
    kept = np.flatnonzero(np.isfinite(keep_top_p(logits, p)))
    assert abs(len(kept) - size) <= 1  # sums in another order
    assert set(kept) <= set(order[: size + 1])


def test_excluded_tokens() -> None:
    logits = np.array([0.0, 3.0, 2.0, 1.0], np.float32)
    rng = np.random.default_rng(0)
    assert sample(logits, [], Sampling.greedy(), rng, excluded=[1, 2]) == 3
    assert {sample(logits, [], Sampling(), rng, excluded=[1, 3]) for _ in range(200)} == {0, 2}
    np.testing.assert_array_equal(logits, [0, 3, 2, 1])
