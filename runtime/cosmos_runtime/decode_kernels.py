"""One token of every row by kernels of our own: what they are compiled for, where weights lie, what is launched.

    B  batch    L  cache length    D  dim    H  heads    K  key/value heads    E  head_dim    F  hidden_dim

`decode_kernels.cu` reads each weight once at close to the speed of the memory, `step_*.cu` have one kernel for all of a
step where that is faster; ONNX Runtime computes everything else, prefills above all, with the same copy of the weights.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_runtime.binding import allocate
from cosmos_runtime.bundle import Bundle
from cosmos_runtime.cuda_graph import CudaModule, Launch, LaunchSequence, device
from cosmos_runtime.device_stream import CudaStream, DeviceArray
from cosmos_runtime.errors import BundleError, CosmosRuntimeError, ProviderError
from cosmos_runtime.kernel_compiler import compiled, joined_source
from cosmos_runtime.kernel_spec import KERNELS_NAME, KernelSpec, StoredMatrix, StoredTensor
from cosmos_runtime.whole_step import SOURCES, WholeStep, whole_step, whole_step_launch

if TYPE_CHECKING:
    import onnxruntime

SWITCH = "COSMOS_DECODE_KERNELS"  # "0" leaves all decoding to ONNX Runtime
# The first GPUs that multiply 16-bit matrices as the kernels do and copy to shared memory in the background.
OLDEST = (8, 0)

# As in decode_kernels.cu.
_WARPS, _RING, _THREADS = 8, 16, 256
# Parts of a row's positions that are attended to at once, at most; and blocks for them that one multiprocessor holds
# where there are several rows.
_SPLITS, _ATTENTION_BLOCKS = 32, 2
# Blocks of a product that one multiprocessor holds.
_BLOCKS = 3


def load_decode_kernels(bundle: Bundle, stream: CudaStream) -> "DecodeKernels | None":
    """The kernels for a bundle, its weights on the device; None where bundle or GPU are not made for them.

    Raises: BundleError, ProviderError, CosmosRuntimeError without room for the weights.
    """
    if KERNELS_NAME not in bundle.manifest.files or os.environ.get(SWITCH) == "0":
        return None
    if device(stream).capability < OLDEST:
        return None
    spec = KernelSpec.from_json(bundle.file(KERNELS_NAME).read_text(encoding="utf-8"))
    return DecodeKernels(spec, bundle, stream)


class DecodeKernels:
    """The weights of one bundle on one GPU, and its kernels, compiled for each batch when it first comes.

    `initializers` are the weights by name, for ONNX Runtime to compute with where they lie.
    """

    def __init__(self, spec: KernelSpec, bundle: Bundle, stream: CudaStream) -> None:
        self.spec, self.stream, self._device = spec, stream, device(stream)
        self._weights = _place(spec, bundle, stream)
        self._modules: dict[int, tuple[CudaModule, WholeStep | None]] = {}

    @property
    def initializers(self) -> Mapping[str, "onnxruntime.OrtValue"]:
        """Views of the weights, which ONNX Runtime takes for memory of the caller's."""
        from onnxruntime import OrtValue

        return {name: OrtValue.from_dlpack(value) for name, value in self._weights.items()}

    def step(self, batch: int, length: int, inputs: Mapping[str, int], cache: Sequence[int]) -> LaunchSequence:
        """One token for each of `batch` rows of a cache of `length` places.

        `inputs` are the addresses of tokens, last_index and logits; `cache` those of the keys of every layer, then of
        the values.
        """
        if batch not in self._modules:
            self._modules[batch] = self._module(batch)
        module, plan = self._modules[batch]
        whole = plan and whole_step_launch(self, module, plan, length, inputs, cache)
        if whole:
            return LaunchSequence(self.stream, [whole[0]], whole[1])
        separate = SeparateKernels(self, module, batch, length, inputs, cache)
        return LaunchSequence(self.stream, separate.launches(), separate.scratch.values())

    def _module(self, batch: int) -> tuple[CudaModule, WholeStep | None]:
        """The kernels for a batch, and how one of them is the whole step, if one is."""
        plan = whole_step(self.spec, batch, self._device)
        try:
            code = self._compiled(batch, plan)
        except CosmosRuntimeError:
            if plan is None:
                raise
            # Loads and stores of 128 bits want NVRTC 12.3: with an older one a step is separate kernels.
            plan, code = None, self._compiled(batch, None)
        return CudaModule(self.stream, code), plan

    def _compiled(self, batch: int, plan: WholeStep | None) -> bytes:
        macros = definitions(self.spec, batch, self._device.multiprocessors)
        macros |= plan.definitions(len(self.spec.layers)) if plan else {}
        return compiled(kernel_source(plan is not None), macros, self._device.architecture)

    def address(self, tensor: StoredTensor) -> int:
        """Where a weight lies."""
        return int(self._weights[tensor.name].data_ptr())

    def matrix(self, matrix: StoredMatrix) -> tuple[int, int]:
        """Addresses of values and scales."""
        return self.address(matrix.values), 0 if matrix.scales is None else self.address(matrix.scales)

    def splits(self, batch: int) -> int:
        """Parts of each row's positions that are attended to at once."""
        return splits(self.spec, batch, self._device.multiprocessors)

    def blocks(self, tiles: int) -> int:
        """Blocks of a product with so many tiles: all have equally many, and all are on the device at once."""
        turns = -(-tiles // (_BLOCKS * self._device.multiprocessors))
        return -(-tiles // turns)


def kernel_source(whole: bool) -> str:
    """The kernels as one CUDA program, with one for all of a step or without."""
    return joined_source("decode_kernels.cu", *(SOURCES if whole else ()))


def tiles(spec: KernelSpec) -> dict[str, int]:
    """Eights of rows that a block takes at once in each product, as the macros of the kernels: two where one would be a
    few bytes, or there are many."""
    gate = 2 if spec.layers[0].gate_up.bits < 16 and spec.hidden_dim % 16 == 0 else 1
    logits = 2 if spec.vocab_size % 16 == 0 else 1
    return {"QKV_TILES": 1, "OUT_TILES": 1, "GATE_TILES": gate, "DOWN_TILES": 1, "LOGIT_TILES": logits}


def splits(spec: KernelSpec, batch: int, multiprocessors: int) -> int:
    """Parts of each row's positions: no more than are on the device at once, as a block that waits for another's place
    costs more than a longer part."""
    return max(1, min(_SPLITS, _ATTENTION_BLOCKS * multiprocessors // (spec.kv_heads * batch)))


def definitions(spec: KernelSpec, batch: int, multiprocessors: int) -> dict[str, object]:
    """The macros that `decode_kernels.cu` wants."""
    matrix = spec.layers[0].qkv
    values: dict[str, object] = {
        "BATCH": batch,
        "DIM": spec.dim,
        "HEADS": spec.heads,
        "KV_HEADS": spec.kv_heads,
        "HEAD_DIM": spec.head_dim,
        "HIDDEN": spec.hidden_dim,
        "VOCAB": spec.vocab_size,
        "EPS": f"{spec.norm_eps!r}f",
        "SCALE": f"{spec.head_dim**-0.5!r}f",
        "SPLITS": splits(spec, batch, multiprocessors),
        "RING": _RING,
        "BITS": matrix.bits,
        "BLOCK": matrix.block or 1,
        "HEAD_BITS": spec.embedding.bits,
        "HEAD_BLOCK": spec.embedding.block or 1,
        **tiles(spec),
    }
    return values | ({"BFLOAT16": 1} if spec.dtype == "bfloat16" else {})


class SeparateKernels:
    """A step as five kernels a layer."""

    def __init__(
        self,
        kernels: DecodeKernels,
        module: CudaModule,
        batch: int,
        length: int,
        inputs: Mapping[str, int],
        cache: Sequence[int],
    ) -> None:
        self._kernels, self._module, self._batch, self._length = kernels, module, batch, length
        self._tiles, self._splits = tiles(kernels.spec), kernels.splits(batch)
        self._inputs, self._cache = inputs, cache
        self.scratch = self._buffers()

    def _buffers(self) -> dict[str, DeviceArray]:
        spec, batch, stream = self._kernels.spec, self._batch, self._kernels.stream
        group = spec.heads // spec.kv_heads
        arrays = {
            "hidden": DeviceArray((batch, spec.dim), "float32", stream.device),
            "qkv": DeviceArray((batch, (spec.heads + 2 * spec.kv_heads) * spec.head_dim), "float32", stream.device),
            "attended": DeviceArray((batch, spec.heads * spec.head_dim), spec.dtype, stream.device),
            "gated": DeviceArray((batch, spec.hidden_dim), spec.dtype, stream.device),
            "parts": DeviceArray(
                (batch * spec.kv_heads * self._splits * group, spec.head_dim + 4), "float32", stream.device
            ),
            "done": DeviceArray((batch, spec.kv_heads), "int32", stream.device),
        }
        stream.clear(arrays["done"].address, arrays["done"].size)
        return arrays

    def launches(self) -> list[Launch]:
        """The embedding, five kernels a layer, the logits."""
        spec, at = self._kernels.spec, {name: array.address for name, array in self.scratch.items()}
        address, layers = self._kernels.address, len(self._kernels.spec.layers)
        embedding = self._kernels.matrix(spec.embedding)
        embed = self._module.function("embed", 0)
        arguments = self._addresses(self._inputs["tokens"], *embedding, at["hidden"])
        launches = [Launch(embed, (self._batch, 1, 1), _THREADS, 0, arguments, early=False)]
        rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        for index, layer in enumerate(spec.layers):
            normed = (at["hidden"], address(layer.norm1), *self._kernels.matrix(layer.qkv), at["qkv"])
            launches.append(self._product("project_qkv", "QKV_TILES", rows, spec.dim, layer.qkv, 1, normed))
            launches.append(self._attention(self._cache[index], self._cache[layers + index], at))
            added = (at["attended"], *self._kernels.matrix(layer.out), at["hidden"])
            width = spec.heads * spec.head_dim
            launches.append(self._product("project_out", "OUT_TILES", spec.dim, width, layer.out, 1, added))
            normed = (at["hidden"], address(layer.norm2), *self._kernels.matrix(layer.gate_up), at["gated"])
            launches.append(
                self._product("project_gate_up", "GATE_TILES", spec.hidden_dim, spec.dim, layer.gate_up, 2, normed)
            )
            added = (at["gated"], *self._kernels.matrix(layer.down), at["hidden"])
            launches.append(
                self._product("project_down", "DOWN_TILES", spec.dim, spec.hidden_dim, layer.down, 1, added)
            )
        normed = (at["hidden"], address(spec.norm), *embedding, self._inputs["logits"])
        launches.append(
            self._product("project_logits", "LOGIT_TILES", spec.vocab_size, spec.dim, spec.embedding, 1, normed)
        )
        return launches

    def _product(
        self, name: str, tiles: str, rows: int, columns: int, matrix: StoredMatrix, parts: int, addresses: Sequence[int]
    ) -> Launch:
        """x (B, columns) times `parts` matrices (rows, columns)."""
        at_once = self._tiles[tiles]
        shared = shared_bytes(self._batch, columns, matrix, parts * at_once)
        blocks = (self._kernels.blocks(rows // 8 // at_once), 1, 1)
        function = self._module.function(name, shared)
        return Launch(function, blocks, _THREADS, shared, self._addresses(*addresses), early=True)

    def _attention(self, keys: int, values: int, at: Mapping[str, int]) -> Launch:
        spec, address = self._kernels.spec, self._kernels.address
        tail = (keys, values, address(spec.cos), address(spec.sin), at["parts"], at["done"], at["attended"])
        head = self._addresses(at["qkv"], self._inputs["last_index"])
        arguments = [*head, ctypes.c_int(self._length), *self._addresses(*tail)]
        threads = 256 if spec.heads // spec.kv_heads <= 4 else 128
        function = self._module.function("attend", 0)
        return Launch(function, (spec.kv_heads, self._splits, self._batch), threads, 0, arguments, early=True)

    @staticmethod
    def _addresses(*addresses: int) -> list[Any]:
        return [ctypes.c_uint64(address) for address in addresses]


def shared_bytes(batch: int, columns: int, matrix: StoredMatrix, sets: int) -> int:
    """Shared memory of a block: the ring of weights, the sums of its warps twice, and its input."""
    scales = 0 if matrix.scales is None else 512 // matrix.bits // matrix.block
    ring = _WARPS * (_RING // sets) * sets * (512 + 16 * scales)
    return ring + 2 * _WARPS * sets * batch * 8 * 4 + batch * (columns + 32) * 2


def _place(spec: KernelSpec, bundle: Bundle, stream: CudaStream) -> dict[str, "onnxruntime.OrtValue"]:
    """Every weight, read from the bundle into the device's memory."""
    path = bundle.file(spec.file)
    stored = np.memmap(path, np.uint8, "r")
    size = sum(tensor.size for tensor in spec.tensors())
    stream.reserve(size, "the weights")
    if size > stream.free_memory():
        raise ProviderError(
            f"provider 'cuda': the weights are {size:,} bytes, and {stream.free_memory():,} of the GPU's memory are "
            f"free; free memory there, export with a recipe of fewer bits (cuda-int4), or use provider='cpu'"
        )
    weights = {}
    for tensor in spec.tensors():
        if tensor.offset + tensor.size > stored.size:
            raise BundleError(
                f"{path}: expected {tensor.name} up to byte {tensor.offset + tensor.size:,}, got {stored.size:,} "
                f"bytes; export the bundle again"
            )
        value = allocate(tensor.shape, tensor.dtype, stream.device)
        stream.upload_to(stored[tensor.offset : tensor.offset + tensor.size], int(value.data_ptr()))
        weights[tensor.name] = value
    stream.wait()
    return weights
