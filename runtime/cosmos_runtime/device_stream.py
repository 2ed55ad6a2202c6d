"""What a loop on a device needs besides ONNX Runtime: a queue of work, memory, copies that nobody waits for.

`CudaStream` calls NVIDIA's driver library, which is wherever a GPU can be used at all; ONNX Runtime's sessions compute
on its stream. `HostStream` does the same on the CPU, at once.
https://docs.nvidia.com/cuda/cuda-driver-api/
"""

import ctypes
import ctypes.util
import sys
import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cosmos_runtime.binding import HOST, Memory, allocate, item_size
from cosmos_runtime.errors import CosmosRuntimeError, ProviderError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_STREAM_NON_BLOCKING, _EVENT_DISABLE_TIMING = 1, 2
_OUT_OF_MEMORY = 2

# Of the process, not of a stream: while any thread captures, CUDA fails what another thread allocates, copies or waits
# for, on whatever stream; and work that is given to a captured stream goes into the capture instead. Who has it may
# take it again: a run waits for its results.
_WORKING = threading.RLock()
_NOTHING: AbstractContextManager[object] = nullcontext()


class DeviceArray:
    """A tensor in a device's memory, where it stays."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._value = allocate(shape, dtype, device)
        self.address = int(self._value.data_ptr())

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape)) * item_size(self.dtype)

    def memory(self, shape: tuple[int, ...] | None = None, first: int = 0) -> Memory:
        """The whole of it, or a part of `shape` that begins at element `first`."""
        start = self.address + first * item_size(self.dtype)
        return Memory(self.device, self.dtype, self.shape if shape is None else shape, start, owner=self)


class Pending(Protocol):
    """A copy to the host that is under way."""

    def wait(self) -> npt.NDArray[Any]:
        """The copy, once it is there; valid until the next `download` into the same array."""
        ...


class Stream(Protocol):
    """Work for one device, done in the order in which it is given."""

    device: str

    def upload(self, values: npt.NDArray[Any], target: DeviceArray, first: int = 0) -> None:
        """Copy a contiguous array of the target's type to `target`, from its element `first` on."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Fill `size` bytes with zeros."""
        ...

    def download(self, source: DeviceArray, target: npt.NDArray[Any]) -> Pending:
        """Copy all of `source` to an array that `host_array` made, behind the work so far."""
        ...

    def host_array(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        """An array that `download` can write to while the host does other things."""
        ...

    def wait(self) -> None:
        """Until all work so far is done. Raises: CosmosRuntimeError where it failed."""
        ...

    def reserve(self, size: int, what: str) -> None:
        """Count `size` bytes for `what`. Raises: CosmosRuntimeError where that is beyond the limit that was set."""
        ...

    def release(self, size: int) -> None:
        """Count them no more."""
        ...

    def working(self) -> AbstractContextManager[object]:
        """To be held by a thread while it allocates, gives work or waits for it: none does so while one captures."""
        ...

    def capturing(self) -> AbstractContextManager[object]:
        """To be held while a graph is captured: no other thread may then wait for anything."""
        ...


class HostStream:
    """The host as a device: everything is done at once."""

    device = HOST

    def upload(self, values: npt.NDArray[Any], target: DeviceArray, first: int = 0) -> None:
        """Copy an array to `target`, from its element `first` on."""
        ctypes.memmove(target.memory(first=first).address, values.ctypes.data, values.nbytes)

    def clear(self, address: int, size: int) -> None:
        """Fill `size` bytes with zeros."""
        ctypes.memset(address, 0, size)

    def download(self, source: DeviceArray, target: npt.NDArray[Any]) -> Pending:
        """Copy all of `source` to `target`."""
        ctypes.memmove(target.ctypes.data, source.address, source.size)
        return _Done(target)

    def host_array(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        """Any array will do."""
        return np.empty(shape, dtype)

    def wait(self) -> None:
        """Nothing is ever pending."""

    def reserve(self, size: int, what: str) -> None:
        """The host's memory has no limit here."""

    def release(self, size: int) -> None:
        """Nothing was counted."""

    def working(self) -> AbstractContextManager[object]:
        """Threads need not wait for each other."""
        return _NOTHING

    def capturing(self) -> AbstractContextManager[object]:
        """Nothing is ever captured."""
        return _NOTHING


class CudaStream:
    """A CUDA stream of its own on the first GPU, in the context that ONNX Runtime uses, too.

    It is never destroyed: a session that computes on it may be collected after it. `memory_limit` bounds the bytes that
    weights and caches on it may have together.
    Raises: ProviderError where there is no driver or no GPU.
    """

    device = "cuda"

    def __init__(self, memory_limit: int | None = None) -> None:
        self._driver = Driver()
        self._limit, self._reserved, self._counting = memory_limit, 0, threading.Lock()
        # A cache is released when it is collected, which may be in the middle of `reserve`: it must not want the lock.
        self._released: deque[int] = deque()
        stream = ctypes.c_void_p()
        self._driver.call("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        self._stream = stream

    @property
    def handle(self) -> int:
        """The stream as a number: ONNX Runtime's provider option `user_compute_stream`."""
        return int(self._stream.value or 0)

    @property
    def driver(self) -> "Driver":
        """The driver library, for calls that streams have no method for."""
        return self._driver

    def upload(self, values: npt.NDArray[Any], target: DeviceArray, first: int = 0) -> None:
        """Copy a contiguous array to `target`, from its element `first` on."""
        self.upload_to(values, target.memory(first=first).address)

    def upload_to(self, values: npt.NDArray[Any], address: int) -> None:
        """Copy a contiguous array to an address on the device. The array may change afterwards: the driver has read
        pageable memory when it returns."""
        size = ctypes.c_size_t(values.nbytes)
        self._driver.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), _pointer(values), size, self._stream)

    def clear(self, address: int, size: int) -> None:
        """Fill `size` bytes with zeros."""
        self._driver.call("cuMemsetD8Async", ctypes.c_uint64(address), 0, ctypes.c_size_t(size), self._stream)

    def download(self, source: DeviceArray, target: npt.NDArray[Any]) -> Pending:
        """Copy all of `source` to an array that `host_array` made, behind the work so far."""
        size = ctypes.c_size_t(source.size)
        self._driver.call("cuMemcpyDtoHAsync_v2", _pointer(target), ctypes.c_uint64(source.address), size, self._stream)
        event = ctypes.c_void_p()
        self._driver.call("cuEventCreate", ctypes.byref(event), _EVENT_DISABLE_TIMING)
        self._driver.call("cuEventRecord", event, self._stream)
        return _Event(self._driver, event, target)

    def host_array(self, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        """An array in memory that the GPU can write to by itself; freed with its last view."""
        memory = _PinnedMemory(self._driver, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.frombuffer(memoryview(memory.buffer), dtype).reshape(shape)

    def wait(self) -> None:
        """Until all work so far is done."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def reserve(self, size: int, what: str) -> None:
        """Count `size` bytes for `what`. Raises: CosmosRuntimeError where that is beyond the limit that was set."""
        with self._counting:
            left = self._count_released()
            if left is not None and size > left:
                raise CosmosRuntimeError(
                    f"{what}: {size:,} bytes are wanted, and of a gpu_mem_limit of {self._limit:,} there are {left:,} "
                    f"left; ask for fewer tokens or rows, or load with a higher limit"
                )
            self._reserved += size

    def release(self, size: int) -> None:
        """Count them no more."""
        self._released.append(size)

    @property
    def memory_left(self) -> int | None:
        """Bytes of the limit that nobody has reserved; None without a limit."""
        with self._counting:
            return self._count_released()

    def _count_released(self) -> int | None:
        while self._released:
            self._reserved -= self._released.popleft()
        return None if self._limit is None else self._limit - self._reserved

    def working(self) -> AbstractContextManager[object]:
        """To be held by a thread while it allocates, gives work or waits for it."""
        return _WORKING

    def capturing(self) -> AbstractContextManager[object]:
        """To be held while a graph is captured."""
        return _WORKING

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that nobody uses."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


class _Done:
    """A copy that is there."""

    def __init__(self, target: npt.NDArray[Any]) -> None:
        self._target = target

    def wait(self) -> npt.NDArray[Any]:
        return self._target


class _Event:
    """A point in a stream's work, reached when the copy before it is complete."""

    def __init__(self, driver: "Driver", event: ctypes.c_void_p, target: npt.NDArray[Any]) -> None:
        self._driver, self._event, self._target = driver, event, target

    def wait(self) -> npt.NDArray[Any]:
        with _WORKING:
            self._driver.call("cuEventSynchronize", self._event)
        return self._target

    def __del__(self) -> None:
        self._driver.release("cuEventDestroy_v2", self._event)


class _PinnedMemory:
    """Page-locked memory of the host."""

    def __init__(self, driver: "Driver", size: int) -> None:
        self._driver, self._pointer = driver, ctypes.c_void_p()
        driver.call("cuMemHostAlloc", ctypes.byref(self._pointer), ctypes.c_size_t(size), 0)
        buffer: Any = (ctypes.c_uint8 * size).from_address(int(self._pointer.value or 0))
        self.buffer = buffer
        buffer.owner = self  # arrays over it keep the buffer, and the buffer keeps this

    def __del__(self) -> None:
        if self._pointer.value:
            self._driver.release("cuMemFreeHost", self._pointer)


class Driver:
    """The driver library, with the first GPU's primary context current in whichever thread calls."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise ProviderError(
                f"provider 'cuda': the NVIDIA driver is not installed ({error}); install it, or use provider='cpu'"
            ) from error
        self._context = ctypes.c_void_p()
        device = ctypes.c_int()
        try:
            self._check(self._library.cuInit(0), "cuInit")
            self._check(self._library.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
            retained = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device)
            self._check(retained, "cuDevicePrimaryCtxRetain")
        except CosmosRuntimeError as error:
            raise ProviderError(f"provider 'cuda': no GPU can be used: {error}; check `nvidia-smi`") from error

    def call(self, name: str, *arguments: object) -> None:
        """Raises: CosmosRuntimeError with the driver's own words."""
        self._library.cuCtxSetCurrent(self._context)
        self._check(getattr(self._library, name)(*arguments), name)

    def release(self, name: str, *arguments: object) -> None:
        """Free something; what fails then cannot be helped, and may be in a program that is ending."""
        self._library.cuCtxSetCurrent(self._context)
        getattr(self._library, name)(*arguments)

    def _check(self, status: int, name: str) -> None:
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        cure = "; ask for fewer tokens or rows" if status == _OUT_OF_MEMORY else ""
        raise CosmosRuntimeError(f"{name}: CUDA error {status}: {(text.value or b'unknown').decode()}{cure}")


def _pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
