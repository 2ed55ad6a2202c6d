"""The tokenizer wrapper, and streams that never show half a character."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from cosmos_runtime import InputError, TextStream, Tokenizer, TokenizerError, load
from cosmos_runtime.tokenizer import REPLACEMENT

from .tiny_bundles import END, BundleFactory, byte_tokenizer

BYTES = Tokenizer(byte_tokenizer())


def fallback_tokenizer() -> Tokenizer:
    """Tokens <0x00> to <0xFF> and two words, decoded in the SentencePiece manner."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hello": 256, "▁world": 257}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    text = TextStream(tokenizer)
    return [*(text.push(token) for token in ids), text.finish()]


@given(st.text(min_size=1).filter(lambda text: END not in text))
def test_encode_decode(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text


@given(st.text(min_size=1).filter(lambda text: END not in text and REPLACEMENT not in text))
def test_pieces_end_between_characters(text: str) -> None:
    pieces = stream(BYTES, BYTES.encode(text))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.lists(st.integers(0, 256), max_size=30))
def test_any_bytes_stream_as_they_decode(ids: list[int]) -> None:
    assert "".join(stream(BYTES, ids)) == BYTES.decode(ids)


def test_character_of_four_tokens_comes_with_the_last() -> None:
    assert stream(BYTES, BYTES.encode("a😀b")) == ["a", "", "", "", "😀", "b", ""]


def test_incomplete_character_at_the_end() -> None:
    assert stream(BYTES, BYTES.encode("a😀")[:-1])[-1] == REPLACEMENT


@given(st.lists(st.sampled_from(["hello", "world", "é", "€", "😀"]), min_size=1, max_size=8))
def test_byte_fallback_and_leading_spaces(words: list[str]) -> None:
    tokenizer = fallback_tokenizer()
    known = {"hello": [256], "world": [257]}
    ids = [token for word in words for token in known.get(word, list(word.encode()))]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_special_tokens_have_no_text() -> None:
    assert BYTES.decode([*BYTES.encode("a"), 256]) == "a"
    assert BYTES.vocab_size == 257


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_file(tmp_path / "tokenizer.json").encode("abcd")) == 4


@pytest.mark.parametrize(("text", "message"), [("", "has no tokens"), ("\ud800", "not valid Unicode")])
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BYTES.encode(text)


def test_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_bundle_without_tokenizer(make_bundle: BundleFactory) -> None:
    session = load(make_bundle(tokenizer=False), threads=1)
    with pytest.raises(TokenizerError, match="give token ids"):
        _ = session.tokenizer
