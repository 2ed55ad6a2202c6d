"""The buffers of one device loop, and the work that it gives to its device.

    B  batch    L  cache length    V  vocabulary    T  a prompt's tokens

Nothing here waits for the device, except where graphs are captured.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import TokenIds
from cosmos_runtime.binding import GraphBinding, device_run_options
from cosmos_runtime.cache import KeyValueCache
from cosmos_runtime.decoder_graph import DecoderGraph
from cosmos_runtime.device_samplers import Samplers, Work
from cosmos_runtime.device_stream import DeviceArray, Pending
from cosmos_runtime.manifest import Role, TensorSpec

# A prefill takes at most so many tokens at once, padding included: activations are (tokens, width).
PREFILL_TOKENS = 8192

# What a sampler writes, and what it is at the next step.
_NEXT = {
    Role.NEXT_TOKENS: Role.TOKENS,
    Role.NEXT_LAST_INDEX: Role.LAST_INDEX,
    Role.NEXT_HISTORY: Role.HISTORY,
    Role.NEXT_SEEN: Role.SEEN,
}
_graph_ids = itertools.count(1)


class Reading:
    """Copies of the history (B, L) and of the last chosen logits (B, 1) that are under way."""

    def __init__(self, history: Pending, logits: Pending) -> None:
        self._history, self._logits = history, logits

    def wait(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Both, valid until the reading after the next but one."""
        return self._history.wait(), self._logits.wait()


class DeviceSlot:
    """Buffers for `batch` rows of up to `length` tokens, bound once and captured once; one request at a time."""

    def __init__(self, graph: DecoderGraph, batch: int, length: int) -> None:
        self.batch, self.length, self._graph, self.stream = batch, length, graph, graph.stream
        self._cache = KeyValueCache(graph.spec, batch, length, graph.stream)
        self._arrays: dict[str, DeviceArray] = {}
        self._samplers: dict[str, Work] = {}
        self._steps: dict[str, Sequence[Work]] = {}  # a token of the decoder, and the choice of the next one
        self._logits = self._array(graph.spec.output(Role.LOGITS))
        self._staged = _Staging(graph, batch, min(PREFILL_TOKENS, batch * length))
        self._readings = itertools.cycle([self._host_arrays() for _ in range(3)])
        self._prefill_options = device_run_options(-1)
        self._decoder = _Captured(graph.device_binding())
        self._bind_decoder(self._decoder.binding)
        self._capture(self._decoder)

    def add_sampler(self, name: str, samplers: Samplers) -> None:
        """Have a sampler choose over these buffers, unless one of that name does already."""
        if name in self._samplers:
            return
        kernel = samplers.kernel(name, self._array)
        sampler = self._samplers[name] = kernel or self._captured_sampler(name, samplers)
        decoder = self._decoder.binding.launches()
        self._steps[name] = [decoder.followed_by(kernel)] if kernel and decoder else [self._decoder, sampler]

    def begin(self, name: str, prompts: Sequence[TokenIds], values: Mapping[Role, npt.NDArray[Any]]) -> None:
        """Forget the last request: set what the sampler keeps, fill the cache with prompts, choose the first tokens."""
        for role, value in values.items():
            self.stream.upload(np.ascontiguousarray(value), self._arrays[role])
        for first, rows in groups([len(prompt) for prompt in prompts]):
            self._prefill(first, [prompts[row] for row in rows])
        self._samplers[name].enqueue()

    def step(self, name: str) -> None:
        """One more token for every row."""
        for work in self._steps[name]:
            work.enqueue()

    def read(self) -> Reading:
        """Copy what has been chosen to the host, behind the work so far."""
        history, logits = next(self._readings)
        return Reading(
            self.stream.download(self._arrays[Role.HISTORY], history),
            self.stream.download(self._arrays[Role.CHOSEN_LOGIT], logits),
        )

    def _prefill(self, first: int, prompts: Sequence[TokenIds]) -> None:
        """Put prompts (T,) into as many rows of the cache from `first` on, padded to the longest."""
        longest = max(len(prompt) for prompt in prompts)
        binding = self._graph.device_binding()
        self._cache.bind(binding, first, len(prompts))
        shape = (len(prompts), self._graph.vocab_size)
        binding.bind_output_memory(self._graph.logits, self._logits.memory(shape, first * shape[1]))
        for start in range(0, longest, PREFILL_TOKENS):  # a row that is longer than that is alone
            pieces = [prompt[start : start + PREFILL_TOKENS] for prompt in prompts]
            self._staged.bind(binding, self.stream, pieces, before=start)
            binding.enqueue(self._prefill_options)

    def _bind_decoder(self, binding: GraphBinding) -> None:
        spec = self._graph.spec
        self._cache.bind(binding)
        for role in (Role.TOKENS, Role.LAST_INDEX):
            tensor = spec.input(role)
            binding.bind_input_memory(tensor.name, self._array(tensor, columns=1).memory())
        rows = DeviceArray((self.batch,), "int64", self.stream.device)
        self.stream.upload(np.arange(self.batch), rows)
        binding.bind_input_memory(spec.input(Role.LOGIT_ROWS).name, rows.memory())
        # For the choice of kernels; how long a row is stands in its last index.
        binding.bind_input(spec.input(Role.TOTAL_LENGTH).name, np.array(self.length, np.int32))
        binding.bind_output_memory(self._graph.logits, self._logits.memory())

    def _captured_sampler(self, name: str, samplers: Samplers) -> "_Captured":
        spec, sampler = samplers.specs[name], _Captured(GraphBinding(samplers.graph(name), name))
        for tensor in spec.inputs:
            sampler.binding.bind_input_memory(tensor.name, self._array(tensor).memory())
        for tensor in spec.outputs:
            sampler.binding.bind_output_memory(tensor.name, self._array(tensor).memory())
        self._capture(sampler)
        return sampler

    def _array(self, tensor: TensorSpec, columns: int | None = None) -> DeviceArray:
        """The buffer that a tensor of this role, or its next value, is in; made when it is first asked for, with zeros.

        A dynamic axis is B where it is the first, L (or `columns`) where it is the second.
        """
        role = _NEXT.get(Role(tensor.role), Role(tensor.role))
        if role not in self._arrays:
            sizes = (self.batch, self.length if columns is None else columns)
            shape = tuple(a if isinstance(a, int) else sizes[i] for i, a in enumerate(tensor.shape))
            self._arrays[role] = DeviceArray(shape, tensor.dtype, self.stream.device)
            self.stream.clear(self._arrays[role].address, self._arrays[role].size)
        return self._arrays[role]

    def _capture(self, captured: "_Captured") -> None:
        """Run once, on what lies in the buffers: ONNX Runtime runs a graph that it captures three times."""
        with self.stream.capturing():
            captured.enqueue()
            self.stream.wait()

    def _host_arrays(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        history = self.stream.host_array((self.batch, self.length), "int64")
        return history, self.stream.host_array((self.batch, 1), "float32")


class _Captured:
    """A binding with the options to capture its run, and replay it."""

    def __init__(self, binding: GraphBinding) -> None:
        self.binding, self._options = binding, device_run_options(next(_graph_ids))

    def enqueue(self) -> None:
        self.binding.enqueue(self._options)


class _Staging:
    """Where a prefill's inputs lie on the device while it computes."""

    def __init__(self, graph: DecoderGraph, batch: int, tokens: int) -> None:
        device, self._spec = graph.stream.device, graph.spec
        self._tokens = DeviceArray((tokens,), "int64", device)
        self._last = DeviceArray((batch,), "int32", device)
        self._rows = DeviceArray((batch,), "int64", device)

    def bind(self, binding: GraphBinding, stream: Any, prompts: Sequence[TokenIds], before: int) -> None:
        """Pieces (T,) of prompts behind the first `before` tokens of each, with logits of their last positions."""
        lengths, longest = [len(prompt) for prompt in prompts], max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        ends = np.array(lengths) - 1
        staged = (
            (Role.TOKENS, ids, self._tokens),
            (Role.LAST_INDEX, (before + ends).astype(np.int32), self._last),
            (Role.LOGIT_ROWS, np.arange(len(prompts)) * longest + ends, self._rows),
        )
        for role, values, array in staged:
            stream.upload(values, array)
            binding.bind_input_memory(self._spec.input(role).name, array.memory(values.shape))
        binding.bind_input(self._spec.input(Role.TOTAL_LENGTH).name, np.array(before + longest, np.int32))


def groups(lengths: Sequence[int], limit: int = PREFILL_TOKENS) -> Iterator[tuple[int, range]]:
    """Neighbouring rows whose prompts go through the model together: at most `limit` tokens, padding included.

    Each as its first row and all of its rows. A row that is longer than the limit is alone.
    """
    first = 0
    while first < len(lengths):
        end, longest = first + 1, lengths[first]
        while end < len(lengths) and (end + 1 - first) * max(longest, lengths[end]) <= limit:
            longest = max(longest, lengths[end])
            end += 1
        yield first, range(first, end)
        first = end
