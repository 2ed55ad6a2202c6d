"""Continue a prompt, token by token (`generate`) or as streamed text (`generate_text`)."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.binding import HOST
from cosmos_runtime.continuation import Continuation, FinishReason, Limits
from cosmos_runtime.decoding import Decoder, new_decoder
from cosmos_runtime.device_loop import DeviceLoop, DeviceLoops
from cosmos_runtime.errors import CosmosRuntimeError, InputError
from cosmos_runtime.heads import has_heads
from cosmos_runtime.lookup import SpeculatingDecoder
from cosmos_runtime.sampling import Sampling
from cosmos_runtime.session import Session
from cosmos_runtime.steps import Steps
from cosmos_runtime.stopping import StopFilter
from cosmos_runtime.tokenizer import TextStream, Tokenizer
from cosmos_runtime.validation import token_count, token_row


def generate(
    session: Session,
    prompt_ids: npt.ArrayLike,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    speculate: int = 0,
    device_loop: bool | None = None,
    diagnostics: bool = False,
) -> "Generation":
    """Continue the token ids (T,) of one prompt; greedily where `sampling` is None.

    Nothing is computed or allocated before the first token is asked for. A token of `stop_ids` ends the generation and
    is not part of it; before `min_new_tokens` it is not chosen. With `speculate`, up to so many tokens are guessed from
    what came before and checked in one run: the same tokens, sooner where a text repeats itself or its prompt (see
    `SpeculatingDecoder`).
    `device_loop` says whether tokens are chosen on the device, without asking the host at each (see `device_loop`):
    by default on devices other than the CPU, as far as the bundle can.
    A model with capability heads ends where it blocks its output (finish reason "blocked"); with `diagnostics`, what
    they report of each token's call is kept in `Generation.diagnostics`.

    Raises: InputError for a bad prompt, length or stop id, for speculation without greedy sampling or with capability
    heads, or where `device_loop` or `diagnostics` are wanted and the bundle cannot.
    """
    continuation = new_continuation(
        session,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        diagnostics=diagnostics,
    )
    most = token_count("speculate", speculate, minimum=0)
    if most and not continuation.sampling.is_greedy:
        raise InputError(
            f"speculate: expected greedy sampling, got temperature {continuation.sampling.temperature}; "
            f"use temperature 0, or speculate=0"
        )
    if most and has_heads(session.manifest):
        raise InputError(
            "speculate: expected a plain decoder: capability heads count and remember every run of the model, so none "
            "can be tried out; use speculate=0"
        )

    if loops := loops_for(session, [continuation], device_loop, speculate=bool(most)):
        return DeviceGeneration(continuation, loops)

    def start() -> Decoder:
        decoder = new_decoder(
            session, continuation.capacity, continuation.most_calls, diagnostics=continuation.wants_diagnostics
        )
        return SpeculatingDecoder(decoder, most, continuation.capacity) if most else decoder

    return Generation(continuation, start)


def generate_text(
    session: Session,
    prompt: str,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    speculate: int = 0,
    device_loop: bool | None = None,
    diagnostics: bool = False,
) -> "TextGeneration":
    """Continue a text, as an iterator of pieces of new text; the prompt is not part of them.

    The text ends before the first of the `stop` strings.

    Raises: InputError as `generate` does, TokenizerError where the bundle has no tokenizer.
    """
    stop_filter = StopFilter(stop)
    tokenizer = session.tokenizer
    generation = generate(
        session,
        tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        speculate=speculate,
        device_loop=device_loop,
        diagnostics=diagnostics,
    )
    return TextGeneration(generation, tokenizer, stop_filter)


def loops_for(
    session: Session, rows: Sequence[Continuation], wanted: bool | None, *, speculate: bool = False
) -> DeviceLoops | None:
    """The session's device loops where these rows are to be continued by them.

    Raises: InputError where that is wanted and cannot be.
    """
    loops = session.device_loops if wanted or (wanted is None and session.provider != HOST) else None
    serves = loops is not None and not speculate and loops.sampler(rows) is not None
    if wanted and not serves:
        wants = _what_a_loop_wants(session, loops, speculate=speculate)
        raise InputError(f"device_loop: expected {wants}; use device_loop=False")
    return loops if serves else None


def _what_a_loop_wants(session: Session, loops: DeviceLoops | None, *, speculate: bool) -> str:
    """The first thing that keeps a device loop from continuing some rows."""
    if has_heads(session.manifest):
        return "a plain decoder: every token of a model with capability heads is a call of its own, chosen on the host"
    if loops is None:
        return f"a bundle of a recipe with a device loop, such as cuda-fp16, got {session.manifest.recipe['name']!r}"
    if speculate:
        return "no speculation, whose drafts the host makes"
    return (
        "a bundle with samplers that can choose so; export it again with this version, whose samplers can do all but "
        "stop ids that are the whole vocabulary"
    )


def new_continuation(
    session: Session,
    prompt_ids: npt.ArrayLike,
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    sampling: Sampling | None,
    stop_ids: Sequence[int],
    diagnostics: bool = False,
) -> Continuation:
    """A prompt that a session's model can continue. Raises: InputError."""
    manifest = session.manifest
    if diagnostics and not has_heads(manifest):
        raise InputError(
            f"diagnostics: {manifest.name} is a plain decoder and has none; export the model with --capabilities"
        )
    limits = Limits.checked(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        max_sequence_length=manifest.max_sequence_length,
        stop_ids=stop_ids,
        vocab_size=manifest.vocab_size,
    )
    prompt = token_row(prompt_ids, vocab_size=manifest.vocab_size, max_sequence_length=manifest.max_sequence_length)
    return Continuation(prompt, limits, Sampling.or_greedy(sampling), diagnostics=diagnostics)


class Generation(Steps[int]):
    """An iterator of new token ids; made by `generate`.

    `prompt`, `tokens`, `sampling`, `finish_reason` and `diagnostics` are those of `Continuation`. The cache lives from
    the first token to the end, to `close`, or to an error, after which no token comes. Threads that share an iterator
    get its tokens one after another, each token once.
    """

    def __init__(self, continuation: Continuation, start: Callable[[], Decoder]) -> None:
        super().__init__()
        self._continuation = continuation
        self._start = start
        self._decoder: Decoder | None = None

    @property
    def prompt(self) -> list[int]:
        """The prompt's token ids."""
        return self._continuation.prompt

    @property
    def tokens(self) -> list[int]:
        """The new token ids so far."""
        return self._continuation.tokens

    @property
    def sampling(self) -> Sampling:
        """The options, with the seed in use."""
        return self._continuation.sampling

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        return self._continuation.finish_reason

    @property
    def diagnostics(self) -> list[dict[str, Any]]:
        """What capability heads reported of each call, where that was wanted; the last one's is that of the newest
        token, or of what ended the answer."""
        return self._continuation.diagnostics

    def stop(self) -> None:
        """End here, for a reason that the caller found. May be called from another thread: a step that is being
        computed is given up where that is possible."""
        self._continuation.stop()
        if (decoder := self._decoder) is not None:
            decoder.cancel()

    def close(self) -> None:
        """End, and free the cache: now, or when the step that another thread is taking is given up."""
        self.stop()
        self._end()

    def _step(self) -> int:
        logits = None if self.finish_reason else self._next_logits()
        token = None if logits is None else self._continuation.choose(logits)
        if token is None:
            raise StopIteration
        return token

    def _is_last(self) -> bool:
        return self.finish_reason is not None

    def _free(self) -> None:
        self._decoder = None

    def _next_logits(self) -> Floats | None:
        """Logits (V,) of the next position; None where `stop` cancelled them, or the model withheld them."""
        begun = self._decoder
        try:
            decoder = begun or self._begin()
            logits = decoder.decode_one_token(self.tokens[-1]) if begun else decoder.prefill(self._prompt_ids)
        except CosmosRuntimeError:
            if self.finish_reason is None:
                raise
            return None
        self._continuation.examine(decoder.diagnosis)
        return None if self.finish_reason else logits

    def _begin(self) -> Decoder:
        decoder = self._decoder = self._start()
        if self.finish_reason is not None:  # `stop` came in before there was anything to cancel
            decoder.cancel()
        return decoder

    @property
    def _prompt_ids(self) -> TokenIds:
        return self._continuation.prompt_ids


class DeviceGeneration(Generation):
    """A generation whose tokens a device loop chooses; the buffers are given back at its end, or by `close`."""

    def __init__(self, continuation: Continuation, loops: DeviceLoops) -> None:
        super().__init__(continuation, _no_decoder)
        self._loops: DeviceLoops | None = loops
        self._loop: DeviceLoop | None = None
        self._steps: Iterator[npt.NDArray[np.int64]] | None = None

    def _step(self) -> int:
        token = None if self.finish_reason else self._continuation.keep(self._next_token())
        if token is None:
            raise StopIteration
        return token

    def _next_token(self) -> int:
        if self._steps is None:
            if self._loops is None:
                raise StopIteration
            self._loop = self._loops.start([self._continuation])
            self._steps = self._loop.steps()
        return int(next(self._steps)[0])

    def _free(self) -> None:
        if self._loop is not None:
            self._loop.close()
        self._loop = self._steps = self._loops = None


def _no_decoder() -> Decoder:
    raise AssertionError("a device loop needs no decoder")


class TextGeneration(Iterator[str]):
    """An iterator of pieces of new text; made by `generate_text`.

    No piece is empty or ends inside a character, and text that might begin a stop string is held back until it is
    known not to. `tokens` counts every token that was generated, also those of a stop string that was cut.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, stop_filter: StopFilter) -> None:
        self.generation = generation
        self.text = ""
        self._pieces = _pieces_of(generation, TextStream(tokenizer), stop_filter)
        self._turn = threading.Lock()

    @property
    def tokens(self) -> list[int]:
        """The new token ids so far."""
        return self.generation.tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """As in `Generation`; "stop" also for a stop string."""
        return self.generation.finish_reason

    @property
    def diagnostics(self) -> list[dict[str, Any]]:
        """As in `Generation`."""
        return self.generation.diagnostics

    def stop(self) -> None:
        """As in `Generation`; what is held back still comes."""
        self.generation.stop()

    def close(self) -> None:
        """End, and free the cache."""
        self.generation.close()

    def __next__(self) -> str:
        with self._turn:
            piece = next(self._pieces)
            self.text += piece
        return piece


# No methods of `TextGeneration`: a suspended generator that keeps it would keep itself, and the cache, after both are
# dropped, until the garbage collector comes.
def _pieces_of(generation: Generation, stream: TextStream, stop_filter: StopFilter) -> Iterator[str]:
    for token in generation:
        yield from _filtered(generation, stop_filter, stream.push(token))
    yield from _filtered(generation, stop_filter, stream.finish())
    if rest := stop_filter.finish():
        yield rest


def _filtered(generation: Generation, stop_filter: StopFilter, text: str) -> Iterator[str]:
    piece = stop_filter.push(text)
    if stop_filter.matched:
        generation.stop()
    if piece:
        yield piece
