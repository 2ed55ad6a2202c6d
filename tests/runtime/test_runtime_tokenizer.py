"""The tokenizer wrapper, and streams that never show half a character."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from cosmos_runtime import InputError, TextStream, Tokenizer, TokenizerError, load
from cosmos_runtime.tokenizer import LARGEST_FILE, REPLACEMENT

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


def write(path: Path, **changes: Any) -> Path:
    """The byte tokenizer (ids 0 to 256), with some parts of its JSON replaced."""
    path.write_text(json.dumps({**json.loads(byte_tokenizer().to_str()), **changes}), encoding="utf-8")
    return path


def around(ids: list[int]) -> dict[str, Any]:
    """A post-processor that puts a token of these ids before every text."""
    single = [{"SpecialToken": {"id": "[S]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"[S]": {"id": "[S]", "ids": ids, "tokens": ["[S]"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def words(**ids: int) -> dict[str, Any]:
    return {"type": "WordLevel", "vocab": ids, "unk_token": "no such token"}


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        ({}, 256, r"expected ids from 0 to 255 \(.*vocab_size is 256\), got token '<\|end\|>' with id 256; put"),
        ({"model": words(a=0, b=4_000_000_000), "added_tokens": []}, 257, "got token 'b' with id 4000000000"),
        ({"post_processor": around([257])}, 257, r"got id 257 \(put around every text\)"),
        ({"post_processor": around([0, 1, 2**32 - 1])}, 257, "got id 4294967295"),
    ],
    ids=["special token", "token", "put around", "one of several put around"],
)
def test_ids_beyond_the_model(tmp_path: Path, changes: dict[str, Any], vocab_size: int, message: str) -> None:
    path = write(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(path, vocab_size=vocab_size)
    Tokenizer.from_file(path)  # without a model, there is nothing to fit


def test_a_model_may_know_more_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "tokenizer.json", post_processor=around([256]))
    assert Tokenizer.from_file(path, vocab_size=257).encode("a") == [256, BYTES.encode("a")[0]]
    assert Tokenizer.from_file(path, vocab_size=4096).vocab_size == 257


def test_text_that_the_tokenizer_fails_at(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(write(tmp_path / "tokenizer.json", model=words(a=0)), vocab_size=257)
    with pytest.raises(TokenizerError, match="cannot encode this text: .*Missing"):
        tokenizer.encode("b")
    with pytest.raises(TokenizerError, match="cannot decode these tokens"):
        tokenizer.decode([2**40])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"model": ' + b"9" * 400])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="not a tokenizer: "):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_places_that_hold_no_tokenizer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", LARGEST_FILE + 1)
    for name, message in (("pipe", "got no file"), ("missing", "got nothing"), ("large", "at most 67108864 bytes")):
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_file(tmp_path / name)


class PanicException(BaseException):
    """As the one that the library raises where its Rust code panics, which is no Exception."""


class Panics:
    def encode(self, text: str) -> None:
        raise PanicException("index out of bounds: the len is 3\nnote: run with RUST_BACKTRACE=1")

    decode = encode


def test_a_panic_is_an_error_like_others() -> None:
    with pytest.raises(TokenizerError, match="it fails inside: index out of bounds: the len is 3; put"):
        Tokenizer(Panics()).encode("a")


def test_an_interrupt_stays_one() -> None:
    class Interrupted(Panics):
        def encode(self, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tokenizer(Interrupted()).encode("a")


def test_bundle_without_tokenizer(make_bundle: BundleFactory) -> None:
    session = load(make_bundle(tokenizer=False), threads=1)
    with pytest.raises(TokenizerError, match="give token ids"):
        _ = session.tokenizer
