"""Generation: the tokens, why it ended, and streamed text."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cosmos_runtime import CosmosRuntimeError, InputError, Sampling, Session, generate, generate_text, load

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
        ({"stop_ids": [257]}, "stop_ids: expected token ids from 0 to 256, got 257"),
        ({"stop_ids": ["a"]}, "stop_ids"),
    ],
)
def test_bad_arguments_fail_at_once(session: Session, changes: dict[str, Any], message: str) -> None:
    arguments = {"prompt_ids": [1], "max_new_tokens": 1, **changes}
    with pytest.raises(InputError, match=message):
        generate(session, **arguments)


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


def test_empty_prompt(session: Session) -> None:
    with pytest.raises(InputError, match="has no tokens"):
        generate_text(session, "", max_new_tokens=1)
