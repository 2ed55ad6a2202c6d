"""Text to token ids and back, by the `tokenizers` library (imported on first use)."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_runtime.errors import CosmosRuntimeError, InputError, TokenizerError, first_line
from cosmos_runtime.quoting import quoted

if TYPE_CHECKING:
    import tokenizers

# What decoding puts in place of bytes that are not (or not yet) UTF-8.
REPLACEMENT = "\ufffd"

# The largest published ones are half of it, with 256,000 tokens.
LARGEST_FILE = 64 << 20
_CURE = "put the tokenizer that the model was trained with in its place and export again"


class Tokenizer:
    """A tokenizer read from `tokenizer.json`."""

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        self._backend = backend

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, vocab_size: int | None = None) -> "Tokenizer":
        """Read `tokenizer.json`. Truncation and padding set in it are switched off: a prompt is never cut silently.

        With a model's `vocab_size`, every id of the tokenizer must be one that the model has an embedding for.

        Raises: TokenizerError where the file or the `tokenizers` library cannot be used, or an id is beyond the model.
        """
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise TokenizerError(
                "text needs the tokenizers library; install it with: pip install tokenizers"
            ) from error
        place = os.fspath(path)
        _check_size(place)
        with _typed_errors(TokenizerError, f"{place}: not a tokenizer", _CURE):
            backend = Backend.from_file(place)
            backend.no_truncation()
            backend.no_padding()
        tokenizer = cls(backend)
        if vocab_size is not None:
            tokenizer._check_ids(place, vocab_size)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer adds.

        Raises: InputError for what is no text or has no tokens, TokenizerError where the tokenizer fails at it.
        """
        if not isinstance(text, str):
            raise InputError(f"prompt: expected text, got {quoted(text)}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"prompt: not valid Unicode text: {first_line(error)}") from error
        ids = self._encode(text)
        if not ids:
            raise InputError(f"prompt: expected text, got {quoted(text)}, which has no tokens; give at least one word")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        with _typed_errors(TokenizerError, "the tokenizer cannot decode these tokens", _CURE):
            return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def _encode(self, text: str) -> list[int]:
        with _typed_errors(TokenizerError, "the tokenizer cannot encode this text", _CURE):
            return list(self._backend.encode(text).ids)

    def _check_ids(self, place: str, vocab_size: int) -> None:
        """Tokens, and what a post-processor puts around any text: its ids stand in the file a second time."""
        with _typed_errors(TokenizerError, f"{place}: not a tokenizer", _CURE):
            known = self._backend.get_vocab(with_added_tokens=True)
        added = ((f"id {token} (put around every text)", token) for token in self._encode(""))
        named = ((f"token {quoted(name)} with id {token}", token) for name, token in known.items())
        for what, token in (*named, *added):
            if token >= vocab_size:
                raise TokenizerError(
                    f"{place}: expected ids from 0 to {vocab_size - 1} (the model's vocab_size is {vocab_size}), got "
                    f"{what}; {_CURE}"
                )


def _check_size(place: str) -> None:
    """Before the library reads it: it would wait for a pipe, and take any size."""
    path = Path(place)
    if not path.is_file():
        raise TokenizerError(f"{place}: expected a tokenizer.json, got {'no file' if path.exists() else 'nothing'}")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise TokenizerError(f"{place}: expected at most {LARGEST_FILE} bytes, got {size}; {_CURE}")


@contextlib.contextmanager
def _typed_errors(kind: type[CosmosRuntimeError], what: str, cure: str) -> Iterator[None]:
    """The library raises plain Exception; and where its Rust code panics, what is not even that."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}; {cure}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # KeyboardInterrupt and the like
            raise
        raise kind(f"{what}: it fails inside: {first_line(error)}; {cure}") from error


class TextStream:
    """Decode token ids one at a time into pieces of text that never end inside a character.

    The pieces joined are what decoding all ids at once gives. Decoders treat the first token of a text in their own
    way (dropping its leading space, for one), so each token is decoded behind the tokens of the piece before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is still incomplete."""
        self._pending.append(token_id)
        piece = self._piece()
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def finish(self) -> str:
        """What was held back, with U+FFFD for a character that never became complete."""
        piece = self._piece()
        self._context, self._pending = self._pending, []
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]
