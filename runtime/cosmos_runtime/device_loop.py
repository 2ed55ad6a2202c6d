"""Decoding that stays on the device: the decoder and a sampler take turns there, and the host reads along.

    B  batch    L  cache length

A sampler writes the next tokens and positions to where the decoder reads them, so no step waits for the host. The host
gives steps in pieces, always one piece ahead, and reads the history of tokens behind each. On CUDA what a step is made
of is captured once for a set of buffers and replayed; a prefill is not. ONNX Runtime keeps what it captured with the
thread that did: one worker thread does all of it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from cosmos_runtime.bundle import Bundle
from cosmos_runtime.continuation import Continuation
from cosmos_runtime.decoder_graph import DecoderGraph
from cosmos_runtime.device_samplers import Samplers
from cosmos_runtime.device_sampling import parameters, sampler_for
from cosmos_runtime.device_slot import DeviceSlot, Reading
from cosmos_runtime.errors import CosmosRuntimeError
from cosmos_runtime.manifest import GraphSpec

# Steps of one piece: long enough that the host's part of it does not count, short enough to stream, and to stop.
_STEPS = 8
# Pieces that the device may have to do before the host has read the first of them.
_AHEAD = 2
# Buffers that are kept for the next request, and the shortest cache that is made: requests of like lengths share one.
_KEPT_SLOTS, _SHORTEST = 2, 256


class DeviceLoops:
    """The device loops of a session: its samplers, loaded when they are first used, and buffers kept between requests.

    Requests may run at once, each in buffers of its own; the device does their pieces in turn.
    """

    def __init__(self, graph: DecoderGraph, bundle: Bundle, provider: str) -> None:
        self._graph, self._samplers = graph, Samplers(bundle, provider, graph.stream)
        self._free: list[DeviceSlot] = []
        self._abandoned: deque[DeviceSlot] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cosmos-device-loop")

    def sampler(self, rows: Sequence[Continuation]) -> str | None:
        """The sampler that can choose for these rows together; None where there is none, and the host has to choose."""
        return sampler_for(rows, self._samplers.specs, self._graph.vocab_size)

    def start(self, rows: Sequence[Continuation]) -> "DeviceLoop":
        """A loop that continues these rows. Raises: CosmosRuntimeError without room for its buffers."""
        name = self.sampler(rows)
        if name is None:
            raise CosmosRuntimeError("device loop: no sampler of this bundle can choose so; ask `sampler` first")
        slot = self._worker.submit(self._take, len(rows), max(row.capacity for row in rows), name).result()
        give_back, abandon = partial(self._give_back, slot), partial(self._abandoned.append, slot)
        return DeviceLoop(self._worker, give_back, abandon, slot, name, self._samplers.specs[name], rows)

    def _take(self, batch: int, capacity: int, sampler: str) -> DeviceSlot:
        """Buffers for `batch` rows of `capacity` tokens with a sampler: kept ones where they are large enough."""
        while self._abandoned:
            self._give_back(self._abandoned.popleft())
        with self._graph.stream.working():
            return self._prepared(batch, capacity, sampler)

    def _prepared(self, batch: int, capacity: int, sampler: str) -> DeviceSlot:
        fitting = [slot for slot in self._free if slot.batch == batch and slot.length >= capacity]
        slot = min(fitting, key=lambda slot: slot.length, default=None)
        if slot is None:
            del self._free[_KEPT_SLOTS - 1 :]
            slot = DeviceSlot(self._graph, batch, _cache_length(capacity, self._graph.max_sequence_length))
        else:
            self._free.remove(slot)
        slot.add_sampler(sampler, self._samplers)
        return slot

    def _give_back(self, slot: DeviceSlot) -> None:
        self._free = [slot, *self._free][:_KEPT_SLOTS]


class DeviceLoop:
    """One request: B rows of any lengths, continued together. Iterate over `steps`, then `close`.

    `give_back` is called by the worker, after what it has to do for this loop; `abandon` where nobody closed it, in
    whatever the thread then does, so it may wait for nothing.
    """

    def __init__(
        self,
        worker: ThreadPoolExecutor,
        give_back: Callable[[], None],
        abandon: Callable[[], None],
        slot: DeviceSlot,
        sampler: str,
        spec: GraphSpec,
        rows: Sequence[Continuation],
    ) -> None:
        self._worker, self._slot, self._sampler = worker, slot, sampler
        self._give_back, self._abandon = give_back, abandon
        self._spec, self._rows = spec, rows
        self._starts = np.array([row.length for row in rows])
        self._wanted = [row.capacity - row.length for row in rows]
        self._open = True

    def steps(self) -> Iterator[npt.NDArray[np.int64]]:
        """The next token (B,) of every row, step by step, as many as the longest row wants; a row that has come to its
        end has anything there.

        Raises: CosmosRuntimeError where the computation fails, or gives what is no number.
        """
        pieces: deque[tuple[int, Future[Reading]]] = deque()
        given = read = 0
        row_numbers = np.arange(len(self._rows))
        try:
            while read < max(self._wanted):
                while given < max(self._wanted) and len(pieces) < _AHEAD:
                    steps = self._next_piece(given)
                    pieces.append((steps, self._worker.submit(self._advance if given else self._begin, steps)))
                    given += steps
                steps, piece = pieces.popleft()
                history, logits = piece.result().wait()
                _check_finite(logits)
                for step in range(read, read + steps):
                    yield history[row_numbers, np.minimum(self._starts + step, self._slot.length - 1)]
                read += steps
        except CosmosRuntimeError:
            self._open = False  # buffers of a run that failed are not used again
            raise

    def close(self) -> None:
        """Give the buffers back. What the device still has to do for this loop, it does before anything else."""
        if self._open:
            self._open = False
            self._worker.submit(self._give_back)

    def __del__(self) -> None:
        # Work that was given to the worker keeps the loop, so none is left.
        if self._open:
            self._abandon()

    def _next_piece(self, given: int) -> int:
        """Steps of the next piece; the first one is the prompts and one token.

        A row at its end stays there and is written again, so a piece ends wherever a row does.
        """
        return min(_STEPS, *(wanted - given for wanted in self._wanted if wanted > given)) if given else 1

    def _begin(self, steps: int) -> Reading:
        values = parameters(self._rows, self._spec, self._slot.length)
        with self._slot.stream.working():
            self._slot.begin(self._sampler, [row.prompt_ids for row in self._rows], values)
        return self._slot.read()

    def _advance(self, steps: int) -> Reading:
        for _ in range(steps):
            self._slot.step(self._sampler)
        return self._slot.read()


def _check_finite(logits: npt.NDArray[np.float32]) -> None:
    """Chosen logits (B, 1): where a model computes NaN, every logit is, and stays so."""
    if not np.isfinite(logits).all():
        row = int(np.isfinite(logits[:, 0]).argmin())
        raise CosmosRuntimeError(
            f"logits: expected finite numbers, got {logits[row, 0]} in row {row}; check the bundle with "
            f"`cosmos-run inspect --check`, or use a recipe of wider range, such as cuda-bf16"
        )


def _cache_length(capacity: int, max_sequence_length: int) -> int:
    """L for requests of up to so many tokens: a power of two, so that few lengths serve all, within the model's."""
    return min(max(_SHORTEST, 1 << (capacity - 1).bit_length()), max_sequence_length)
