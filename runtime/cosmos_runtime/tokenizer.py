"""Text to token ids and back, by the `tokenizers` library (imported on first use)."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cosmos_runtime.errors import InputError, TokenizerError

if TYPE_CHECKING:
    import tokenizers

# What decoding puts in place of bytes that are not (or not yet) UTF-8.
REPLACEMENT = "\ufffd"


class Tokenizer:
    """A tokenizer read from `tokenizer.json`."""

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        self._backend = backend

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read `tokenizer.json`. Truncation and padding set in it are switched off: a prompt is never cut silently.

        Raises: TokenizerError where the file or the `tokenizers` library cannot be used.
        """
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise TokenizerError(
                "text needs the tokenizers library; install it with: pip install tokenizers"
            ) from error
        try:
            backend = Backend.from_file(os.fspath(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{os.fspath(path)}: not a tokenizer: {error}; export the bundle again") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer adds. Raises: InputError for no tokens."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"prompt: not valid Unicode text: {error}") from error
        ids = list(self._backend.encode(text).ids)
        if not ids:
            raise InputError(f"prompt: expected text, got {text!r}, which has no tokens; give at least one word")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))


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
