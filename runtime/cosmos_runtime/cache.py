"""Keys and values of the tokens that a decoder has seen: computed once, kept, and extended in place.

B  batch    L  cache length    K  key/value heads    E  head_dim
"""

import math
import weakref
from typing import TYPE_CHECKING

import numpy as np

from cosmos_runtime.binding import HOST, Binding, Memory, allocate, check_room, item_size
from cosmos_runtime.device_stream import HostStream, Stream
from cosmos_runtime.manifest import GraphSpec, Role, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

# A cache is allocated in steps of this many tokens.
_LENGTH_MULTIPLE = 32

# The past that a graph reads and the present that it writes, by role.
CACHE_PARTS = ((Role.PAST_KEY, Role.PRESENT_KEY), (Role.PAST_VALUE, Role.PRESENT_VALUE))


class KeyValueCache:
    """One buffer (B, K, L, E) a layer and part. It holds what a request needs and never grows.

    A graph that has a buffer bound as both past and present writes the new tokens into it, and copies nothing. How
    many of its L places hold a token is the attention mask's affair: forgetting tokens is passing a shorter mask.
    """

    def __init__(self, graph: GraphSpec, batch: int, length: int, stream: Stream | None = None) -> None:
        self.batch, self.length, self._stream = batch, length, stream or HostStream()
        self.device = self._stream.device
        self._pairs = cache_pairs(graph)
        what = f"a cache of {batch} x {length} tokens"
        check_room(self.device, self.size, what)
        self._stream.reserve(self.size, what)
        weakref.finalize(self, self._stream.release, self.size)
        with self._stream.working():
            self._values = [self._zeros(past) for past, _ in self._pairs]

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return sum(_bytes(past, self.batch, self.length) for past, _ in self._pairs)

    @property
    def addresses(self) -> list[int]:
        """Where each buffer lies in its device's memory, in the order of the graph's inputs."""
        return [int(value.data_ptr()) for value in self._values]

    def bind(self, binding: Binding, row: int | None = None, rows: int = 1) -> None:
        """Bind every buffer as past and present at once; with `row`, that one and those behind it, `rows` in all."""
        batch, first = (self.batch, 0) if row is None else (rows, row)
        for (past, present), address in zip(self._pairs, self.addresses, strict=True):
            start = address + first * _bytes(past, 1, self.length)
            memory = Memory(self.device, past.dtype, _shape(past, batch, self.length), start, owner=self)
            binding.bind_in_place(past.name, present.name, memory)

    def _zeros(self, past: TensorSpec) -> "onnxruntime.OrtValue":
        """Zeros: a place that holds no token yet is weighted with 0, which NaN would survive."""
        from onnxruntime import OrtValue

        shape = _shape(past, self.batch, self.length)
        if (
            self.device == HOST and past.dtype != "bfloat16"
        ):  # which the system hands out when they are first written to
            return OrtValue.ortvalue_from_numpy(np.zeros(shape, past.dtype))
        value = allocate(shape, past.dtype, self.device)
        self._stream.clear(value.data_ptr(), _bytes(past, self.batch, self.length))
        return value


def cache_pairs(graph: GraphSpec) -> list[tuple[TensorSpec, TensorSpec]]:
    """Each past of a graph with the present that continues it: keys of every layer, then values of every layer."""
    return [
        pair
        for past, present in CACHE_PARTS
        for pair in zip(_of_role(graph.inputs, past), _of_role(graph.outputs, present), strict=True)
    ]


def cache_length(tokens: int, max_sequence_length: int) -> int:
    """L for a request of so many tokens: rounded up, within what the model can ever use."""
    rounded = -(-tokens // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    return min(rounded, max_sequence_length)


def _of_role(tensors: tuple[TensorSpec, ...], role: Role) -> list[TensorSpec]:
    return [tensor for tensor in tensors if tensor.role == role]


def _shape(past: TensorSpec, batch: int, length: int) -> tuple[int, ...]:
    _, heads, _, channels = past.shape
    return (batch, int(heads), length, int(channels))


def _bytes(past: TensorSpec, batch: int, length: int) -> int:
    return math.prod(_shape(past, batch, length)) * item_size(past.dtype)
