"""What a model is tried with layer by layer: a few rows of tokens, taken whole or in pieces through a cache.

B  batch    T  tokens of a case    n  tokens of a piece    P  positions before the case    S  max_sequence_length
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.parity.cases import Skipped, TokenIds
from cosmos_export.parity.stepwise import pieces as ways_in_pieces

# A cache of one layer up to this many bytes is made for the positions near the maximum.
LARGEST_CACHE = 256 << 20


@dataclass(frozen=True)
class Piece:
    """One run: `count` new tokens in every row, of which row b has `lengths[b] - starts[b]`, the others are padding."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class LayerCase:
    """Token ids (B, T) in pieces; `past` positions before them are filled with keys and values drawn at random."""

    name: str
    input_ids: TokenIds
    pieces: tuple[Piece, ...]
    past: int = 0

    @property
    def batch(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """Tokens of the longest row, those before the case included."""
        return self.past + self.input_ids.shape[1]

    @property
    def computed(self) -> NDArray[np.bool_]:
        """(B, T): which tokens the pieces reach."""
        reached = np.zeros(self.input_ids.shape, bool)
        for piece in self.pieces:
            for row, (start, length) in enumerate(zip(piece.starts, piece.lengths, strict=True)):
                reached[row, start:length] = True
        return reached

    def drawn_past(self, layer: int, config: CosmosAdvancedConfig) -> tuple[NDArray, NDArray] | None:
        """Keys and values (B, K, P, E) of the positions before the case, as any text might have left them."""
        if not self.past:
            return None
        return _drawn((self.batch, config.n_kv_heads, self.past, config.head_dim), layer)


@lru_cache(maxsize=1)  # every lane of a layer has the same
def _drawn(shape: tuple[int, ...], layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Eighths from -2 to 2, which any type has exactly, so that they are the same numbers on both sides."""
    draw = np.random.default_rng(layer)
    keys, values = (draw.integers(-16, 17, shape, np.int8).astype(np.float32) * np.float32(1 / 8) for _ in range(2))
    return keys, values


def build_layer_cases(
    config: CosmosAdvancedConfig, *, cached: bool, seed: int = 4
) -> tuple[list[LayerCase], list[Skipped]]:
    """The cases of a graph with a key/value cache or without; each token costs time in every layer, so they are few."""
    draw = np.random.default_rng(seed)
    limit, vocab = config.max_sequence_length, config.vocab_size

    def ids(batch: int, length: int) -> TokenIds:
        return draw.integers(0, vocab, (batch, min(length, limit)))

    extreme = np.zeros((2, min(6, limit)), np.int64)
    extreme[1, ::2] = vocab - 1
    cases = [whole_rows("2 x 6 extreme ids", extreme), whole_rows("1 x 32 tokens", ids(1, 32))]
    if not cached:
        more = [whole_rows("3 x 7 tokens", ids(3, 7)), whole_rows("1 x 1 token", ids(1, 1))]
        return _distinct([*cases, *more]), _near_the_maximum_needs_a_cache(config)
    row = ids(1, 16)
    ways = ways_in_pieces(row.shape[1])
    cases += [in_pieces(f"1 x 16 {way}", row, ways[way]) for way in ("prefill+decode", "uneven chunks")]
    cases.append(unequal_rows("3 x 10 unequal rows", ids(3, 10), (1, 5, 3)))
    last, skipped = _at_the_end(config, ids(1, 4))
    return _distinct([*cases, *last]), skipped


def random_row(config: CosmosAdvancedConfig, *, seed: int = 6) -> LayerCase:
    """A row of random tokens that no comparison has."""
    length = min(32, config.max_sequence_length)
    return whole_rows("1 x 32 random tokens", np.random.default_rng(seed).integers(0, config.vocab_size, (1, length)))


def whole_rows(name: str, input_ids: TokenIds) -> LayerCase:
    """All tokens in one run."""
    return in_pieces(name, input_ids, [input_ids.shape[1]])


def one_token_each(rows: int) -> LayerCase:
    """So many rows of the first token of the vocabulary: for slices that read nothing of a case but its shape."""
    return LayerCase(f"{rows} x 1 token", np.zeros((rows, 1), np.int64), (Piece((0,) * rows, (1,) * rows, 1),))


def in_pieces(name: str, input_ids: TokenIds, sizes: list[int], past: int = 0) -> LayerCase:
    """Rows of one length in pieces of `sizes` tokens."""
    batch, ends = len(input_ids), np.cumsum(sizes)
    runs = [Piece((int(end) - size,) * batch, (int(end),) * batch, size) for end, size in zip(ends, sizes, strict=True)]
    return LayerCase(_named(name, input_ids), input_ids, tuple(runs), past)


def unequal_rows(name: str, input_ids: TokenIds, prompts: tuple[int, ...]) -> LayerCase:
    """A prefill of rows with prompts of unequal lengths, then one token a row until the longest is at its end."""
    longest = input_ids.shape[1]
    prompts = tuple(min(prompt, longest) for prompt in prompts)
    runs = [Piece((0,) * len(prompts), prompts, max(prompts))]
    for _ in range(longest - max(prompts)):
        before = runs[-1].lengths
        runs.append(Piece(before, tuple(length + 1 for length in before), 1))
    return LayerCase(_named(name, input_ids), input_ids, tuple(runs))


def _at_the_end(config: CosmosAdvancedConfig, input_ids: TokenIds) -> tuple[list[LayerCase], list[Skipped]]:
    limit, length = config.max_sequence_length, input_ids.shape[1]
    name = f"1 x {length} up to position {limit}"
    if limit <= 2 * length:
        return [], []
    needed = 2 * 4 * config.n_kv_heads * config.head_dim * limit
    if needed > LARGEST_CACHE:
        reason = f"a layer's cache of {limit} positions takes {needed / 2**20:.0f} MiB, and {LARGEST_CACHE >> 20} may"
        return [], [Skipped(name, reason)]
    return [in_pieces(name, input_ids, [1, length - 2, 1], past=limit - length)], []


def _near_the_maximum_needs_a_cache(config: CosmosAdvancedConfig) -> list[Skipped]:
    limit = config.max_sequence_length
    if limit <= 32:
        return []
    return [Skipped(f"1 x {limit} tokens", "a graph without a cache gets there only by whole sequences of that length")]


def _named(name: str, input_ids: TokenIds) -> str:
    """A short model has shorter rows than the name says."""
    batch, length = input_ids.shape
    return f"{batch} x {length} {name.split(' ', 3)[3]}"


def _distinct(cases: list[LayerCase]) -> list[LayerCase]:
    return list({case.name: case for case in cases}.values())
