"""One graph run with its inputs and outputs in memory that the caller owns: nothing is copied, nothing is allocated.

Binding costs some microseconds a tensor, so what stays where it is stays bound from run to run.
"""

import math
import os
import time
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from cosmos_runtime.errors import CosmosRuntimeError, first_line

if TYPE_CHECKING:
    import onnxruntime

    from cosmos_runtime.cuda_graph import LaunchSequence

Array: TypeAlias = npt.NDArray[Any]

HOST = "cpu"
LOG_FATAL_ONLY = 4

# onnx.TensorProto.BFLOAT16
BFLOAT16 = 16


class Memory(NamedTuple):
    """A tensor's place on a device; `owner` is the object that keeps it alive."""

    device: str
    dtype: str
    shape: tuple[int, ...]
    address: int
    owner: object


class Binding(Protocol):
    """Names of a graph's tensors bound to buffers, whatever computes the graph; `GraphBinding` says what each does."""

    graph_seconds: float

    def bind_input(self, name: str, array: Array) -> None:
        """Read `name` from a contiguous array on the host."""
        ...

    def bind_output(self, name: str, array: Array) -> None:
        """Write `name` into a contiguous array on the host."""
        ...

    def bind_in_place(self, source: str, target: str, memory: Memory) -> None:
        """Read input `source` from, and write output `target` into, the same memory."""
        ...

    def run(self) -> None:
        """Compute. Raises: CosmosRuntimeError."""
        ...

    def cancel(self) -> None:
        """Make later runs fail, and the one in progress where that is possible."""
        ...


class LoadedGraph(Protocol):
    """A graph that is ready to run, whatever computes it."""

    def new_binding(self, place: str) -> Binding:
        """Nothing bound yet; errors name `place`."""
        ...


class OnnxGraph:
    """A graph that ONNX Runtime has loaded."""

    def __init__(self, inference: "onnxruntime.InferenceSession") -> None:
        self._inference = inference

    def new_binding(self, place: str) -> "GraphBinding":
        """Nothing bound yet; errors name `place`."""
        return GraphBinding(self._inference, place)


class GraphBinding:
    """Names of a graph's tensors bound to buffers; `run` then computes from the bound inputs into the bound outputs.

    `place` is what errors name, `graph_seconds` the time spent inside ONNX Runtime so far.
    """

    def __init__(self, inference: "onnxruntime.InferenceSession", place: str) -> None:
        self._inference, self._place = inference, place
        self._binding = inference.io_binding()
        self._options = _run_options()
        self._owners: dict[str, object] = {}  # ONNX Runtime keeps an address only: this keeps the memory behind it
        self.graph_seconds = 0.0

    def bind_input(self, name: str, array: Array) -> None:
        """Read `name` from a contiguous array on the host. Other devices copy it now: bind again after a change."""
        self._owners[name] = array
        self._binding.bind_input(name, HOST, 0, array.dtype.type, array.shape, array.__array_interface__["data"][0])

    def bind_output(self, name: str, array: Array) -> None:
        """Write `name` into a contiguous array on the host, whose shape must be the result's."""
        self._owners[name] = array
        self._binding.bind_output(name, HOST, 0, array.dtype.type, array.shape, array.__array_interface__["data"][0])

    def bind_in_place(self, source: str, target: str, memory: Memory) -> None:
        """Read input `source` from, and write output `target` into, the same memory."""
        self.bind_input_memory(source, memory)
        self.bind_output_memory(target, memory)

    def bind_input_memory(self, name: str, memory: Memory) -> None:
        """Read `name` from a place on the device; what lies there at a run is what counts."""
        self._owners[name] = memory.owner
        self._binding.bind_input(name, *_where(memory))

    def bind_output_memory(self, name: str, memory: Memory) -> None:
        """Write `name` into a place on the device."""
        self._owners[name] = memory.owner
        self._binding.bind_output(name, *_where(memory))

    def run(self) -> None:
        """Compute. Raises: CosmosRuntimeError where ONNX Runtime fails."""
        start = time.perf_counter()
        try:
            self._binding.synchronize_inputs()
            self._inference.run_with_iobinding(self._binding, self._options)
            self._binding.synchronize_outputs()
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise CosmosRuntimeError(f"{self._place}: ONNX Runtime failed: {first_line(error)}") from error
        self.graph_seconds += time.perf_counter() - start

    def enqueue(self, options: "onnxruntime.RunOptions") -> None:
        """Have the device compute after what it has to do already, and return. Raises: CosmosRuntimeError.

        Only for bindings to the device's own memory; `options` say so (see `device_run_options`).
        """
        try:
            self._inference.run_with_iobinding(self._binding, options)
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise CosmosRuntimeError(f"{self._place}: ONNX Runtime failed: {first_line(error)}") from error

    def launches(self) -> "LaunchSequence | None":
        """What `enqueue` gives to the device, where that is kernels of our own and nothing else; None otherwise."""
        return None

    def cancel(self) -> None:
        """Make the run in progress, if any, and every later one fail at once; may be called from another thread."""
        self._options.terminate = True


def element_type(dtype: str) -> Any:
    """What ONNX Runtime calls a type of the manifest: numpy's, or its own number for the one that numpy has not."""
    return BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type


def item_size(dtype: str) -> int:
    """Bytes of one element of a type of the manifest."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def allocate(shape: tuple[int, ...], dtype: str, device: str) -> "onnxruntime.OrtValue":
    """Memory for a tensor of a type of the manifest, with anything in it. Raises: CosmosRuntimeError without room."""
    from onnxruntime import OrtValue

    try:
        return OrtValue.ortvalue_from_shape_and_type(list(shape), element_type(dtype), device, 0)
    except Exception as error:  # ONNX Runtime's errors have no common base class
        raise CosmosRuntimeError(
            f"{device} has no room for {math.prod(shape) * item_size(dtype):,} more bytes; ask for fewer tokens or "
            f"rows, or free memory there"
        ) from error


def check_room(device: str, size: int, what: str) -> None:
    """Refuse to allocate `size` bytes on the host where it has fewer in all: the system might promise them, and end the
    process when they are used. Raises: CosmosRuntimeError."""
    if device == HOST and size > _memory_in_all():
        raise CosmosRuntimeError(
            f"{what}: {size:,} bytes are wanted, and this machine has {_memory_in_all():,} in all; ask for fewer "
            f"tokens or rows"
        )


@cache
def _memory_in_all() -> int:
    """Bytes of the host's memory; more than there can be where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, and not every system these names
        return 2**63


def device_run_options(graph_id: int) -> "onnxruntime.RunOptions":
    """Options of runs that are not waited for; runs of one `graph_id` are captured once and then replayed, -1 never."""
    from onnxruntime import RunOptions

    options = RunOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _where(memory: Memory) -> tuple[Any, ...]:
    return memory.device, 0, element_type(memory.dtype), memory.shape, memory.address


def _run_options() -> "onnxruntime.RunOptions":
    from onnxruntime import RunOptions

    options = RunOptions()
    options.log_severity_level = LOG_FATAL_ONLY  # a failure is raised, and a run that is cancelled is none
    # "No CUDA graph", which is the default: ONNX Runtime looks for the entry at every run, and not finding it is an
    # exception inside, 50 microseconds each time.
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options
