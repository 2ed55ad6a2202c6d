"""How the logits of the next positions are computed for several sequences at once.

B  batch    n  rows that go on    T  a prompt's tokens    V  vocabulary
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.decoder_graph import Appender, DecoderGraph, Stepper, chunks
from cosmos_runtime.decoding import FullSequenceDecoder
from cosmos_runtime.heads import Diagnosis
from cosmos_runtime.session import Session


class BatchDecoder(Protocol):
    """Computes next-position logits for B sequences of any lengths. What it holds is freed with it."""

    def prefill(self, row: int, ids: TokenIds) -> Floats:
        """Start a row with its prompt (T,); logits (V,) of the position after it."""
        ...

    def decode(self, rows: Sequence[int], tokens: Sequence[int]) -> Floats:
        """Append one token to each of some rows; logits (n, V) of the positions after them. A row left out is over."""
        ...

    def diagnosis(self, row: int) -> Diagnosis | None:
        """What capability heads found of a row in the last call that it was part of, valid until the next one; None
        where there are none."""
        ...

    def cancel(self) -> None:
        """Make the computation in progress fail where that is possible; may be called from another thread."""
        ...


def new_batch_decoder(
    session: Session, batch: int, capacity: int, calls: int | None = None, *, diagnostics: bool = True
) -> BatchDecoder:
    """The fastest decoder that a session's bundle allows, for rows of up to `capacity` tokens.

    With capability heads there is room for `calls` calls of a row, or for one a token; `diagnostics` as in
    `new_decoder`.
    """
    if isinstance(session.graph, DecoderGraph):
        return CachedBatchDecoder(session.graph, batch, capacity, calls or capacity, diagnostics=diagnostics)
    return RowByRowDecoder(session, batch, calls or capacity)


class RowByRowDecoder:
    """Every row for itself, for graphs that keep nothing."""

    def __init__(self, session: Session, batch: int, calls: int | None = None) -> None:
        self._decoders = [FullSequenceDecoder(session, calls) for _ in range(batch)]

    def prefill(self, row: int, ids: TokenIds) -> Floats:
        """Start a row with its prompt (T,); logits (V,) of the position after it."""
        return self._decoders[row].prefill(ids)

    def decode(self, rows: Sequence[int], tokens: Sequence[int]) -> Floats:
        """Append one token to each of some rows; logits (n, V) of the positions after them."""
        return np.stack([self._decoders[row].decode_one_token(token) for row, token in zip(rows, tokens, strict=True)])

    def diagnosis(self, row: int) -> Diagnosis | None:
        """What capability heads found of a row in its last call."""
        return self._decoders[row].diagnosis

    def cancel(self) -> None:
        """A run in progress comes to its end."""


class CachedBatchDecoder:
    """One cache for all rows. Prompts go in one by one, each into its own row; then one run a step serves every row."""

    def __init__(
        self, graph: DecoderGraph, batch: int, capacity: int, calls: int | None = None, *, diagnostics: bool = True
    ) -> None:
        self._graph, self._wants_diagnostics = graph, diagnostics
        self._cache, self._bank = graph.new_cache(batch, capacity), graph.new_memory(batch, calls)
        self._stepper = Stepper(graph, self._cache, self._bank, diagnostics=diagnostics)
        self._diagnoses: dict[int, Diagnosis | None] = {}
        self._appender: Appender | None = None
        self._lengths = np.ones(batch, np.int64)
        self._cancelled = False

    def prefill(self, row: int, ids: TokenIds) -> Floats:
        """Start a row with its prompt (T,); logits (V,) of the position after it."""
        logits = self._graph.new_logits(1, 1)
        appender = self._appender = Appender(
            self._graph, self._cache, row, bank=self._bank, diagnostics=self._wants_diagnostics
        )
        if self._cancelled:  # before there was this one to cancel
            appender.binding.cancel()
        for part in chunks(len(ids)):
            appender.append(ids[None, part], part.start, logits, ends_call=part.stop == len(ids))
        self._lengths[row] = len(ids)
        self._diagnoses[row] = next(iter(appender.diagnoses), None)
        last: Floats = logits[0, 0]
        return last

    def decode(self, rows: Sequence[int], tokens: Sequence[int]) -> Floats:
        """Append one token to each of some rows; logits (n, V) of the positions after them."""
        ids, lengths = np.zeros_like(self._lengths), np.ones_like(self._lengths)  # a row that is over has one token
        ids[rows], lengths[rows] = tokens, self._lengths[rows] + 1
        self._lengths = lengths
        logits: Floats = self._stepper.step(ids, lengths)[rows]
        self._diagnoses = {row: self._stepper.diagnosis(row) for row in rows}
        return logits

    def diagnosis(self, row: int) -> Diagnosis | None:
        """What capability heads found of a row in the last call that it was part of, valid until the next one."""
        return self._diagnoses.get(row)

    def cancel(self) -> None:
        """Make the run in progress and every later one fail."""
        self._cancelled = True
        for part in (self._appender, self._stepper):
            if part is not None:
                part.binding.cancel()
