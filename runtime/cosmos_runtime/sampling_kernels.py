"""Samplers as kernels of our own, in the place of a bundle's sampler graphs: one launch chooses every row's next token,
or three where a nucleus is cut out of the whole vocabulary.

    B  batch    L  cache length    V  vocabulary    C  candidates

They read and write the buffers that a sampler graph would, by their roles, and choose the same.
"""

import ctypes
import os
from collections.abc import Mapping

from cosmos_runtime.cuda_graph import CudaModule, Launch, LaunchSequence, device
from cosmos_runtime.decode_kernels import SWITCH
from cosmos_runtime.device_stream import CudaStream, DeviceArray, Stream
from cosmos_runtime.kernel_compiler import compiled, joined_source
from cosmos_runtime.manifest import SAMPLER, GraphSpec, Role

# The second takes longer to compile than all else, so that it is left out where it is not wanted.
SOURCES = ("sampling_kernels.cu", "nucleus_kernels.cu")
# As in them: blocks that share a row, their threads, numbers of 64 bits that a row has for what blocks tell each other.
_PARTS, _THREADS, _SCRATCH = 32, 1024, 3072
# A warp draws from the candidates, two of them a lane.
_MOST_CANDIDATES = 64
_FUNCTIONS = {
    f"{SAMPLER}.greedy": ("choose_greedy",),
    f"{SAMPLER}.top_k": ("choose_top_k",),
    f"{SAMPLER}.any": ("choose_any",),
    f"{SAMPLER}.nucleus": ("nucleus_extent", "nucleus_border", "choose_nucleus"),
}
# What `Buffers` in the source has, in its order; then scratch, and L.
_ROLES = (
    Role.LOGITS,
    Role.TOKENS,
    Role.LAST_INDEX,
    Role.HISTORY,
    Role.LIMIT,
    Role.GOES_ON,
    Role.CHOSEN_LOGIT,
    Role.PENALTY,
    Role.SEEN,
    Role.SHARPNESS,
    Role.UNIFORMS,
    Role.RANK_BIAS,
    Role.TOP_P,
    Role.TOP_K,
    Role.EARLIEST,
)


class _Buffers(ctypes.Structure):
    _fields_ = (
        *((str(role), ctypes.c_uint64) for role in _ROLES),
        ("between", ctypes.c_uint64),
        ("done", ctypes.c_uint64),
        ("length", ctypes.c_int64),
    )


class SamplingKernels:
    """The kernels for one vocabulary, compiled when they are first used."""

    def __init__(self, stream: CudaStream, vocab_size: int) -> None:
        self._stream, self._vocab_size = stream, vocab_size
        self._modules: dict[tuple[int, tuple[str, ...]], CudaModule] = {}

    def sampler(self, name: str, spec: GraphSpec, arrays: Mapping[Role, DeviceArray]) -> LaunchSequence | None:
        """The kernel that does what the sampler graph `name` does, over buffers by role; None where there is none.

        Raises: ProviderError without a compiler, CosmosRuntimeError without room on the device.
        """
        functions = _FUNCTIONS.get(name.removesuffix(".penalty"))
        usual = min(_MOST_CANDIDATES, self._vocab_size)  # so that all kinds are one program
        candidates = int(spec.input(Role.RANK_BIAS).shape[1]) if spec.takes(Role.RANK_BIAS) else usual
        if functions is None or candidates > _MOST_CANDIDATES:
            return None
        batch, length = arrays[Role.HISTORY].shape
        between = DeviceArray((batch, _SCRATCH), "int64", self._stream.device)
        done = DeviceArray((batch,), "int32", self._stream.device)
        for array in (between, done):
            self._stream.clear(array.address, array.size)
        places = [arrays[role].address if role in arrays else 0 for role in _ROLES]
        buffers = _Buffers(*places, between.address, done.address, length)
        module = self._module(candidates, SOURCES if functions[0].startswith("nucleus") else SOURCES[:1])
        kernels = [module.function(function, 0) for function in functions]
        launches = [Launch(kernel, (_PARTS * batch, 1, 1), _THREADS, 0, [buffers], early=True) for kernel in kernels]
        return LaunchSequence(self._stream, launches, [between, done])

    def _module(self, candidates: int, sources: tuple[str, ...]) -> CudaModule:
        if (candidates, sources) not in self._modules:
            macros = definitions(self._vocab_size, candidates)
            code = compiled(joined_source(*sources), macros, device(self._stream).architecture)
            self._modules[candidates, sources] = CudaModule(self._stream, code)
        return self._modules[candidates, sources]


def sampling_kernels(stream: Stream, vocab_size: int) -> SamplingKernels | None:
    """The kernels for what computes on `stream`; None on the host, and where all is left to ONNX Runtime."""
    if not isinstance(stream, CudaStream) or os.environ.get(SWITCH) == "0":
        return None
    return SamplingKernels(stream, vocab_size)


def definitions(vocab_size: int, candidates: int) -> dict[str, object]:
    """The macros that the sources want."""
    return {"VOCAB": vocab_size, "CANDIDATES": candidates}
