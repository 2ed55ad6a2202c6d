"""Batches: every row gets the answer that it gets alone."""

import threading
from typing import Any

import numpy as np
import pytest

from cosmos_runtime import BatchGeneration, InputError, Sampling, Session, generate, generate_batch

from .tiny_decoders import MAX_SEQUENCE_LENGTH, VOCAB_SIZE

RANDOM = np.random.default_rng(3).integers(0, VOCAB_SIZE, MAX_SEQUENCE_LENGTH).tolist()
PROMPTS = [RANDOM[:30], RANDOM[40:41], RANDOM[50:57]]


@pytest.fixture(params=["decoding", "recomputing"])
def any_session(request: pytest.FixtureRequest) -> Session:
    session: Session = request.getfixturevalue(request.param)
    return session


def alone(session: Session, prompt: list[int], **options: Any) -> list[int]:
    return list(generate(session, prompt, **options))


def test_greedy(any_session: Session) -> None:
    answers = generate_batch(any_session, PROMPTS, max_new_tokens=25).run()
    assert answers == [alone(any_session, prompt, max_new_tokens=25) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == 3


def test_a_seed_for_every_row(any_session: Session) -> None:
    sampling = [Sampling(temperature=1.5, top_k=40, top_p=0.9, seed=seed) for seed in (1, 2, 3)]
    answers = generate_batch(any_session, PROMPTS, max_new_tokens=25, sampling=sampling).run()
    assert answers == [
        alone(any_session, prompt, max_new_tokens=25, sampling=choice)
        for prompt, choice in zip(PROMPTS, sampling, strict=True)
    ]


def test_one_sampling_for_all_rows(decoding: Session) -> None:
    seeded = generate_batch(decoding, [[1], [1]], max_new_tokens=9, sampling=Sampling(temperature=9, seed=4)).run()
    assert seeded[0] == seeded[1]
    free = generate_batch(decoding, [[1], [1]], max_new_tokens=9, sampling=Sampling(temperature=9))
    first, second = free.run()
    assert first != second
    assert first == alone(decoding, [1], max_new_tokens=9, sampling=free.rows[0].sampling)


def test_rows_end_on_their_own(any_session: Session) -> None:
    prompts = [RANDOM[:-3], RANDOM[:5], RANDOM[:20], RANDOM]
    wanted = alone(any_session, prompts[2], max_new_tokens=9)
    batch = generate_batch(any_session, prompts, max_new_tokens=9, stop_ids=[wanted[4]])
    steps = list(batch)
    assert [row.finish_reason for row in batch.rows] == ["context", "length", "stop", "context"]
    assert [len(row.tokens) for row in batch.rows] == [3, 9, wanted.index(wanted[4]), 0]
    for row, prompt in enumerate(prompts):
        assert batch.rows[row].tokens == alone(any_session, prompt, max_new_tokens=9, stop_ids=[wanted[4]])
        assert [token for step in steps for r, token in step if r == row] == batch.rows[row].tokens
    assert next(batch, None) is None


def test_the_first_step_has_every_row(decoding: Session) -> None:
    batch = generate_batch(decoding, PROMPTS, max_new_tokens=5)
    assert [row for row, _ in next(batch)] == [0, 1, 2]


def test_stopping_a_row(any_session: Session) -> None:
    batch = generate_batch(any_session, PROMPTS, max_new_tokens=9)
    next(batch)
    batch.stop(1)
    assert [row for row, _ in next(batch)] == [0, 2]
    assert batch.run()[2] == alone(any_session, PROMPTS[2], max_new_tokens=9)
    assert [row.finish_reason for row in batch.rows] == ["length", "stop", "length"]


@pytest.mark.parametrize("end", [BatchGeneration.stop, BatchGeneration.close])
def test_stopping_all_rows(any_session: Session, end: Any) -> None:
    batch = generate_batch(any_session, PROMPTS, max_new_tokens=9)
    next(batch)
    end(batch)
    assert next(batch, None) is None
    assert [row.finish_reason for row in batch.rows] == ["stop"] * 3


def test_stopping_from_another_thread(decoding: Session) -> None:
    batch = generate_batch(decoding, PROMPTS, max_new_tokens=60)
    next(batch)
    thread = threading.Thread(target=batch.stop)
    thread.start()
    thread.join()
    assert list(batch) == []


def test_one_prompt_and_none(decoding: Session) -> None:
    assert generate_batch(decoding, [[5]], max_new_tokens=5).run() == [alone(decoding, [5], max_new_tokens=5)]
    assert generate_batch(decoding, [], max_new_tokens=5).run() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], [257]]}, r"row 1: input_ids\[0\]: .* got 257"),
        ({"prompts": [[1], []]}, "row 1: input_ids: expected at least one token"),
        ({"sampling": [Sampling()]}, "sampling: expected one, or one for each of 2 prompts, got 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive integer"),
    ],
)
def test_bad_arguments(decoding: Session, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_batch(decoding, **{"prompts": [[1], [2]], "max_new_tokens": 1, **changes})
