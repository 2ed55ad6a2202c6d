"""Generation: the tokens, why it ended, and streamed text."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cosmos_runtime import (
    CosmosRuntimeError,
    Generation,
    GraphSpec,
    InputError,
    Sampling,
    Session,
    generate,
    generate_batch,
    generate_text,
    load,
)
from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.cache import KeyValueCache
from cosmos_runtime.generation import new_continuation

from .tiny_bundles import MAX_SEQUENCE_LENGTH, BundleFactory, encode

WriteSession = Callable[..., Session]


def test_greedy_follows_the_successors(session: Session) -> None:
    generation = generate(session, [7, 3], max_new_tokens=3)
    assert generation.finish_reason is None
    assert next(generation) == 4
    assert (generation.tokens, generation.finish_reason) == ([4], None)
    assert list(generation) == [5, 6]
    assert (generation.tokens, generation.finish_reason) == ([4, 5, 6], "length")
    assert list(generation) == []


def test_context_fills_up(session: Session) -> None:
    generation = generate(session, [1] * (MAX_SEQUENCE_LENGTH - 2), max_new_tokens=9)
    assert list(generation) == [2, 3]
    assert generation.finish_reason == "context"


def test_full_prompt_leaves_no_room(session: Session) -> None:
    generation = generate(session, [1] * MAX_SEQUENCE_LENGTH, max_new_tokens=9)
    assert list(generation) == []
    assert generation.finish_reason == "context"


def test_length_comes_before_context(session: Session) -> None:
    generation = generate(session, [1] * (MAX_SEQUENCE_LENGTH - 1), max_new_tokens=1)
    assert list(generation) == [2]
    assert generation.finish_reason == "length"


def test_stop_id_is_not_part_of_the_answer(session: Session) -> None:
    generation = generate(session, [3], max_new_tokens=9, stop_ids=[6, 100])
    assert list(generation) == [4, 5]
    assert (generation.tokens, generation.finish_reason) == ([4, 5], "stop")


def test_seeds(session: Session) -> None:
    def run(seed: int | None) -> list[int]:
        return list(generate(session, [3], max_new_tokens=20, sampling=Sampling(temperature=8.0, seed=seed)))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_an_unseeded_run_can_be_repeated(session: Session) -> None:
    first = generate(session, [3], max_new_tokens=20, sampling=Sampling(temperature=8.0))
    assert list(first) == list(generate(session, [3], max_new_tokens=20, sampling=first.sampling))


def test_repetition_penalty_sees_the_prompt(make_bundle: BundleFactory) -> None:
    table = np.full((4, 4), 0.1, np.float32)
    table[:, 2], table[:, 3] = 2.0, 1.5
    session = load(make_bundle(vocab_size=4, table=table, tokenizer=False), threads=1)
    sampling = Sampling(temperature=0, repetition_penalty=2.0)
    assert list(generate(session, [2], max_new_tokens=1, sampling=sampling)) == [3]


def test_logits_that_are_not_finite(make_bundle: BundleFactory) -> None:
    session = load(make_bundle(table=np.full((257, 257), np.nan, np.float32)), threads=1)
    with pytest.raises(CosmosRuntimeError, match="got nan"):
        next(generate(session, [1], max_new_tokens=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": []}, "at least one token"),
        ({"prompt_ids": [[1, 2]]}, r"one prompt of shape \(T,\), got \(1, 2\)"),
        ({"prompt_ids": [257]}, r"input_ids\[0\]"),
        ({"prompt_ids": [0] * 33}, "at most 32 tokens, got 33"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive integer, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens: expected an integer, 0 or more, got -1"),
        ({"min_new_tokens": 2}, "min_new_tokens: expected at most max_new_tokens, 1, got 2"),
        ({"stop_ids": [257]}, "stop_ids: expected token ids from 0 to 256, got 257"),
        ({"stop_ids": ["a"]}, "stop_ids"),
    ],
)
def test_bad_arguments_fail_at_once(session: Session, changes: dict[str, Any], message: str) -> None:
    arguments = {"prompt_ids": [1], "max_new_tokens": 1, **changes}
    with pytest.raises(InputError, match=message):
        generate(session, **arguments)


def test_stop_ids_wait_for_the_shortest_answer(session: Session) -> None:
    generation = generate(session, [3], max_new_tokens=9, min_new_tokens=4, stop_ids=[5, 10])
    tokens = list(generation)
    assert (tokens[0], generation.finish_reason) == (4, "length")  # then 5 would come, and 4's runner-up does
    assert 5 not in tokens[:4]
    assert len(tokens) >= 4
    sampled = generate(
        session, [3], max_new_tokens=9, min_new_tokens=9, stop_ids=range(3, 257), sampling=Sampling(temperature=9)
    )
    assert len(list(sampled)) == 9
    assert set(sampled.tokens) <= {0, 1, 2}


def test_shortest_answer_that_is_reached(session: Session) -> None:
    assert list(generate(session, [3], max_new_tokens=9, min_new_tokens=2, stop_ids=[6])) == [4, 5]


@pytest.mark.parametrize("name", ["decoding", "recomputing"])
def test_stop_and_close(name: str, request: pytest.FixtureRequest) -> None:
    for end in (Generation.stop, Generation.close):
        generation = generate(request.getfixturevalue(name), [3, 4], max_new_tokens=50)
        first = next(generation)
        end(generation)
        assert list(generation) == []
        assert (generation.tokens, generation.finish_reason) == ([first], "stop")
        end(generation)


def test_the_reason_that_was_there_first_stays(session: Session) -> None:
    generation = generate(session, [3], max_new_tokens=1)
    assert list(generation) == [4]
    generation.close()
    assert generation.finish_reason == "length"


class Endless:
    """A decoder whose second step ends only by being cancelled, as a long run of a graph does."""

    length, graph_seconds, diagnosis = 0, 0.0, None

    def __init__(self) -> None:
        self.waiting, self.cancelled = threading.Event(), threading.Event()

    def prefill(self, ids: TokenIds) -> Floats:
        return np.eye(8, dtype=np.float32)[1]

    def decode_one_token(self, token_id: int) -> Floats:
        self.waiting.set()
        assert self.cancelled.wait(timeout=20)
        raise CosmosRuntimeError("given up")

    def cancel(self) -> None:
        self.cancelled.set()


def test_stop_from_another_thread_ends_the_step(session: Session) -> None:
    decoder = Endless()
    continuation = new_continuation(session, [1], max_new_tokens=9, min_new_tokens=0, sampling=None, stop_ids=())
    generation = Generation(continuation, lambda: decoder)
    answers: list[list[int]] = []
    thread = threading.Thread(target=lambda: answers.append(list(generation)))
    thread.start()
    assert decoder.waiting.wait(timeout=20)
    generation.stop()
    thread.join(timeout=20)
    assert answers == [[1]]
    assert generation.finish_reason == "stop"


def test_a_step_that_fails_is_an_error(session: Session) -> None:
    decoder = Endless()
    decoder.cancel()
    continuation = new_continuation(session, [1], max_new_tokens=9, min_new_tokens=0, sampling=None, stop_ids=())
    generation = Generation(continuation, lambda: decoder)
    next(generation)
    with pytest.raises(CosmosRuntimeError, match="given up"):
        next(generation)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[KeyValueCache]]:
    """Every cache that is made during a test, without keeping it."""
    made: list[weakref.ref[KeyValueCache]] = []
    create = KeyValueCache.__init__

    def record(cache: KeyValueCache, graph: GraphSpec, batch: int, length: int, device: str) -> None:
        create(cache, graph, batch, length, device)
        made.append(weakref.ref(cache))

    monkeypatch.setattr(KeyValueCache, "__init__", record)
    return made


@pytest.mark.parametrize(("prompt", "most", "length"), [(10, 12, 32), (20, 13, 64), (90, 1000, 96)])
def test_the_cache_holds_what_is_needed(
    decoding: Session, caches: list[weakref.ref[KeyValueCache]], prompt: int, most: int, length: int
) -> None:
    generation = generate(decoding, [1] * prompt, max_new_tokens=most)
    assert caches == []
    next(generation)
    cache = caches[0]()
    assert cache is not None
    assert cache.length == length
    del cache
    assert len(list(generation)) == min(most, 96 - prompt) - 1
    assert [made() for made in caches] == [None]


@pytest.mark.parametrize("speculate", [0, 3])
def test_the_cache_is_freed_on_closing(
    decoding: Session, caches: list[weakref.ref[KeyValueCache]], speculate: int
) -> None:
    generation = generate(decoding, [1] * 10, max_new_tokens=12, speculate=speculate)
    next(generation)
    generation.close()
    batch = generate_batch(decoding, [[1], [2, 3]], max_new_tokens=12)
    next(batch)
    batch.close()
    assert [made() for made in caches] == [None, None]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=2.0, top_p=0.9, seed=3)])
def test_both_graphs_give_the_same_answer(decoding: Session, recomputing: Session, sampling: Sampling | None) -> None:
    for prompt in ([5], [1, 2, 3], list(range(50))):
        wanted = list(generate(recomputing, prompt, max_new_tokens=40, sampling=sampling))
        assert list(generate(decoding, prompt, max_new_tokens=40, sampling=sampling)) == wanted
        assert len(set(wanted)) > 10


def test_text_streams_whole_characters(write_session: WriteSession) -> None:
    answer = generate_text(write_session("h€y😁!"), "h", max_new_tokens=9)
    assert list(answer) == ["€", "y", "😁", "!"]
    assert answer.text == "€y😁!"
    assert answer.finish_reason == "length"
    assert answer.generation.prompt == encode("h")


def test_text_cut_inside_a_character(write_session: WriteSession) -> None:
    assert "".join(generate_text(write_session("h€y"), "h", max_new_tokens=2)) == "\ufffd"


def test_stop_string_over_several_tokens(write_session: WriteSession) -> None:
    answer = generate_text(write_session("abcdefghi"), "a", max_new_tokens=8, stop=["efg", "xyz"])
    assert "".join(answer) == answer.text == "bcd"
    assert answer.finish_reason == "stop"
    assert answer.tokens == encode("bcdefg")


def test_what_only_began_like_a_stop_string(write_session: WriteSession) -> None:
    answer = generate_text(write_session("abcdef"), "a", max_new_tokens=5, stop=["cdX", "fg"])
    assert list(answer) == ["b", "cde", "f"]
    assert answer.finish_reason == "length"


def test_stop_string_of_half_held_characters(write_session: WriteSession) -> None:
    answer = generate_text(write_session("a€b"), "a", max_new_tokens=4, stop=["€"])
    assert list(answer) == []
    assert answer.finish_reason == "stop"


def test_stop_id_of_text(write_session: WriteSession) -> None:
    answer = generate_text(write_session("abcd"), "a", max_new_tokens=9, stop_ids=encode("d"))
    assert "".join(answer) == "bc"
    assert answer.finish_reason == "stop"


def test_text_that_is_closed(write_session: WriteSession) -> None:
    answer = generate_text(write_session("abcdef"), "a", max_new_tokens=5)
    assert next(answer) == "b"
    answer.close()
    assert list(answer) == []
    assert answer.finish_reason == "stop"


def test_empty_prompt(session: Session) -> None:
    with pytest.raises(InputError, match="has no tokens"):
        generate_text(session, "", max_new_tokens=1)
