"""What the capability heads of a model keep between calls, and what they found in the last one.

    B  batch    M  slots of the working memory    D  dim

A call is a run of the model that the heads look at: a prompt, a token. Each row counts its own.
"""

import math
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cosmos_runtime.binding import HOST, Binding, check_room, item_size
from cosmos_runtime.device_stream import DeviceArray, Stream
from cosmos_runtime.diagnostics import nested_diagnostics
from cosmos_runtime.errors import InputError
from cosmos_runtime.manifest import GraphSpec, Role, TensorSpec
from cosmos_runtime.quoting import quoted
from cosmos_runtime.validation import finite_array, token_count

if TYPE_CHECKING:
    from cosmos_runtime.manifest import Manifest

OUTPUT_BLOCKED = "output_blocked"

# The past that a graph reads and the present that it writes, by role.
_MEMORY_PARTS = (
    (Role.PAST_MEMORY_KEYS, Role.PRESENT_MEMORY_KEYS),
    (Role.PAST_MEMORY_VALUES, Role.PRESENT_MEMORY_VALUES),
)
# A call each microsecond for nine years: what is more is no number of calls.
_MOST_CALLS = 2**48
STATE_PARTS = (*_MEMORY_PARTS, (Role.PAST_QUERY, Role.PRESENT_QUERY))

Scores = Mapping[str, npt.NDArray[Any]]


class Diagnosis:
    """What the heads found of one row in one call: all of it or, where that was not wanted, whether it is blocked."""

    def __init__(self, scores: Scores, settings: Mapping[str, Any], row: int = 0, *, complete: bool = True) -> None:
        self._scores, self._settings, self._row, self._complete = scores, settings, row, complete

    @property
    def scores(self) -> dict[str, Any]:
        """The row's scores, by the names of `score_specs`. Raises: InputError where they were not computed."""
        self._check_complete()
        return {name: tensor[self._row] for name, tensor in self._scores.items()}

    @property
    def blocked(self) -> bool:
        """Whether the output was withheld as unsafe: its logits are all zero."""
        return OUTPUT_BLOCKED in self._scores and bool(self._scores[OUTPUT_BLOCKED][self._row])

    def report(self) -> dict[str, Any]:
        """The nested diagnostics, as the eager model gives them. Raises: InputError where they were not computed."""
        self._check_complete()
        return nested_diagnostics(self._scores, self._settings, self._row)

    def _check_complete(self) -> None:
        if not self._complete:
            raise InputError(
                "diagnostics: this call was made without them, so what only a report reads was not computed; pass "
                "diagnostics=True to what makes the call (generate, generate_batch, new_decoder, new_batch_decoder)"
            )


class MemoryBank:
    """What the heads keep over a sequence of calls, one row a sequence; `Session.new_memory` makes one.

    That is the working memory and, in a decoder, the vector of a row's first token. `calls` (B,) counts the calls of
    each row so far, and decides which entries of the memory there are. Graphs write into the buffers that they read:
    who has `turn` may have them run.
    """

    def __init__(self, graph: GraphSpec, manifest: "Manifest", batch: int, calls: int | None, stream: Stream) -> None:
        self.batch, self.device, self._stream = batch, stream.device, stream
        self.turn = threading.Lock()
        self.slots, self._size = memory_slots(manifest, calls), memory_slots(manifest)
        shapes = [(*self._shape(tensor), item_size(tensor.dtype)) for tensor, _ in state_pairs(graph)]
        check_room(stream.device, sum(map(math.prod, shapes)) + 8 * batch, f"a memory of {batch} rows")
        self.calls = np.zeros(batch, np.int64)
        with stream.working():
            self._arrays = {tensor.name: self._zeros(tensor, stream) for tensor, _ in state_pairs(graph)}
        self._roles = {tensor.name: tensor.role for tensor, _ in state_pairs(graph)}

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return sum(array.size for array in self._arrays.values())

    def restore(self, keys: npt.ArrayLike, values: npt.ArrayLike, calls: int) -> None:
        """Put in a working memory that was kept: keys and values (B, M, D), and the calls that every row has behind it.

        Entry n of a row was stored by a call whose number leaves the remainder n modulo M.
        Raises: InputError for arrays of another shape or with numbers that are not finite, for `calls` that are no
        number of calls, and where the model has no working memory; the bank is then as it was.
        """
        places = {self._roles[name]: array for name, array in self._arrays.items()}
        if Role.PAST_MEMORY_KEYS not in places:
            raise InputError("restore: expected a model with the memory capability; this one keeps no working memory")
        count = token_count("restore: calls", calls, minimum=0)
        if count > _MOST_CALLS:
            raise InputError(f"restore: calls: expected at most {_MOST_CALLS:,}, got {quoted(calls)}")
        given = {Role.PAST_MEMORY_KEYS: ("keys", keys), Role.PAST_MEMORY_VALUES: ("values", values)}
        kept = [
            (finite_array(f"restore: {name}", numbers, places[role].shape, places[role].dtype), places[role])
            for role, (name, numbers) in given.items()
        ]
        with self._stream.working():
            for array, place in kept:
                self._stream.upload(array, place)
        self.calls[:] = count

    def check_room(self, rows: slice) -> None:
        """Raises: InputError where another call of these rows would lose an entry that the model still has."""
        if self.slots < self._size and self.calls[rows].max() >= self.slots:
            raise InputError(
                f"memory: made for {self.slots} calls, and this is one more; make a larger one with "
                f"session.new_memory({self.batch}, calls=...)"
            )

    def bind(self, binding: Binding, pair: tuple[TensorSpec, TensorSpec], rows: slice) -> None:
        """Bind a state as past and present at once, for some rows."""
        past, present = pair
        array = self._arrays[past.name]
        width = int(np.prod(array.shape[1:]))
        part = array.memory((rows.stop - rows.start, *array.shape[1:]), first=rows.start * width)
        binding.bind_in_place(past.name, present.name, part)

    def _zeros(self, tensor: TensorSpec, stream: Stream) -> DeviceArray:
        """Zeros: an entry that is not there is weighted with 0, which NaN would survive."""
        array = DeviceArray(self._shape(tensor), tensor.dtype, self.device)
        stream.clear(array.address, array.size)
        return array

    def _shape(self, tensor: TensorSpec) -> tuple[int, ...]:
        return (self.batch, *(axis if isinstance(axis, int) else self.slots for axis in tensor.shape[1:]))


class HeadBinding:
    """The heads' tensors of one binding: the state of some rows in place, scores into arrays of the host.

    Without `diagnostics`, a graph that can is told that nobody wants the scores that only a report reads. They are not
    bound then, as nothing comes of them.
    """

    def __init__(
        self,
        graph: GraphSpec,
        manifest: "Manifest",
        binding: Binding,
        bank: MemoryBank,
        rows: slice,
        *,
        diagnostics: bool = True,
    ) -> None:
        self._graph, self._manifest, self._binding = graph, manifest, binding
        self._bank, self._rows, self._batch = bank, rows, rows.stop - rows.start
        self._calls = bank.calls[rows]  # the bank's own
        self._names = {tensor.role: tensor.name for tensor in graph.inputs}
        self._complete = diagnostics or Role.WANTS_SCORES not in self._names
        if Role.WANTS_SCORES in self._names:
            binding.bind_input(self._names[Role.WANTS_SCORES], np.array([self._complete]))
        settings: Mapping[str, Any] = (manifest.capabilities or {}).get("settings", {})
        scores = self._bind_scores()
        self._diagnoses = [Diagnosis(scores, settings, row, complete=self._complete) for row in range(self._batch)]
        self._ends_call: bool | None = None
        for pair in state_pairs(graph):
            bank.bind(binding, pair, rows)

    def diagnosis(self, row: int = 0) -> Diagnosis:
        """What the last call that ended found of a row, counted from the first of `rows`; valid until the next one."""
        return self._diagnoses[row]

    def prepare(self, stream: Stream, *, ends_call: bool = True) -> None:
        """To be called before a run. One that does not end a call gets a small memory for itself: what it writes there
        is for nothing."""
        if ends_call:
            self._bank.check_room(self._rows)
        switched = ends_call != self._ends_call
        if switched:
            self._switch(ends_call, stream)
        if switched or stream.device != HOST:  # another device has a copy
            self._bind_calls(ends_call)

    def done(self, *, ends_call: bool = True) -> None:
        """To be called after a run that succeeded."""
        if ends_call:
            self._calls += 1

    def _switch(self, ends_call: bool, stream: Stream) -> None:
        self._ends_call = ends_call
        if Role.ENDS_CALL not in self._names:
            return
        self._binding.bind_input(self._names[Role.ENDS_CALL], np.array([ends_call]))
        bank, rows = self._bank, self._rows
        if not ends_call:
            bank, rows = MemoryBank(self._graph, self._manifest, self._batch, 1, stream), slice(0, self._batch)
        for pair in state_pairs(self._graph, _MEMORY_PARTS):
            bank.bind(self._binding, pair, rows)

    def _bind_calls(self, ends_call: bool) -> None:
        if Role.MEMORY_CALLS in self._names:
            calls = self._calls if ends_call else np.zeros(self._batch, np.int64)
            self._binding.bind_input(self._names[Role.MEMORY_CALLS], calls)

    def _bind_scores(self) -> dict[str, npt.NDArray[Any]]:
        given = [tensor for tensor in self._graph.outputs if tensor.role == Role.SCORE]
        specs = given if self._complete else [tensor for tensor in given if tensor.name == OUTPUT_BLOCKED]
        scores = {t.name: np.zeros((self._batch, *map(int, t.shape[1:])), t.dtype) for t in specs}
        for name, array in scores.items():
            self._binding.bind_output(name, array)
        return scores


def state_pairs(
    graph: GraphSpec, parts: tuple[tuple[Role, Role], ...] = STATE_PARTS
) -> list[tuple[TensorSpec, TensorSpec]]:
    """Each state that a graph has, with the output that continues it."""
    roles = {tensor.role for tensor in graph.inputs}
    return [(graph.input(past), graph.output(present)) for past, present in parts if past in roles]


def has_heads(manifest: "Manifest") -> bool:
    """Whether a bundle's model has capability heads, be it their fusion alone."""
    return manifest.capabilities is not None


def memory_slots(manifest: "Manifest", calls: int | None = None) -> int:
    """M for a sequence of so many calls: as many, within what the model keeps and what a graph needs; None for all."""
    memory = (manifest.capabilities or {}).get("memory")
    if memory is None:
        return 0
    size = int(memory["size"])
    return size if calls is None else max(int(memory["least"]), min(size, calls))
