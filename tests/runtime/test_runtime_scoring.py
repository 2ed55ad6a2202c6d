"""Scores are the log-softmax of the logits, however they are computed."""

import math

import numpy as np
import pytest

from cosmos_runtime import InputError, Score, Session, load, score, scoring

from .tiny_bundles import BundleFactory, encode
from .tiny_decoders import VOCAB_SIZE

IDS = np.random.default_rng(5).integers(0, VOCAB_SIZE, 60)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture(params=["decoding", "recomputing"])
def any_session(request: pytest.FixtureRequest) -> Session:
    session: Session = request.getfixturevalue(request.param)
    return session


@pytest.mark.parametrize("chunk", [256, 7])
def test_score(any_session: Session, recomputing: Session, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CHUNK", chunk)
    result = score(any_session, IDS)
    table = log_softmax(recomputing.logits(IDS)[0].astype(np.float64))
    wanted = np.array([table[place, IDS[place + 1]] for place in range(len(IDS) - 1)])
    assert result.ids == IDS.tolist()
    assert result.log_probabilities.dtype == np.float64
    np.testing.assert_allclose(result.log_probabilities, wanted, rtol=0, atol=2e-5)
    assert result.total == pytest.approx(wanted.sum(), abs=1e-3)
    assert result.mean_nats == pytest.approx(-wanted.mean(), abs=1e-5)
    assert result.perplexity == pytest.approx(np.exp(-wanted.mean()), rel=1e-5)


def test_two_tokens(decoding: Session, recomputing: Session) -> None:
    result = score(decoding, [3, 4])
    wanted = log_softmax(recomputing.logits([3])[0, 0].astype(np.float64))[4]
    np.testing.assert_allclose(result.log_probabilities, [wanted], rtol=0, atol=2e-5)


def test_text(decoding: Session) -> None:
    result = score(decoding, "h€llo")
    assert result.ids == encode("h€llo")
    np.testing.assert_array_equal(result.log_probabilities, score(decoding, encode("h€llo")).log_probabilities)


def test_log_softmax_of_large_logits() -> None:
    logits = np.array([[1e4, 0.0, -1e4], [1e30, 1e30, 0.0]] * 20, np.float32)
    given = scoring.log_softmax_at(logits, np.array([1, 0] * 20))
    np.testing.assert_allclose(given, [-1e4, -math.log(2)] * 20, rtol=1e-12)


def test_perplexity_beyond_float() -> None:
    assert Score([1, 2], np.array([-1e4])).perplexity == math.inf


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1], "at least 2 tokens, got 1"),
        ("a", "at least 2 tokens, got 1"),
        ("", "has no tokens"),
        ([1, 257], r"input_ids\[1\]"),
        ([0] * 97, "at most 96 tokens, got 97"),
    ],
)
def test_what_cannot_be_scored(decoding: Session, ids: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(decoding, ids)


def test_a_model_that_looks_ahead(make_bundle: BundleFactory) -> None:
    model = {"vocab_size": 257, "max_sequence_length": 32, "causal": False, "head": "lm", "parameters": 1}
    with pytest.raises(InputError, match="expected a causal model"):
        score(load(make_bundle(model=model), threads=1), [1, 2])
