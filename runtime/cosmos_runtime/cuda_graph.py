"""Kernels of one's own on a `CudaStream`: loading machine code, launching, and replaying many launches as one.

https://docs.nvidia.com/cuda/cuda-driver-api/
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cosmos_runtime.device_stream import CudaStream, DeviceArray

_MOST_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_COOPERATIVE = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
_EARLY_START = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# CU_STREAM_CAPTURE_MODE_RELAXED: what is freed meanwhile, in this thread or another, is no part of the graph.
_RELAXED = 2
_MULTIPROCESSORS, _MAJOR, _MINOR, _SHARED = 16, 75, 76, 97  # CUdevice_attribute
_NON_BLOCKING = 1
# From this compute capability on, a kernel may start before the last one is done.
_EARLY_START_FROM = (9, 0)


class Device(NamedTuple):
    """What code is made for: compute capability, multiprocessors, bytes of shared memory that a block may have."""

    capability: tuple[int, int]
    multiprocessors: int
    shared: int

    @property
    def architecture(self) -> str:
        """As compilers call it, such as "sm_90"."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_ubyte * 64))


class _Configuration(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Launch(NamedTuple):
    """One kernel: its function in a module, blocks, threads of each, bytes of shared memory, arguments (addresses, as
    ctypes numbers of 64 bits, 32-bit integers, structures). `early`: it waits by itself for the one before it.
    `together`: all of its blocks have to be on the device at once, as they wait for each other."""

    function: ctypes.c_void_p
    blocks: tuple[int, int, int]
    threads: int
    shared: int
    arguments: Sequence[ctypes.c_uint64 | ctypes.c_int | ctypes.Structure]
    early: bool
    together: bool = False


class CudaModule:
    """Loaded machine code. It is never unloaded: its graphs may be replayed as long as the process lives."""

    def __init__(self, stream: "CudaStream", code: bytes) -> None:
        self._driver, self._handle = stream.driver, ctypes.c_void_p()
        self._driver.call("cuModuleLoadData", ctypes.byref(self._handle), ctypes.c_char_p(code))

    def function(self, name: str, shared: int) -> ctypes.c_void_p:
        """A kernel that may use so many bytes of shared memory."""
        function = ctypes.c_void_p()
        self._driver.call("cuModuleGetFunction", ctypes.byref(function), self._handle, name.encode())
        if shared:
            self._driver.call("cuFuncSetAttribute", function, _MOST_DYNAMIC_SHARED, shared)
        return function

    def blocks_at_once(self, function: ctypes.c_void_p, threads: int, shared: int) -> int:
        """How many blocks of a kernel one multiprocessor holds."""
        blocks, name = ctypes.c_int(), "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        self._driver.call(name, ctypes.byref(blocks), function, ctypes.c_int(threads), ctypes.c_size_t(shared))
        return blocks.value


class LaunchSequence:
    """Kernels that run one after another, over buffers that stay where they are; `kept` are those that are its own.

    They are given to the device one by one the first time, and replayed as one graph afterwards.
    """

    def __init__(self, stream: "CudaStream", launches: Iterable[Launch], kept: Iterable["DeviceArray"] = ()) -> None:
        self._stream, self._driver, self._launches, self._kept = stream, stream.driver, tuple(launches), tuple(kept)
        self._early = device(stream).capability >= _EARLY_START_FROM
        self._graph: ctypes.c_void_p | None = None
        self._given = False

    def enqueue(self) -> None:
        """Have the device do all of it after what it has to do already. Raises: CosmosRuntimeError."""
        if not self._given:
            self._launch_all(ctypes.c_void_p(self._stream.handle))
            self._given = True
            return
        if self._graph is None:
            self._graph = self._captured()
        self._driver.call("cuGraphLaunch", self._graph, ctypes.c_void_p(self._stream.handle))

    def followed_by(self, other: "LaunchSequence") -> "LaunchSequence":
        """This and then another, as one."""
        launches, kept = (*self._launches, *other._launches), (*self._kept, *other._kept)
        return LaunchSequence(self._stream, launches, kept)

    def _captured(self) -> ctypes.c_void_p:
        """On a stream that nobody else uses: whatever is given to one that is captured becomes part of the graph."""
        aside, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self._driver.call("cuStreamCreate", ctypes.byref(aside), _NON_BLOCKING)
        try:
            self._driver.call("cuStreamBeginCapture_v2", aside, _RELAXED)
            self._launch_all(aside)
            self._driver.call("cuStreamEndCapture", aside, ctypes.byref(graph))
            self._driver.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
            self._driver.call("cuGraphDestroy", graph)
        finally:
            self._driver.release("cuStreamDestroy_v2", aside)
        return executable

    def _launch_all(self, stream: ctypes.c_void_p) -> None:
        for launch in self._launches:
            values = (ctypes.c_void_p * len(launch.arguments))(
                *(ctypes.cast(ctypes.pointer(argument), ctypes.c_void_p) for argument in launch.arguments)
            )
            wanted = [_COOPERATIVE] if launch.together else [_EARLY_START] if launch.early and self._early else []
            attributes = (_Attribute * 1)(*(_Attribute(id=number) for number in wanted))
            attributes[0].value[0] = 1
            shape = (*launch.blocks, launch.threads, 1, 1, launch.shared)
            configuration = _Configuration(*shape, stream, attributes, len(wanted))
            self._driver.call("cuLaunchKernelEx", ctypes.byref(configuration), launch.function, values, None)

    def __del__(self) -> None:
        if self._graph is not None:
            self._driver.release("cuGraphExecDestroy", self._graph)


def device(stream: "CudaStream") -> Device:
    """The GPU of a stream."""

    def attribute(number: int) -> int:
        value, first = ctypes.c_int(), ctypes.c_int()
        stream.driver.call("cuDeviceGet", ctypes.byref(first), 0)
        stream.driver.call("cuDeviceGetAttribute", ctypes.byref(value), number, first)
        return value.value

    return Device((attribute(_MAJOR), attribute(_MINOR)), attribute(_MULTIPROCESSORS), attribute(_SHARED))
