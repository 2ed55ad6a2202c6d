"""Keys and values of the tokens that a decoder has seen: computed once, kept, and extended in place.

B  batch    L  cache length    K  key/value heads    E  head_dim
"""

from typing import TYPE_CHECKING

import numpy as np

from cosmos_runtime.binding import HOST, GraphBinding, Memory
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

    def __init__(self, graph: GraphSpec, batch: int, length: int, device: str) -> None:
        self.batch, self.length, self.device = batch, length, device
        self._pairs = cache_pairs(graph)
        self._values = [_allocate(_shape(past, batch, length), past.dtype, device) for past, _ in self._pairs]

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return sum(_bytes(past, self.batch, self.length) for past, _ in self._pairs)

    @property
    def addresses(self) -> list[int]:
        """Where each buffer lies in its device's memory, in the order of the graph's inputs."""
        return [int(value.data_ptr()) for value in self._values]

    def bind(self, binding: GraphBinding, row: int | None = None) -> None:
        """Bind every buffer as past and present at once; with `row`, that row alone, as a batch of one."""
        batch, first = (self.batch, 0) if row is None else (1, row)
        for (past, present), address in zip(self._pairs, self.addresses, strict=True):
            start = address + first * _bytes(past, 1, self.length)
            memory = Memory(self.device, past.dtype, _shape(past, batch, self.length), start, owner=self)
            binding.bind_in_place(past.name, present.name, memory)


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
    return int(np.prod(_shape(past, batch, length))) * np.dtype(past.dtype).itemsize


def _allocate(shape: tuple[int, ...], dtype: str, device: str) -> "onnxruntime.OrtValue":
    from onnxruntime import OrtValue

    if device == HOST:  # zeros that the system hands out when they are first written to
        return OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
    return OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, device, 0)
