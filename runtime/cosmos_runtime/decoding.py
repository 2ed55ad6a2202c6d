"""How the logits of the next position are computed, kept apart from what is done with them.

Arrays of logits that a decoder returns are valid until its next call.
"""

import time
from typing import Protocol

import numpy as np

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.decoder_graph import Appender, DecoderGraph, Stepper, chunks
from cosmos_runtime.errors import InputError
from cosmos_runtime.heads import Diagnosis, MemoryBank, has_heads
from cosmos_runtime.session import Session


class Decoder(Protocol):
    """Computes next-position logits for one sequence of `length` tokens, starting with none.

    What a decoder holds is freed with it.
    """

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        ...

    @property
    def graph_seconds(self) -> float:
        """Time spent inside the graph so far; what remains of a step is the host's."""
        ...

    @property
    def diagnosis(self) -> Diagnosis | None:
        """What capability heads found in the last call, valid until the next one; None where there are none."""
        ...

    def prefill(self, ids: TokenIds) -> Floats:
        """Append tokens (T,), usually a prompt; logits (V,) of the position after the last of them."""
        ...

    def decode_one_token(self, token_id: int) -> Floats:
        """Append one token; logits (V,) of the position after it."""
        ...

    def cancel(self) -> None:
        """Make the computation in progress fail where that is possible; may be called from another thread."""
        ...


class RewindingDecoder(Decoder, Protocol):
    """A decoder that can also try tokens out, and be closed before it is gone."""

    def decode(self, ids: TokenIds) -> Floats:
        """Append tokens (T,); logits (T, V) of the position after each of them."""
        ...

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`. Raises: InputError for more than there are."""
        ...

    def close(self) -> None:
        """Free what the decoder holds; it cannot be used any more."""
        ...


def new_decoder(
    session: Session, capacity: int, calls: int | None = None, *, diagnostics: bool = True
) -> RewindingDecoder:
    """The fastest decoder that a session's bundle allows, for up to `capacity` tokens.

    With capability heads, each `prefill`, `decode_one_token` and `decode` is a call of the model; room is made for
    `calls` of them, or for one a token. Without `diagnostics` a call is faster, and of what the heads found its
    `Diagnosis` knows only whether the output is blocked.
    """
    if isinstance(session.graph, DecoderGraph):
        return CachedDecoder(session.graph, capacity, calls or capacity, diagnostics=diagnostics)
    return FullSequenceDecoder(session, calls or capacity)


class FullSequenceDecoder:
    """Runs the whole sequence again for every token: right for any bundle, at a cost that grows with the length."""

    def __init__(self, session: Session, calls: int | None = None) -> None:
        self._session = session
        self._ids: TokenIds = np.empty(0, dtype=np.int64)
        self._memory = session.new_memory(1, calls) if has_heads(session.manifest) else None
        self.diagnosis: Diagnosis | None = None
        self.graph_seconds = 0.0

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return len(self._ids)

    def prefill(self, ids: TokenIds) -> Floats:
        """Append tokens (T,); logits (V,) of the position after the last of them."""
        logits: Floats = self.decode(ids)[-1]
        return logits

    def decode_one_token(self, token_id: int) -> Floats:
        """Append one token; logits (V,) of the position after it."""
        return self.prefill(np.array([token_id]))

    def decode(self, ids: TokenIds) -> Floats:
        """Append tokens (T,); logits (T, V) of the position after each of them."""
        self._ids = np.append(self._ids, ids)
        start = time.perf_counter()
        logits: Floats = self._logits()[0, -len(ids) :]
        self.graph_seconds += time.perf_counter() - start
        return logits

    def _logits(self) -> Floats:
        if self._memory is None:
            return self._session.logits(self._ids)
        logits, diagnoses = self._session.call(self._ids, memory=self._memory)
        self.diagnosis = diagnoses[0]
        return logits

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`. Raises: InputError with capability heads, which do not."""
        _check_rewind(length, self.length)
        _check_forgets(self._memory)
        self._ids = self._ids[:length]

    def cancel(self) -> None:
        """A run in progress comes to its end."""

    def close(self) -> None:
        """There is nothing to free."""


class CachedDecoder:
    """Computes new tokens only; the keys and values of the ones before lie in a cache for `capacity` tokens."""

    def __init__(
        self, graph: DecoderGraph, capacity: int, calls: int | None = None, *, diagnostics: bool = True
    ) -> None:
        self._graph = graph
        cache, self._bank = graph.new_cache(1, capacity), graph.new_memory(1, calls)
        self.length, self.capacity = 0, cache.length
        self._appender = Appender(graph, cache, bank=self._bank, diagnostics=diagnostics)
        self._stepper = Stepper(graph, cache, self._bank, diagnostics=diagnostics)
        self.diagnosis: Diagnosis | None = None

    @property
    def graph_seconds(self) -> float:
        """Time spent inside ONNX Runtime so far."""
        return self._appender.binding.graph_seconds + self._stepper.binding.graph_seconds

    def prefill(self, ids: TokenIds) -> Floats:
        """Append tokens (T,); logits (V,) of the position after the last of them. Long ones go in chunks."""
        logits = self._graph.new_logits(1, 1)
        for part in chunks(len(ids)):
            self._append(ids[part], logits, ends_call=part.stop == len(ids))
        last: Floats = logits[0, 0]
        return last

    def decode_one_token(self, token_id: int) -> Floats:
        """Append one token; logits (V,) of the position after it."""
        _check_room(self.length + 1, self.capacity)
        logits: Floats = self._stepper.step(token_id, self.length + 1)[0]
        self.length += 1
        self.diagnosis = self._stepper.diagnosis()
        return logits

    def decode(self, ids: TokenIds) -> Floats:
        """Append tokens (T,); logits (T, V) of the position after each of them."""
        logits = self._graph.new_logits(1, len(ids))
        for part in chunks(len(ids)):
            self._append(ids[part], logits[:, part], ends_call=part.stop == len(ids))
        if self.diagnosis is not None and self.diagnosis.blocked:  # pieces before the last one did not know
            logits[:] = 0
        return logits[0]

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`: the mask ends there, and new tokens overwrite the old.

        Raises: InputError with capability heads, too, which do not forget a call.
        """
        _check_rewind(length, self.length)
        _check_forgets(self._bank)
        self.length = length

    def cancel(self) -> None:
        """Make the run in progress and every later one fail."""
        self._appender.binding.cancel()
        self._stepper.binding.cancel()

    def close(self) -> None:
        """Free the cache."""
        self.capacity = 0
        for part in ("_appender", "_stepper"):
            vars(self).pop(part, None)

    def _append(self, ids: TokenIds, logits: Floats, *, ends_call: bool) -> None:
        _check_room(self.length + len(ids), self.capacity)
        self._appender.append(ids[None], self.length, logits, ends_call=ends_call)
        self.length += len(ids)
        self.diagnosis = next(iter(self._appender.diagnoses), None)


def _check_room(tokens: int, capacity: int) -> None:
    if tokens > capacity:
        raise InputError(f"decoder: expected at most {capacity} tokens in all, got {tokens}; ask for a larger capacity")


def _check_forgets(bank: MemoryBank | None) -> None:
    if bank is not None:
        raise InputError("rewind: expected a plain decoder; capability heads do not forget a call: begin a new decoder")


def _check_rewind(length: int, tokens: int) -> None:
    if not 0 <= length <= tokens:
        raise InputError(f"rewind: expected a length from 0 to the {tokens} tokens there are, got {length}")
