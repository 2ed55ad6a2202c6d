"""Calls of a model with capability heads in the cases that pass through its layers: each run of a case ends one.

B  batch    T  tokens of a case    K  calls    M  slots of the memory bank    D  dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities import entries_read
from cosmos_export.parity.calls import Entries
from cosmos_export.parity.layer_cases import LayerCase, Piece

# A graph that sees whole sequences has so many calls in a row, each a token longer: more than the memory reads entries.
GROWING_CALLS = 9
# Into a memory that is full, with as many slots as the model has, few calls show how the oldest entry goes.
CALLS_WHEN_FULL = 2


@dataclass(frozen=True)
class HeadCase:
    """Calls of a case, one after another: call k of row b ends with the row's token `calls[k].lengths[b] - 1`."""

    name: str
    case: LayerCase
    at: int
    """Which of the cases that passed through the layers it is."""
    calls: tuple[Piece, ...]
    slots: int
    before: Entries | None = None
    """The memory before the first call; empty without."""

    @property
    def rows(self) -> int:
        """Rows of all calls, K B: first those of the first call."""
        return len(self.calls) * self.case.batch

    @property
    def longest(self) -> int:
        """Tokens of the longest row after the last call, those before the case included."""
        return self.case.past + max(self.calls[-1].lengths)

    def spans(self) -> list[tuple[int, int, int]]:
        """(row of the case, first and last position + 1) of the tokens of each call's row, in the order of `rows`."""
        return [
            (row, start, end)
            for call in self.calls
            for row, (start, end) in enumerate(zip(call.starts, call.lengths, strict=True))
        ]

    def query_before(self, dim: int) -> NDArray[np.float32]:
        """The query (B, D) of rows whose first token lies before the case: eighths, which any type has exactly."""
        draw = np.random.default_rng(self.at)
        return draw.integers(-16, 17, (self.case.batch, dim)).astype(np.float32) * np.float32(1 / 8)


def build_head_cases(
    cases: Sequence[LayerCase], config: CosmosAdvancedConfig, *, memory: bool, cached: bool, causal: bool
) -> list[HeadCase]:
    """The calls of these cases; with a `memory`, also some that find it full."""
    found = [
        _with_calls(case, at, case.pieces if cached else _growing(case, causal=causal), config)
        for at, case in enumerate(cases)
    ]
    size = config.memory.working_memory_size if memory else 0
    longest = max((each for each in found if each.case.batch == 1), key=lambda each: len(each.calls))
    if size:
        name, calls = f"{longest.name}, memory full", longest.calls[:CALLS_WHEN_FULL]
        found.append(HeadCase(name, longest.case, longest.at, calls, size, _full(size, config.dim)))
    return found


def token_by_token(case: LayerCase, at: int, config: CosmosAdvancedConfig, *, cached: bool) -> HeadCase:
    """One row, each of whose tokens but the last is a call."""
    starts = range(case.length - 1) if cached else [0] * (case.length - 1)
    calls = tuple(Piece((start,), (end + 1,), end + 1 - start) for end, start in enumerate(starts))
    return _with_calls(case, at, calls, config)


def _with_calls(case: LayerCase, at: int, calls: tuple[Piece, ...], config: CosmosAdvancedConfig) -> HeadCase:
    size = config.memory.working_memory_size
    return HeadCase(case.name, case, at, calls, max(entries_read(size), min(len(calls), size)))


def _growing(case: LayerCase, *, causal: bool) -> tuple[Piece, ...]:
    """Calls of whole sequences. Where tokens see what is behind them, a shorter one has other hidden states."""
    length, batch = case.length, case.batch
    first = max(1, length - GROWING_CALLS + 1) if causal else length
    return tuple(Piece((0,) * batch, (end,) * batch, end) for end in range(first, length + 1))


def _full(size: int, dim: int) -> Entries:
    draw = np.random.default_rng(4)
    keys, values = draw.standard_normal((2, 1, size, dim)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    return Entries(keys, values, calls=size + 2)
