"""A decoder whose single tokens are computed by `DecodeKernels`, and everything else by ONNX Runtime.

B  batch    L  cache length    V  vocabulary
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_runtime.binding import Array, GraphBinding, Memory, OnnxGraph
from cosmos_runtime.cache import cache_pairs
from cosmos_runtime.cuda_graph import LaunchSequence
from cosmos_runtime.decode_kernels import DecodeKernels
from cosmos_runtime.device_stream import DeviceArray
from cosmos_runtime.errors import CosmosRuntimeError
from cosmos_runtime.kernel_spec import MOST_ROWS
from cosmos_runtime.manifest import GraphSpec, Role

if TYPE_CHECKING:
    import onnxruntime


class KernelGraph(OnnxGraph):
    """A decoder graph that ONNX Runtime has loaded, with kernels for its single tokens."""

    def __init__(self, inference: "onnxruntime.InferenceSession", spec: GraphSpec, kernels: DecodeKernels) -> None:
        super().__init__(inference)
        self._spec, self._kernels = spec, kernels

    def new_binding(self, place: str) -> GraphBinding:
        """Nothing bound yet; errors name `place`."""
        return KernelBinding(self._inference, place, self._spec, self._kernels)


class KernelBinding(GraphBinding):
    """Takes what is bound to the kernels where that is one token a row, with its logits; to ONNX Runtime otherwise."""

    def __init__(
        self, inference: "onnxruntime.InferenceSession", place: str, spec: GraphSpec, kernels: DecodeKernels
    ) -> None:
        super().__init__(inference, place)
        self._kernels, self._bound, self._late = kernels, dict[str, Array | Memory](), dict[str, Array]()
        self._tokens, self._last = spec.input(Role.TOKENS).name, spec.input(Role.LAST_INDEX).name
        self._rows, self._logits = spec.input(Role.LOGIT_ROWS).name, spec.output(Role.LOGITS).name
        self._pasts = [past.name for past, _ in cache_pairs(spec)]
        self._staged: dict[str, DeviceArray] = {}
        self._step: tuple[tuple[int, ...], LaunchSequence] | None = None
        self._cancelled = False

    def bind_input(self, name: str, array: Array) -> None:
        """Read `name` from a contiguous array on the host."""
        self._bound[name] = self._late[name] = array  # ONNX Runtime gets it, which is a copy, when it runs

    def bind_output(self, name: str, array: Array) -> None:
        """Write `name` into a contiguous array on the host, whose shape must be the result's."""
        self._bound[name] = array
        super().bind_output(name, array)

    def bind_input_memory(self, name: str, memory: Memory) -> None:
        """Read `name` from a place on the device."""
        self._bound[name] = memory
        super().bind_input_memory(name, memory)

    def bind_output_memory(self, name: str, memory: Memory) -> None:
        """Write `name` into a place on the device."""
        self._bound[name] = memory
        super().bind_output_memory(name, memory)

    def run(self) -> None:
        """Compute. Raises: CosmosRuntimeError where that fails."""
        if not self._is_one_token():
            self._bind_late()
            super().run()
            return
        if self._cancelled:
            raise CosmosRuntimeError(f"{self._place}: cancelled")
        start = time.perf_counter()
        stream = self._kernels.stream
        for name in (self._tokens, self._last):
            bound = self._bound[name]
            if not isinstance(bound, Memory):
                stream.upload(np.ascontiguousarray(bound), self._stage(name, bound))
        self._current_step().enqueue()
        logits = self._bound[self._logits]
        if isinstance(logits, Memory):
            stream.wait()
        else:
            stream.download(self._stage(self._logits, logits), logits).wait()
        self.graph_seconds += time.perf_counter() - start

    def enqueue(self, options: "onnxruntime.RunOptions") -> None:
        """Have the device compute after what it has to do already, and return. Raises: CosmosRuntimeError."""
        if self._is_one_token():
            self._current_step().enqueue()
        else:
            self._bind_late()
            super().enqueue(options)

    def launches(self) -> LaunchSequence | None:
        """What `enqueue` gives to the device, where ONNX Runtime has no part in it."""
        return self._current_step() if self._is_one_token() else None

    def cancel(self) -> None:
        """Make every later run fail at once; may be called from another thread."""
        self._cancelled = True
        super().cancel()

    def _bind_late(self) -> None:
        for name, array in self._late.items():
            super().bind_input(name, array)
        self._late.clear()

    def _takes(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] == 1 and shape[0] <= MOST_ROWS

    def _is_one_token(self) -> bool:
        """Whether every row has one new token, and gets its logits."""
        tokens, logits, rows = (self._bound.get(name) for name in (self._tokens, self._logits, self._rows))
        if tokens is None or logits is None or not self._takes(tokens.shape) or len(logits.shape) != 2:
            return False
        in_order = isinstance(rows, Memory) or (rows is not None and np.array_equal(rows, np.arange(tokens.shape[0])))
        return in_order and logits.shape[0] == tokens.shape[0]

    def _current_step(self) -> LaunchSequence:
        """The step over the buffers that are bound, made when they are first seen together."""
        first = self._bound[self._pasts[0]]
        addresses = [self._address(name) for name in (self._tokens, self._last, self._logits)]
        cache = [self._address(name) for name in self._pasts]
        known = (*addresses, *cache)
        if self._step is None or self._step[0] != known:
            inputs = dict(zip(("tokens", "last_index", "logits"), addresses, strict=True))
            batch, length = first.shape[0], first.shape[2]
            self._step = known, self._kernels.step(batch, length, inputs, cache)
        return self._step[1]

    def _address(self, name: str) -> int:
        bound = self._bound[name]
        return bound.address if isinstance(bound, Memory) else self._stage(name, bound).address

    def _stage(self, name: str, array: Any) -> DeviceArray:
        """Where an array of the host is on the device."""
        if name not in self._staged or self._staged[name].shape != array.shape:
            self._staged[name] = DeviceArray(array.shape, str(array.dtype), self._kernels.stream.device)
        return self._staged[name]
