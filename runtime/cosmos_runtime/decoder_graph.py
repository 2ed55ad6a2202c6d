"""The graph of role `decoder`: new tokens on top of a key/value cache, logits of the positions that are asked for.

B  batch    T  new tokens    N  tokens in all    n  wanted positions    L  cache length    V  vocabulary
"""

import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.binding import Binding, GraphBinding, LoadedGraph
from cosmos_runtime.bundle import Bundle
from cosmos_runtime.cache import KeyValueCache, cache_length
from cosmos_runtime.device_stream import HostStream, Stream
from cosmos_runtime.errors import CosmosRuntimeError
from cosmos_runtime.heads import Diagnosis, HeadBinding, MemoryBank, has_heads
from cosmos_runtime.manifest import GraphSpec, Role

# A longer run of tokens goes through the graph in pieces of this many: attention's scores are (heads, T, N).
CHUNK = 512


class DecoderGraph:
    """A loaded decoder graph. It keeps no state: that is in the caches, one a request.

    `at_once` runs over several tokens may be computed at a time; others wait for their turn. Single tokens do not wait.
    """

    def __init__(
        self, loaded: LoadedGraph, spec: GraphSpec, bundle: Bundle, stream: Stream | None = None, *, at_once: int = 2
    ) -> None:
        self.long_runs = threading.BoundedSemaphore(at_once)
        self.spec, self.stream = spec, stream or HostStream()
        self._loaded, self._place, self._manifest = loaded, str(bundle.path), bundle.manifest
        self.tokens, self.logits = spec.input(Role.TOKENS).name, spec.output(Role.LOGITS).name
        self.vocab_size, self.max_sequence_length = bundle.manifest.vocab_size, bundle.manifest.max_sequence_length

    @property
    def by_lengths(self) -> bool:
        """Whether it is told lengths instead of a mask, and gives logits (n, V) of chosen rows."""
        return self.spec.takes(Role.LAST_INDEX)

    def new_feed(self, batch: int, length: int) -> "Feed":
        """What tells the graph how long rows are, for a cache of `batch` rows and `length` places."""
        return LengthFeed(self.spec, batch) if self.by_lengths else MaskFeed(self.spec, batch, length)

    def new_binding(self) -> Binding:
        """Nothing bound yet."""
        return self._loaded.new_binding(self._place)

    def device_binding(self) -> GraphBinding:
        """The same for a loop that stays on a device, which ONNX Runtime alone can do."""
        binding = self.new_binding()
        if not isinstance(binding, GraphBinding):
            raise CosmosRuntimeError(f"{self._place}: only ONNX Runtime decodes without the host")
        return binding

    def new_cache(self, batch: int, tokens: int) -> KeyValueCache:
        """A cache for `batch` rows of up to `tokens` tokens."""
        return KeyValueCache(self.spec, batch, cache_length(tokens, self.max_sequence_length), self.stream)

    def new_memory(self, batch: int, calls: int | None = None) -> MemoryBank | None:
        """What capability heads keep of `batch` rows, for so many calls (None: as many as the model remembers); None
        for a plain decoder."""
        if not has_heads(self._manifest):
            return None
        return MemoryBank(self.spec, self._manifest, batch, calls, self.stream)

    def bind_heads(
        self, binding: Binding, bank: MemoryBank | None, rows: slice, *, diagnostics: bool = True
    ) -> HeadBinding | None:
        """The heads' tensors of some rows, all or without what only a report reads; None for a plain decoder."""
        if bank is None:
            return None
        return HeadBinding(self.spec, self._manifest, binding, bank, rows, diagnostics=diagnostics)

    def new_logits(self, batch: int, positions: int) -> Floats:
        """A buffer (B, n, V) of the graph's own type."""
        return np.empty((batch, positions, self.vocab_size), self.spec.output(Role.LOGITS).dtype)

    def bind_logits(self, binding: Binding, logits: Floats) -> None:
        """Receive logits (B, n, V)."""
        binding.bind_output(self.logits, logits.reshape(-1, self.vocab_size) if self.by_lengths else logits)

    def all_logits(self, ids: TokenIds) -> Floats:
        """Logits (B, T, V) of every position of ids (B, T), in a cache of their own and a memory of one call."""
        return self.call(ids, self.new_memory(len(ids), calls=1))[0]

    def call(self, ids: TokenIds, bank: MemoryBank | None) -> tuple[Floats, list[Diagnosis]]:
        """Logits (B, T, V) of every position of ids (B, T), in a cache of their own, and what the heads found of each
        row; `bank` has the calls before."""
        batch, length = ids.shape
        logits, diagnoses = self.new_logits(batch, length), []
        cache = self.new_cache(batch if length <= CHUNK else 1, length)
        # Several new tokens on top of a filled cache want a batch of one, so long rows go one by one.
        for rows in [slice(0, batch)] if length <= CHUNK else [slice(row, row + 1) for row in range(batch)]:
            appender = Appender(self, cache, bank=bank, bank_rows=rows)
            for part in chunks(length):
                appender.append(ids[rows, part], part.start, logits[rows, part], ends_call=part.stop == length)
            found = appender.diagnoses
            for row, diagnosis in enumerate(found, rows.start):
                if diagnosis.blocked:  # pieces before the last one did not know
                    logits[row] = 0
            diagnoses += found
        return logits, diagnoses


class Feed(Protocol):
    """Binds the inputs that say where tokens stand and which positions get logits."""

    def append(self, binding: Binding, before: int, length: int, wanted: int) -> None:
        """Every row gets `length` tokens behind its first `before`; logits of the last `wanted` of them."""
        ...

    def step(self, binding: Binding, lengths: npt.NDArray[np.int64] | int) -> None:
        """Every row gets one token, which its length (B,) counts in; an int for a batch of one."""
        ...


class MaskFeed:
    """By an attention mask (B, N), and offsets from each row's end. Slices of arrays that are there already."""

    def __init__(self, spec: GraphSpec, batch: int, length: int) -> None:
        self._mask, self._offset = spec.input(Role.ATTENTION_MASK).name, spec.input(Role.LOGIT_OFFSETS).name
        self._batch = batch
        self._ones = np.ones(batch * length, np.int64)
        self._offsets = np.arange(length - 1, -1, -1, dtype=np.int64)
        self._places = np.arange(length)

    def append(self, binding: Binding, before: int, length: int, wanted: int) -> None:
        """Every row gets `length` tokens behind its first `before`; logits of the last `wanted` of them."""
        total = before + length
        binding.bind_input(self._mask, self._ones[: self._batch * total].reshape(self._batch, total))
        binding.bind_input(self._offset, self._offsets[-wanted:])

    def step(self, binding: Binding, lengths: npt.NDArray[np.int64] | int) -> None:
        """Every row gets one token, which its length (B,) counts in; an int for a batch of one."""
        binding.bind_input(self._mask, self._step_mask(lengths))

    def _step_mask(self, lengths: npt.NDArray[np.int64] | int) -> npt.NDArray[np.int64]:
        """(B, N): 1 for the tokens that a row has, N the longest row's."""
        if isinstance(lengths, int):
            return self._ones[None, :lengths]
        return (self._places[: lengths.max()] < lengths[:, None]).astype(np.int64)


class LengthFeed:
    """By each row's last index (B,), the longest row's tokens, and numbers of rows of the hidden states (B * T, D)."""

    def __init__(self, spec: GraphSpec, batch: int) -> None:
        self._last, self._total = spec.input(Role.LAST_INDEX).name, spec.input(Role.TOTAL_LENGTH).name
        self._rows, self._batch = spec.input(Role.LOGIT_ROWS).name, batch
        self._wanted: tuple[int, int] | None = None

    def append(self, binding: Binding, before: int, length: int, wanted: int) -> None:
        """Every row gets `length` tokens behind its first `before`; logits of the last `wanted` of them."""
        self._bind(binding, np.full(self._batch, before + length - 1), before + length)
        self._want(binding, length, wanted)

    def step(self, binding: Binding, lengths: npt.NDArray[np.int64] | int) -> None:
        """Every row gets one token, which its length (B,) counts in; an int for a batch of one."""
        ends = np.atleast_1d(lengths)
        self._bind(binding, ends - 1, int(ends.max()))
        self._want(binding, 1, 1)

    def _bind(self, binding: Binding, last: npt.NDArray[np.int64], total: int) -> None:
        binding.bind_input(self._last, last.astype(np.int32))
        binding.bind_input(self._total, np.array(total, np.int32))

    def _want(self, binding: Binding, length: int, wanted: int) -> None:
        if self._wanted != (length, wanted):
            places = np.arange(self._batch)[:, None] * length + np.arange(length - wanted, length)
            binding.bind_input(self._rows, places.ravel())
            self._wanted = (length, wanted)


class Appender:
    """Appends tokens to a cache (or to one row of it), any number at a time, with logits of the last n of them.

    With capability heads, `bank` is their memory, of which `bank_rows` (the cache's, unless said otherwise) are used,
    and `diagnostics` says whether all that they find is wanted.
    """

    def __init__(
        self,
        graph: DecoderGraph,
        cache: KeyValueCache,
        row: int | None = None,
        *,
        bank: MemoryBank | None = None,
        bank_rows: slice | None = None,
        diagnostics: bool = True,
    ) -> None:
        self._graph = graph
        self._rows = slice(0, cache.batch) if row is None else slice(row, row + 1)
        with graph.stream.working():
            self.binding = graph.new_binding()
            cache.bind(self.binding, row)
            self._feed = graph.new_feed(self._rows.stop - self._rows.start, cache.length)
            self._heads = graph.bind_heads(self.binding, bank, bank_rows or self._rows, diagnostics=diagnostics)

    @property
    def diagnoses(self) -> list[Diagnosis]:
        """What the heads found of each row in the last call, valid until the next one; none for a plain decoder."""
        rows = range(self._rows.stop - self._rows.start)
        return [] if self._heads is None else [self._heads.diagnosis(row) for row in rows]

    def append(self, ids: TokenIds, before: int, logits: Floats, *, ends_call: bool = True) -> None:
        """Put ids (B, T) behind the first `before` tokens of every row; logits (B, n, V) receives the last n of T.

        Where they do not end a call, capability heads have nothing to do with the logits, and remember nothing.
        """
        with self._graph.long_runs, self._graph.stream.working():
            self.binding.bind_input(self._graph.tokens, np.ascontiguousarray(ids))
            self._feed.append(self.binding, before, ids.shape[1], logits.shape[1])
            self._graph.bind_logits(self.binding, logits)
            _run(self._graph, self.binding, self._heads, ends_call)


class Stepper:
    """Appends one token to every row of a cache, the rows being of any lengths: the loop that has to be fast.

    Everything stays bound; from step to step only what says how long rows are changes.
    """

    def __init__(
        self, graph: DecoderGraph, cache: KeyValueCache, bank: MemoryBank | None = None, *, diagnostics: bool = True
    ) -> None:
        self._graph = graph
        self._tokens = np.zeros((cache.batch, 1), np.int64)
        self._logits = graph.new_logits(cache.batch, 1)
        with graph.stream.working():
            self.binding = graph.new_binding()
            cache.bind(self.binding)
            self._feed = graph.new_feed(cache.batch, cache.length)
            self._feed.append(self.binding, 0, 1, 1)  # which positions get logits stays as it is
            graph.bind_logits(self.binding, self._logits)
            self._heads = graph.bind_heads(self.binding, bank, slice(0, cache.batch), diagnostics=diagnostics)

    def diagnosis(self, row: int = 0) -> Diagnosis | None:
        """What the heads found of a row in the last step, valid until the next one; None for a plain decoder."""
        return None if self._heads is None else self._heads.diagnosis(row)

    def step(self, tokens: npt.ArrayLike, lengths: npt.NDArray[np.int64] | int) -> Floats:
        """Append tokens (B,); `lengths` (B,), or an int for a batch of one, count them in. Logits (B, V), valid until
        the next step."""
        self._tokens[:, 0] = tokens
        with self._graph.stream.working():
            self.binding.bind_input(self._graph.tokens, self._tokens)
            self._feed.step(self.binding, lengths)
            _run(self._graph, self.binding, self._heads, ends_call=True)
        logits: Floats = self._logits[:, 0]
        return logits


def _run(graph: DecoderGraph, binding: Binding, heads: HeadBinding | None, ends_call: bool) -> None:
    if heads is not None:
        heads.prepare(graph.stream, ends_call=ends_call)
    binding.run()
    if heads is not None:
        heads.done(ends_call=ends_call)


def chunks(length: int, start: int = 0) -> Iterator[slice]:
    """Pieces of at most `CHUNK` positions that cover `length` of them, from `start` on."""
    end = start + length
    for first in range(start, end, CHUNK):
        yield slice(first, min(first + CHUNK, end))
