"""Continue a prompt, token by token (`generate`) or as streamed text (`generate_text`)."""

import operator
from collections.abc import Iterator, Sequence
from typing import Literal, SupportsIndex, TypeAlias

import numpy.typing as npt

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.decoding import Decoder, FullSequenceDecoder
from cosmos_runtime.errors import InputError
from cosmos_runtime.sampling import Sampling, sample
from cosmos_runtime.session import Session
from cosmos_runtime.stopping import StopFilter
from cosmos_runtime.tokenizer import TextStream, Tokenizer
from cosmos_runtime.validation import token_row

FinishReason: TypeAlias = Literal["length", "context", "stop"]


def generate(
    session: Session,
    prompt_ids: npt.ArrayLike,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> "Generation":
    """Continue the token ids (T,) of one prompt; greedily where `sampling` is None.

    Nothing is computed before the first token is asked for. A token of `stop_ids` ends the generation and is not part
    of it.

    Raises: InputError for a bad prompt, length or stop id.
    """
    manifest = session.manifest
    prompt = token_row(prompt_ids, vocab_size=manifest.vocab_size, max_sequence_length=manifest.max_sequence_length)
    return Generation(
        FullSequenceDecoder(session),
        prompt,
        max_new_tokens=_token_limit(max_new_tokens),
        max_sequence_length=manifest.max_sequence_length,
        sampling=(sampling or Sampling.greedy()).seeded(),
        stop_ids=_stop_ids(stop_ids, manifest.vocab_size),
    )


def generate_text(
    session: Session,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
) -> "TextGeneration":
    """Continue a text, as an iterator of pieces of new text; the prompt is not part of them.

    The text ends before the first of the `stop` strings.

    Raises: InputError as `generate` does, TokenizerError where the bundle has no tokenizer.
    """
    stop_filter = StopFilter(stop)
    tokenizer = session.tokenizer
    generation = generate(
        session, tokenizer.encode(prompt), max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids
    )
    return TextGeneration(generation, tokenizer, stop_filter)


class Generation(Iterator[int]):
    """An iterator of new token ids; made by `generate`.

    `prompt` holds the prompt's ids, `tokens` the new ones so far, `sampling` the options with the seed in use.
    `finish_reason` is None while running, then "stop" (a stop id came), "length" (`max_new_tokens` reached) or
    "context" (prompt and new tokens fill `max_sequence_length`).
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: TokenIds,
        *,
        max_new_tokens: int,
        max_sequence_length: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
    ) -> None:
        self.prompt: list[int] = prompt.tolist()
        self.tokens: list[int] = []
        self.sampling = sampling
        self._prompt = prompt
        self._decoder = decoder
        self._max_new_tokens = max_new_tokens
        self._max_sequence_length = max_sequence_length
        self._stop_ids = stop_ids
        self._rng = sampling.generator()
        self.finish_reason: FinishReason | None = self._limit_reached()

    def __next__(self) -> int:
        if self.finish_reason is not None:
            raise StopIteration
        token = sample(self._next_logits(), self.prompt + self.tokens, self.sampling, self._rng)
        if token in self._stop_ids:
            self.stop()
            raise StopIteration
        self.tokens.append(token)
        self.finish_reason = self._limit_reached()
        return token

    def stop(self) -> None:
        """End here, for a reason that the caller found."""
        self.finish_reason = "stop"

    def _next_logits(self) -> Floats:
        return self._decoder.decode_one_token(self.tokens[-1]) if self.tokens else self._decoder.prefill(self._prompt)

    def _limit_reached(self) -> FinishReason | None:
        if len(self.tokens) >= self._max_new_tokens:
            return "length"
        if len(self.prompt) + len(self.tokens) >= self._max_sequence_length:
            return "context"
        return None


class TextGeneration(Iterator[str]):
    """An iterator of pieces of new text; made by `generate_text`.

    No piece is empty or ends inside a character, and text that might begin a stop string is held back until it is
    known not to. `tokens` counts every token that was generated, also those of a stop string that was cut.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, stop_filter: StopFilter) -> None:
        self.generation = generation
        self.text = ""
        self._stream = TextStream(tokenizer)
        self._stop_filter = stop_filter
        self._pieces = self._run()

    @property
    def tokens(self) -> list[int]:
        """The new token ids so far."""
        return self.generation.tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """As in `Generation`; "stop" also for a stop string."""
        return self.generation.finish_reason

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def _run(self) -> Iterator[str]:
        for token in self.generation:
            yield from self._filtered(self._stream.push(token))
        yield from self._filtered(self._stream.finish())
        if rest := self._stop_filter.finish():
            yield rest

    def _filtered(self, text: str) -> Iterator[str]:
        piece = self._stop_filter.push(text)
        if self._stop_filter.matched:
            self.generation.stop()
        if piece:
            yield piece


def _token_limit(max_new_tokens: SupportsIndex) -> int:
    try:
        limit = operator.index(max_new_tokens)
    except TypeError:
        limit = 0
    if limit < 1 or isinstance(max_new_tokens, bool):
        raise InputError(f"max_new_tokens: expected a positive integer, got {max_new_tokens!r}")
    return limit


def _stop_ids(stop_ids: Sequence[int], vocab_size: int) -> frozenset[int]:
    for token in stop_ids:
        if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < vocab_size:
            raise InputError(f"stop_ids: expected token ids from 0 to {vocab_size - 1}, got {token!r}")
    return frozenset(int(token) for token in stop_ids)
