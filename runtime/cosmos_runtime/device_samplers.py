"""A session's samplers, over the buffers of any device loop: kernels of our own, or the bundle's graphs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from cosmos_runtime.bundle import Bundle
from cosmos_runtime.cuda_graph import LaunchSequence
from cosmos_runtime.device_stream import DeviceArray, Stream
from cosmos_runtime.manifest import SAMPLER, GraphSpec, Role, TensorSpec
from cosmos_runtime.providers import create_inference_session
from cosmos_runtime.sampling_kernels import sampling_kernels

if TYPE_CHECKING:
    import onnxruntime


class Work(Protocol):
    """Something for a device to do, over buffers that stay where they are."""

    def enqueue(self) -> None:
        """After what the device has to do already. Raises: CosmosRuntimeError."""
        ...


class Samplers:
    """The samplers of a bundle on one stream, loaded when they are first used; `specs` has their signatures by name."""

    def __init__(self, bundle: Bundle, provider: str, stream: Stream) -> None:
        self.specs: dict[str, GraphSpec] = {
            name: spec for name, spec in bundle.manifest.graphs.items() if name.startswith(f"{SAMPLER}.")
        }
        self._kernels = sampling_kernels(stream, bundle.manifest.vocab_size)
        self._bundle, self._provider, self._stream = bundle, provider, stream
        self._graphs: dict[str, onnxruntime.InferenceSession] = {}

    def graph(self, name: str) -> "onnxruntime.InferenceSession":
        """A sampler as a graph that can be captured."""
        if name not in self._graphs:
            file = self._bundle.file(self.specs[name].file)
            self._graphs[name] = create_inference_session(file, self._provider, 1, self._stream, replays=True)
        return self._graphs[name]

    def kernel(self, name: str, array: Callable[[TensorSpec], DeviceArray]) -> LaunchSequence | None:
        """A sampler as a kernel, over the buffers that `array` has for its tensors; None where there is none."""
        if self._kernels is None:
            return None
        spec = self.specs[name]
        return self._kernels.sampler(name, spec, {Role(t.role): array(t) for t in (*spec.inputs, *spec.outputs)})
