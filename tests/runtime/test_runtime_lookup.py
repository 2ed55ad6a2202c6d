"""Speculation: the same tokens as without, in fewer runs where text repeats, and nearly none more where it does not."""

import itertools

import numpy as np
import pytest

from cosmos_runtime import InputError, Sampling, Session, generate, generate_text
from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.lookup import Budget, PromptLookup, SpeculatingDecoder

from .tiny_decoders import VOCAB_SIZE


def lookup(*ids: int) -> PromptLookup:
    found = PromptLookup()
    found.extend(ids)
    return found


@pytest.mark.parametrize(
    ("ids", "proposal"),
    [
        ((), []),
        ((1,), []),
        ((1, 2, 3, 4), []),
        ((1, 2, 3, 1), []),  # one token tells too little
        ((1, 2, 3, 4, 1, 2), [3, 4, 1, 2]),
        ((1, 2, 3, 1, 2, 4, 1, 2), [4, 1, 2, 4]),  # the latest of two
        ((9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2), [3, 8, 1, 2]),  # three tokens tell more than two
        ((7, 7), []),
        ((7, 7, 7), [7, 7, 7, 7]),  # a repetition goes on
        ((1, 2, 1, 2), [1, 2, 1, 2]),
    ],
)
def test_proposal(ids: tuple[int, ...], proposal: list[int]) -> None:
    assert lookup(*ids).propose(4) == proposal
    assert lookup(*ids).propose(2) == proposal[:2]
    assert lookup(*ids).propose(0) == []


def test_extending_in_pieces() -> None:
    found = lookup(1, 2, 3)
    found.extend([4, 1])
    found.extend([2])
    assert found.propose(3) == [3, 4, 1]


class Recording:
    """A decoder of a fixed text: whatever comes in, the logits after a position name the token that comes next."""

    def __init__(self, text: list[int]) -> None:
        self.text, self.length, self.runs, self.graph_seconds = text, 0, 0, 1.5
        self.closed = self.cancelled = False

    def prefill(self, ids: TokenIds) -> Floats:
        return np.asarray(self.decode(ids)[-1])

    def decode_one_token(self, token_id: int) -> Floats:
        return self.prefill(np.array([token_id]))

    def decode(self, ids: TokenIds) -> Floats:
        self.runs += 1
        self.length += len(ids)
        following = [
            self.text[min(place + 1, len(self.text) - 1)] for place in range(self.length - len(ids), self.length)
        ]
        return np.asarray(np.eye(100, dtype=np.float32)[following])

    def rewind(self, length: int) -> None:
        assert length <= self.length
        self.length = length

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True


def read(text: list[int], most: int, prompt: int = 5) -> Recording:
    """Decode `text` greedily from its first tokens on; the decoder, for its count of runs."""
    recording = Recording(text)
    decoder = SpeculatingDecoder(recording, most, capacity=len(text))
    answer = [int(decoder.prefill(np.array(text[:prompt])).argmax())]
    while len(answer) < len(text) - prompt:
        answer.append(int(decoder.decode_one_token(answer[-1]).argmax()))
        assert decoder.length == prompt + len(answer) - 1
    assert answer == text[prompt:]
    return recording


def test_runs_on_text_that_repeats() -> None:
    text = list(range(20)) * 10
    assert read(text, most=8).runs < len(text) / 4
    assert read(text, most=2).runs < len(text) / 2


def test_runs_on_text_that_does_not() -> None:
    text = np.random.default_rng(0).permutation(100).tolist()
    assert read(text, most=8).runs == len(text) - 5


def test_a_full_cache_bounds_the_proposal() -> None:
    text = [1, 2, 3, 4] * 5
    assert read(text, most=50).length <= len(text)


def test_misleading_text_costs_little() -> None:
    """Pairs that occurred before, each time followed by another token: every proposal is wrong."""
    text = [token for number in range(2, 100) for token in (0, 1, number)]
    recording = Recording(text)
    proposed = []
    decode = recording.decode

    def record(ids: TokenIds) -> Floats:
        proposed.append(len(ids) - 1)
        return decode(ids)

    recording.decode = record  # type: ignore[method-assign]
    decoder = SpeculatingDecoder(recording, 8, capacity=len(text))
    token = int(decoder.prefill(np.array(text[:3])).argmax())
    proposed.clear()
    for _ in range(len(text) - 4):
        token = int(decoder.decode_one_token(token).argmax())
    assert sum(proposed) >= 3
    assert sum(map(Budget.cost, proposed)) < 1 + 0.03 * len(text)


def test_the_rest_is_passed_on() -> None:
    recording = Recording([1, 2, 3])
    decoder = SpeculatingDecoder(recording, 2, capacity=3)
    assert decoder.graph_seconds == 1.5
    decoder.cancel()
    assert recording.cancelled


@pytest.mark.parametrize("name", ["decoding", "recomputing"])
@pytest.mark.parametrize("most", [1, 3, 30])
def test_the_same_answer(name: str, most: int, request: pytest.FixtureRequest) -> None:
    session = request.getfixturevalue(name)
    random = np.random.default_rng(1).integers(0, VOCAB_SIZE, 20).tolist()
    plain = list(generate(session, random, max_new_tokens=40))
    # Continued from its own answer, the model repeats what the prompt holds; and one that repeats nothing.
    for prompt in (random, [*plain, *random], [1, 2, 3] * 8):
        wanted = generate(session, prompt, max_new_tokens=40)
        given = generate(session, prompt, max_new_tokens=40, speculate=most)
        assert list(given) == list(wanted)
        assert given.finish_reason == wanted.finish_reason


def test_the_same_answer_under_a_repetition_penalty(decoding: Session) -> None:
    options = {"max_new_tokens": 60, "sampling": Sampling(temperature=0, repetition_penalty=1.3)}
    wanted = list(generate(decoding, [1, 2] * 6, **options))
    assert list(generate(decoding, [1, 2] * 6, speculate=5, **options)) == wanted
    assert wanted != list(generate(decoding, [1, 2] * 6, max_new_tokens=60))


def test_stopping_inside_a_proposal(decoding: Session) -> None:
    prompt = list(itertools.islice(itertools.cycle([7, 7, 9]), 30))
    wanted = list(generate(decoding, prompt, max_new_tokens=20))
    stop = wanted[9]
    given = generate(decoding, prompt, max_new_tokens=20, speculate=6, stop_ids=[stop])
    assert list(given) == wanted[: wanted.index(stop)]
    assert given.finish_reason == "stop"


def test_text(decoding: Session) -> None:
    wanted = generate_text(decoding, "abcabcabc", max_new_tokens=30)
    given = generate_text(decoding, "abcabcabc", max_new_tokens=30, speculate=4)
    assert "".join(given) == "".join(wanted)


def test_chance_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match="speculate: expected greedy sampling, got temperature 0.5"):
        generate(session, [1], max_new_tokens=1, speculate=3, sampling=Sampling(temperature=0.5))


@pytest.mark.parametrize("most", [-1, 1.5, True])
def test_bad_number(session: Session, most: int) -> None:
    with pytest.raises(InputError, match="speculate: expected an integer, 0 or more"):
        generate(session, [1], max_new_tokens=1, speculate=most)
