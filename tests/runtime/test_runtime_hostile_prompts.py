"""What no model can take is refused on the host, by the same words whatever would have computed it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosmos_runtime import (
    InputError,
    Sampling,
    Session,
    TokenizerError,
    generate,
    generate_batch,
    generate_text,
    load,
    score,
)

from .test_runtime_cli import run
from .tiny_bundles import BundleFactory
from .tiny_decoders import MAX_SEQUENCE_LENGTH, VOCAB_SIZE

RECURSIVE: list[Any] = []
RECURSIVE.append(RECURSIVE)
DEEP: list[Any] = [1]
for _ in range(5000):
    DEEP = [DEEP]


class Raises:
    """What has no array, and says so in its own way."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise KeyError("no array here")

    def __repr__(self) -> str:
        raise KeyError("no repr here")


# Each is wrong for one prompt, and for a batch of prompts, too.
BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty": ([], "at least one token"),
    "empty rows": ([[]], "at least one token|expected one prompt"),
    "too long": (
        [1] * (MAX_SEQUENCE_LENGTH + 1),
        f"at most {MAX_SEQUENCE_LENGTH} tokens, got {MAX_SEQUENCE_LENGTH + 1}",
    ),
    "below 0": ([1, -1], r"\[1\]: expected a token id from 0 to 256, got -1"),
    "past the vocabulary": ([VOCAB_SIZE], r"\[0\]: expected a token id from 0 to 256, got 257"),
    "least int64": ([-(2**63)], "got -9223372036854775808"),
    "uint64": (np.array([2**64 - 1], np.uint64), "got 18446744073709551615"),
    "beyond 64 bits": ([2**64], "expected integers"),
    "of 16,000 bits": ([10**5000], "expected integers"),
    "floats": ([1.0, 2.0], "expected integers, got dtype float64"),
    "NaN": ([float("nan")], "expected integers, got dtype float64"),
    "bools": ([True, False], "expected integers, got dtype bool"),
    "complex": ([1j], "expected integers, got dtype complex128"),
    "durations": (np.array([1, 2], "m8[s]"), "expected integers, got dtype timedelta64"),
    "records": (np.zeros(2, [("id", "i8")]), "expected integers"),
    "strings": (["1", "2"], "expected integers, got dtype <U1"),
    "bytes": (b"12", "expected integers"),
    "None": (None, "expected integers"),
    "Nones": ([None, 1], "expected integers"),
    "a dict": ({"a": 1}, "expected integers"),
    "an object": (object(), "expected integers"),
    "an object that fails": (Raises(), "no array here"),
    "ragged": ([[1, 2], [3]], "rows of equal length"),
    "a scalar": (3, r"expected (shape|one prompt)"),
    "rank 3": ([[[1]]], r"expected (shape|one prompt)"),
    "in itself": (RECURSIVE, "input_ids"),
    "deep": (DEEP, "input_ids|rank"),
}

ENTRANCES: dict[str, Callable[[Session, Any], Any]] = {
    "logits": lambda session, ids: session.logits(ids),
    "call": lambda session, ids: session.call(ids),
    "generate": lambda session, ids: generate(session, ids, max_new_tokens=1),
    "generate_batch": lambda session, ids: generate_batch(session, [[1], ids], max_new_tokens=1),
    "score": lambda session, ids: score(session, ids),
}


class NothingComputes:
    """In place of a session's graph: a check that came too late would end here."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def __getattr__(self, name: str) -> Any:
        def compute(*arguments: Any, **options: Any) -> None:
            raise AssertionError(f"{name} was called before the prompt was checked")

        return compute


@pytest.fixture(params=["cpu", "cuda", "torch"])
def idle(request: pytest.FixtureRequest, decoding: Session) -> Session:
    """A session whatever its provider: nothing of it may compute."""
    return Session(decoding.bundle, request.param, NothingComputes(decoding.graph.spec))  # type: ignore[arg-type]


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("what", BAD_PROMPTS)
def test_a_bad_prompt_is_refused_before_anything_computes(idle: Session, entrance: str, what: str) -> None:
    ids, words = BAD_PROMPTS[what]
    with pytest.raises(InputError, match=words) as caught:
        ENTRANCES[entrance](idle, ids)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("what", [name for name in BAD_PROMPTS if name != "too long"])
def test_both_graphs_refuse_with_the_same_words(decoding: Session, recomputing: Session, what: str) -> None:
    words = []
    for session in (decoding, recomputing):
        with pytest.raises(InputError) as caught:
            session.logits(BAD_PROMPTS[what][0])
        words.append(str(caught.value))
    assert words[0] == words[1]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "prompts: expected a list of rows"),
        (7, "prompts: expected a list of rows"),
        ("text", "prompts: expected a list of rows of token ids, got 'text'; encode"),
        ([[1], None], "row 1: "),
        ([[1], [2, VOCAB_SIZE]], "row 1: .*got 257"),
        (np.array(3), "prompts: expected a list of rows"),
    ],
)
def test_bad_batches_name_the_row(idle: Session, prompts: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        generate_batch(idle, prompts, max_new_tokens=1)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens"),
    "tokens NaN": ({"max_new_tokens": float("nan")}, "max_new_tokens"),
    "tokens none": ({"max_new_tokens": None}, "max_new_tokens"),
    "tokens below 0": ({"max_new_tokens": -(10**5000)}, "max_new_tokens"),
    "too few": ({"min_new_tokens": -1}, "min_new_tokens"),
    "stop ids outside": ({"stop_ids": [VOCAB_SIZE]}, "stop_ids: expected token ids from 0 to 256, got 257"),
    "stop ids huge": ({"stop_ids": [10**5000]}, "stop_ids"),
    "stop ids negative": ({"stop_ids": [-1]}, "stop_ids"),
    "stop ids bool": ({"stop_ids": [True]}, "stop_ids"),
    "stop ids float": ({"stop_ids": np.array([1.0])}, "stop_ids"),
    "stop ids none": ({"stop_ids": None}, "stop_ids"),
    "stop ids a number": ({"stop_ids": 3}, "stop_ids"),
    "sampling a dict": ({"sampling": {"temperature": 1}}, "sampling: expected"),
    "sampling an empty dict": ({"sampling": {}}, "sampling: expected"),
    "sampling a number": ({"sampling": 0.8}, "sampling: expected"),
    "diagnostics": ({"diagnostics": True}, "plain decoder"),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
@pytest.mark.parametrize("one", [True, False], ids=["generate", "generate_batch"])
def test_bad_options_are_refused_before_anything_computes(idle: Session, what: str, one: bool) -> None:
    options, words = BAD_OPTIONS[what]
    with pytest.raises(InputError, match=words):
        if one:
            generate(idle, [1], **{"max_new_tokens": 1, **options})
        else:
            generate_batch(idle, [[1]], **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"temperature": value}
            for value in (float("nan"), float("inf"), -1, -(10**5000), 10**5000, "hot", None, [1])
        ),
        *({"top_k": value} for value in (-1, -(10**5000), 0.5, float("nan"), "5")),
        *({"top_p": value} for value in (0, 1.1, float("nan"), None)),
        *({"repetition_penalty": value} for value in (0, 1e-320, 1e300, float("nan"), -1)),
        *({"seed": value} for value in (-1, 2**128, 10**5000, 0.5, "7")),
    ],
    ids=lambda options: f"{next(iter(options))}",
)
def test_bad_sampling(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))}: expected"):
        Sampling(**options)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1e-320, seed=1),
        Sampling(temperature=1e300, seed=2**128 - 1),
        Sampling(top_k=10**30, top_p=1e-320, seed=0),
        Sampling(repetition_penalty=1e-6, seed=1),
        Sampling(repetition_penalty=1e6, seed=1),
    ],
)
def test_extreme_sampling_gives_tokens(decoding: Session, sampling: Sampling) -> None:
    tokens = list(generate(decoding, [1, 2, 3], max_new_tokens=10**30, sampling=sampling))
    assert len(tokens) == MAX_SEQUENCE_LENGTH - 3
    assert all(0 <= token < VOCAB_SIZE for token in tokens)


@pytest.mark.parametrize(
    "text", [None, 5, b"bytes", ["a"], "", "\ud800", 10**5000], ids=lambda text: type(text).__name__
)
def test_bad_texts(decoding: Session, text: Any) -> None:
    with pytest.raises(InputError, match="prompt: "):
        generate_text(decoding, text, max_new_tokens=1)


@pytest.mark.parametrize("stop", [None, 5, "abc", [""], [None], [b"a"], {"a": 1}])
def test_bad_stop_strings(decoding: Session, stop: Any) -> None:
    with pytest.raises(InputError, match="stop: expected a list of non-empty strings"):
        generate_text(decoding, "ab", max_new_tokens=1, stop=stop)


@pytest.mark.parametrize("memory", [5, "x", object()])
def test_what_is_no_memory(decoding: Session, memory: Any) -> None:
    with pytest.raises(InputError, match="memory: expected"):
        decoding.call([1], memory=memory)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", ""), "has no tokens"),
        (("--prompt", "a" * 1000), "at most 96 tokens, got 1000"),
        (("--prompt", "a", "--temperature", "nan"), "temperature: expected"),
        (("--prompt", "a", "--top-p", "7"), "top_p: expected|top-p"),
        (("--prompt", "a", "--stop", ""), "stop: expected"),
    ],
)
def test_generate_says_so_in_one_line(decoder_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run("generate", decoder_path, *arguments)
    assert result.exit_code in (1, 2)
    assert result.stderr.count("error: ") + result.stderr.count("Error: ") == 1
    assert any(word in result.stderr for word in words.split("|"))


def test_score_says_so_in_one_line(decoder_path: Path) -> None:
    result = run("score", decoder_path, "--text", "a" * 1000)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: input_ids: the model takes at most 96 tokens, got 1000")


def test_a_tokenizer_with_more_ids_than_the_model(make_bundle: BundleFactory) -> None:
    session = load(make_bundle(vocab_size=256), threads=1)
    with pytest.raises(TokenizerError, match=r"ids from 0 to 255 .*vocab_size is 256.*'<\|end\|>' with id 256"):
        generate_text(session, "ab", max_new_tokens=1)
    assert list(generate(session, [1], max_new_tokens=2)) == [2, 3]
