"""One graph run with its inputs and outputs in memory that the caller owns: nothing is copied, nothing is allocated.

Binding costs some microseconds a tensor, so what stays where it is stays bound from run to run.
"""

import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from cosmos_runtime.errors import CosmosRuntimeError
from cosmos_runtime.providers import first_line

if TYPE_CHECKING:
    import onnxruntime

Array: TypeAlias = npt.NDArray[Any]

HOST = "cpu"
LOG_FATAL_ONLY = 4


class Memory(NamedTuple):
    """A tensor's place on a device; `owner` is the object that keeps it alive."""

    device: str
    dtype: str
    shape: tuple[int, ...]
    address: int
    owner: object


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
        self._owners[source] = self._owners[target] = memory.owner
        where = (memory.device, 0, np.dtype(memory.dtype).type, memory.shape, memory.address)
        self._binding.bind_input(source, *where)
        self._binding.bind_output(target, *where)

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

    def cancel(self) -> None:
        """Make the run in progress, if any, and every later one fail at once; may be called from another thread."""
        self._options.terminate = True


def _run_options() -> "onnxruntime.RunOptions":
    from onnxruntime import RunOptions

    options = RunOptions()
    options.log_severity_level = LOG_FATAL_ONLY  # a failure is raised, and a run that is cancelled is none
    # "No CUDA graph", which is the default: ONNX Runtime looks for the entry at every run, and not finding it is an
    # exception inside, 50 microseconds each time.
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options
