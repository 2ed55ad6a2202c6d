"""Samplers as kernels of our own, in the place of a bundle's sampler graphs: one launch chooses every row's next token.

    B  batch    L  cache length    V  vocabulary    C  candidates

`sampling_kernels.cu` reads and writes the buffers that a sampler graph would, by their roles, and chooses the same.
"""

import ctypes
import os
from collections.abc import Mapping

from cosmos_runtime.cuda_graph import CudaModule, Launch, LaunchSequence, device
from cosmos_runtime.decode_kernels import SWITCH
from cosmos_runtime.device_sampling import most_candidates
from cosmos_runtime.device_stream import CudaStream, DeviceArray, Stream
from cosmos_runtime.kernel_compiler import compiled, joined_source
from cosmos_runtime.manifest import SAMPLER, GraphSpec, Role

SOURCE = "sampling_kernels.cu"
# As in it: blocks that share a row, their threads, groups of a row's tokens.
_PARTS, _THREADS, _GROUPS = 32, 1024, 1024
# A warp draws from the candidates, two of them a lane.
_MOST_CANDIDATES = 64
_FUNCTIONS = {f"{SAMPLER}.{choice}": f"choose_{choice}" for choice in ("greedy", "top_k", "any")}
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
        self._modules: dict[int, CudaModule] = {}

    def sampler(self, name: str, spec: GraphSpec, arrays: Mapping[Role, DeviceArray]) -> LaunchSequence | None:
        """The kernel that does what the sampler graph `name` does, over buffers by role; None where there is none.

        Raises: ProviderError without a compiler, CosmosRuntimeError without room on the device.
        """
        function = _FUNCTIONS.get(name.removesuffix(".penalty"))
        usual = min(_MOST_CANDIDATES, self._vocab_size)  # so that all kinds are one program
        candidates = most_candidates({name: spec}) or usual
        if function is None or candidates > _MOST_CANDIDATES:
            return None
        batch, length = arrays[Role.HISTORY].shape
        between = DeviceArray((batch, _GROUPS), "int64", self._stream.device)
        done = DeviceArray((batch,), "int32", self._stream.device)
        self._stream.clear(done.address, done.size)
        places = [arrays[role].address if role in arrays else 0 for role in _ROLES]
        buffers = _Buffers(*places, between.address, done.address, length)
        kernel = self._module(candidates).function(function, 0)
        launch = Launch(kernel, (_PARTS * batch, 1, 1), _THREADS, 0, [buffers], early=True)
        return LaunchSequence(self._stream, [launch], [between, done])

    def _module(self, candidates: int) -> CudaModule:
        if candidates not in self._modules:
            macros = definitions(self._vocab_size, candidates)
            code = compiled(joined_source(SOURCE), macros, device(self._stream).architecture)
            self._modules[candidates] = CudaModule(self._stream, code)
        return self._modules[candidates]


def sampling_kernels(stream: Stream, vocab_size: int) -> SamplingKernels | None:
    """The kernels for what computes on `stream`; None on the host, and where all is left to ONNX Runtime."""
    if not isinstance(stream, CudaStream) or os.environ.get(SWITCH) == "0":
        return None
    return SamplingKernels(stream, vocab_size)


def definitions(vocab_size: int, candidates: int) -> dict[str, object]:
    """The macros that `sampling_kernels.cu` wants."""
    return {"VOCAB": vocab_size, "CANDIDATES": candidates}
