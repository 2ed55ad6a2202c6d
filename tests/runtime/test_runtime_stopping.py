"""The stop filter: the same text however it falls into pieces."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_runtime import InputError
from cosmos_runtime.stopping import StopFilter


def filtered(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    stop_filter = StopFilter(stop)
    text = "".join(stop_filter.push(piece) for piece in pieces) + stop_filter.finish()
    return text, stop_filter.matched


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_do_not_matter(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    shown, matched = filtered(pieces, stop)
    assert (shown, matched) == filtered(list(text), stop)
    assert text.startswith(shown)
    assert matched == any(string in text for string in stop)
    assert not any(string in shown for string in stop)
    assert matched or shown == text


def test_held_back_until_it_is_no_stop_string() -> None:
    stop_filter = StopFilter(["<end>"])
    assert stop_filter.push("a<e") == "a"
    assert stop_filter.push("n") == ""
    assert stop_filter.push("x<") == "<enx"
    assert stop_filter.finish() == "<"
    assert not stop_filter.matched


def test_nothing_comes_after_a_match() -> None:
    stop_filter = StopFilter(["b"])
    assert stop_filter.push("abc") == "a"
    assert stop_filter.push("d") == ""
    assert stop_filter.finish() == ""


@pytest.mark.parametrize("stop", [[""], "text", ["a", ""], [1]])
def test_bad_stop_strings(stop: Any) -> None:
    with pytest.raises(InputError, match="stop: expected a list of non-empty strings"):
        StopFilter(stop)
