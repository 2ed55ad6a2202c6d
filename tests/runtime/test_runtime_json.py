"""JSON read strictly, and values that are wrong quoted without doing harm."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_runtime import BundleError, Manifest, quoted, strict_json
from cosmos_runtime.json_fields import DEEPEST_NESTING, parse_object

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
VALUES = st.recursive(SCALARS | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20)


@given(VALUES)
def test_what_python_writes_is_read(value: Any) -> None:
    assert strict_json(json.dumps(value)) == value
    assert strict_json(json.dumps(value, ensure_ascii=False)) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
        ('[{"": 1, "": 1}]', "key '' is given twice"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("[1e999]", "1e999 is beyond the range of float64"),
        ("[1" + "0" * 5000 + ".0]", "beyond the range"),
        ("[" + "9" * 5000 + "]", "4300 digits"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        ("[" * (DEEPEST_NESTING + 1) + "]" * (DEEPEST_NESTING + 1), "nested deeper than 64 levels"),
        ("[" * 10**6, "nested deeper than 64 levels"),
        ('{"a":' * 10**5, "nested deeper than 64 levels"),
        ("\ufeff{}", "BOM"),
        ("", "Expecting value"),
    ],
)
def test_what_readers_could_understand_in_two_ways_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        strict_json(text)
    assert len(str(caught.value)) < 300
    with pytest.raises(BundleError, match=f"x.json: not valid JSON: .*{words}"):
        parse_object(text, "x.json")


def test_pairs_of_surrogates_are_a_character() -> None:
    assert strict_json('["\\ud83d\\ude00"]') == ["😀"]


def test_the_deepest_nesting_is_read() -> None:
    text = "[" * DEEPEST_NESTING + "]" * DEEPEST_NESTING
    assert json.dumps(strict_json(text)) == text


def test_numbers_as_python_has_them() -> None:
    assert strict_json("[Infinity, 1e999]", allow_nan=True) == [float("inf")] * 2
    with pytest.raises(ValueError, match="twice"):
        strict_json('{"a": NaN, "a": 1}', allow_nan=True)


class Nameless:
    def __repr__(self) -> str:
        raise RuntimeError("no name")


def test_quotes_are_short_and_never_fail() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted("a") == "'a'"
    assert quoted("a" * 100) == "'" + "a" * 79 + "..."
    assert quoted(10**5000) == "<int of 16610 bits>"
    assert quoted(Nameless()) == "<Nameless of unknown content>"
    assert len(quoted(deep)) < 100


HEADS = {
    "reasoning": {"mode": "reflexion", "extended": False, "thoughts": 5, "branches": 3},
    "memory": {"episodes": True},
    "safety": {"level": "high", "checks": ["content_filtering"]},
    "evaluation": {"rounds": 2, "checks": ["quality_scoring"], "confidence_threshold": 0.8},
}


@pytest.mark.parametrize(
    ("group", "key", "value", "words"),
    [
        ("reasoning", "mode", [], "the name of a mode"),
        ("reasoning", "extended", 1, "true or false"),
        ("reasoning", "thoughts", 10**6, "an integer, at most 256"),
        ("reasoning", "branches", 0, "an integer, at least 1"),
        ("memory", "episodes", None, "true or false"),
        ("safety", "level", "highest", "one of low, medium, high, strict"),
        ("safety", "checks", "content_filtering", "a list of some of content_filtering"),
        ("safety", "checks", [["content_filtering"]], "a list of some of content_filtering"),
        ("evaluation", "rounds", 2.0, "an integer"),
        ("evaluation", "checks", ["none"], "a list of some of confidence_estimation"),
        ("evaluation", "confidence_threshold", "0.8", "a number from 0 to 1"),
        ("evaluation", "confidence_threshold", 2, "a number from 0 to 1"),
    ],
)
def test_settings_of_heads_are_checked(document: dict[str, Any], group: str, key: str, value: Any, words: str) -> None:
    document["capabilities"] = {"names": list(HEADS), "settings": HEADS, "memory": {"size": 8, "least": 5}}
    Manifest.from_json(json.dumps(document))
    document["capabilities"]["settings"] = {**HEADS, group: {**HEADS[group], key: value}}
    with pytest.raises(BundleError, match=rf"capabilities\.settings\.{group}\.{key}: expected {words}"):
        Manifest.from_json(json.dumps(document))
    del document["capabilities"]["settings"][group][key]
    with pytest.raises(BundleError, match=rf"capabilities\.settings\.{group}\.{key}: missing"):
        Manifest.from_json(json.dumps(document))


@pytest.mark.parametrize("key", ["vocab_size", "max_sequence_length"])
def test_sizes_beyond_any_model_are_refused(document: dict[str, Any], key: str) -> None:
    document["model"][key] = 2**24 + 1
    with pytest.raises(BundleError, match=rf"model\.{key}: expected an integer, at most"):
        Manifest.from_json(json.dumps(document))
    document["model"][key] = 2**64
    with pytest.raises(BundleError, match=rf"model\.{key}: expected an integer, at most"):
        Manifest.from_json(json.dumps(document))
