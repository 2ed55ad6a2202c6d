"""The graph of role `decoder`: new tokens on top of a key/value cache, logits of the positions that are asked for.

B  batch    T  new tokens    N  tokens in all    n  wanted positions    L  cache length    V  vocabulary
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.binding import GraphBinding
from cosmos_runtime.bundle import Bundle
from cosmos_runtime.cache import KeyValueCache, cache_length
from cosmos_runtime.manifest import GraphSpec, Role

if TYPE_CHECKING:
    import onnxruntime

# A longer run of tokens goes through the graph in pieces of this many: attention's scores are (heads, T, N).
CHUNK = 512


class DecoderGraph:
    """A loaded decoder graph. It keeps no state: that is in the caches, one a request."""

    def __init__(self, inference: "onnxruntime.InferenceSession", spec: GraphSpec, bundle: Bundle, device: str) -> None:
        self.spec, self.device = spec, device
        self._inference, self._place = inference, str(bundle.path)
        self.tokens, self.mask = spec.input(Role.TOKENS).name, spec.input(Role.ATTENTION_MASK).name
        self.offsets, self.logits = spec.input(Role.LOGIT_OFFSETS).name, spec.output(Role.LOGITS).name
        self.vocab_size, self.max_sequence_length = bundle.manifest.vocab_size, bundle.manifest.max_sequence_length

    def new_binding(self) -> GraphBinding:
        """Nothing bound yet."""
        return GraphBinding(self._inference, self._place)

    def new_cache(self, batch: int, tokens: int) -> KeyValueCache:
        """A cache for `batch` rows of up to `tokens` tokens."""
        return KeyValueCache(self.spec, batch, cache_length(tokens, self.max_sequence_length), self.device)

    def new_logits(self, batch: int, positions: int) -> Floats:
        """A buffer (B, n, V) of the graph's own type."""
        return np.empty((batch, positions, self.vocab_size), self.spec.output(Role.LOGITS).dtype)

    def all_logits(self, ids: TokenIds) -> Floats:
        """Logits (B, T, V) of every position of ids (B, T), in a cache of their own."""
        batch, length = ids.shape
        logits = self.new_logits(batch, length)
        cache = self.new_cache(batch if length <= CHUNK else 1, length)
        # Several new tokens on top of a filled cache want a batch of one, so long rows go one by one.
        for rows in [slice(0, batch)] if length <= CHUNK else [slice(row, row + 1) for row in range(batch)]:
            appender = Appender(self, cache)
            for part in chunks(length):
                appender.append(ids[rows, part], part.start, logits[rows, part])
        return logits


class Appender:
    """Appends tokens to a cache (or to one row of it), any number at a time, with logits of the last n of them."""

    def __init__(self, graph: DecoderGraph, cache: KeyValueCache, row: int | None = None) -> None:
        self._graph = graph
        self.binding = graph.new_binding()
        cache.bind(self.binding, row)
        batch = cache.batch if row is None else 1
        self._ones = np.ones(batch * cache.length, np.int64)
        self._offsets = np.arange(cache.length - 1, -1, -1, dtype=np.int64)

    def append(self, ids: TokenIds, before: int, logits: Floats) -> None:
        """Put ids (B, T) behind the first `before` tokens of every row; logits (B, n, V) receives the last n of T."""
        batch, length = ids.shape
        total = before + length
        self.binding.bind_input(self._graph.tokens, np.ascontiguousarray(ids))
        self.binding.bind_input(self._graph.mask, self._ones[: batch * total].reshape(batch, total))
        self.binding.bind_input(self._graph.offsets, self._offsets[-logits.shape[1] :])
        self.binding.bind_output(self._graph.logits, logits)
        self.binding.run()


class Stepper:
    """Appends one token to every row of a cache, the rows being of any lengths: the loop that has to be fast.

    Everything stays bound; from step to step only the mask changes its shape.
    """

    def __init__(self, graph: DecoderGraph, cache: KeyValueCache) -> None:
        self._graph = graph
        self.binding = graph.new_binding()
        cache.bind(self.binding)
        self._tokens = np.zeros((cache.batch, 1), np.int64)
        self._logits = graph.new_logits(cache.batch, 1)
        self._ones = np.ones((1, cache.length), np.int64)
        self._places = np.arange(cache.length)
        self.binding.bind_input(graph.offsets, np.zeros(1, np.int64))
        self.binding.bind_output(graph.logits, self._logits)

    def step(self, tokens: npt.ArrayLike, lengths: npt.NDArray[np.int64] | int) -> Floats:
        """Append tokens (B,); `lengths` (B,), or an int for a batch of one, count them in. Logits (B, V), valid until
        the next step."""
        self._tokens[:, 0] = tokens
        self.binding.bind_input(self._graph.tokens, self._tokens)
        self.binding.bind_input(self._graph.mask, self._mask(lengths))
        self.binding.run()
        logits: Floats = self._logits[:, 0]
        return logits

    def _mask(self, lengths: npt.NDArray[np.int64] | int) -> npt.NDArray[np.int64]:
        """(B, N): 1 for the tokens that a row has, N the longest row's."""
        if isinstance(lengths, int):
            return self._ones[:, :lengths]
        return (self._places[: lengths.max()] < lengths[:, None]).astype(np.int64)


def chunks(length: int, start: int = 0) -> Iterator[slice]:
    """Pieces of at most `CHUNK` positions that cover `length` of them, from `start` on."""
    end = start + length
    for first in range(start, end, CHUNK):
        yield slice(first, min(first + CHUNK, end))
