"""One row's token as one kernel, where weights have 4 or 8 bits and the GPU holds it (`step_*.cu`).

    D  dim    H  heads    K  key/value heads    E  head_dim    F  hidden_dim    V  vocab_size

Its blocks, one a multiprocessor, give each other what they computed and have weights copied ahead meanwhile, so a layer
costs no way from one kernel to the next. With 16-bit weights and for several rows separate kernels are faster.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosmos_runtime.cuda_graph import CudaModule, Device, Launch
from cosmos_runtime.device_stream import DeviceArray
from cosmos_runtime.kernel_spec import KernelSpec, StoredMatrix

if TYPE_CHECKING:
    from cosmos_runtime.decode_kernels import DecodeKernels

# They follow `decode_kernels.cu`, in this order.
SOURCES = ("step_exchange.cu", "step_products.cu", "step_attention.cu", "step_kernel.cu")
# The first GPUs whose threads have rows copied to shared memory for them.
_OLDEST = (9, 0)
# As in step_exchange.cu.
_WARPS, _THREADS = 8, 288
# A stage holds 32 rows of 2048 columns in 4 bits with their scales; a block that copies ahead has two of them at least.
_STAGE_BYTES, _FEWEST_STAGES, _MOST_PARTS, _MOST_GROUP = 39424, 2, 32, 4
_RECORD_MORE = 4  # numbers of a record besides its head's channels


@dataclass(frozen=True)
class WholeStep:
    """How the step is divided: blocks, how many of them share a key/value head's positions, stages in which weights
    come, bytes of shared memory of a block."""

    blocks: int
    parts: int
    stages: int
    shared: int

    def definitions(self, layers: int) -> dict[str, object]:
        """The macros that `step_*.cu` want besides those of `decode_kernels.cu`."""
        divided = {"GRID": self.blocks, "PARTS": self.parts, "STAGES": self.stages, "STAGE_BYTES": _STAGE_BYTES}
        return {"LAYERS": layers, "WHOLE_SHARED": self.shared, **divided}


def whole_step(spec: KernelSpec, batch: int, device: Device) -> WholeStep | None:
    """How one kernel is the whole step; None where the batch, the weights or the GPU are not made for it."""
    group = spec.heads // spec.kv_heads
    if batch != 1 or device.capability < _OLDEST or group > _MOST_GROUP or spec.dtype != "float16":
        return None
    rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    # Every block has rows of these two products, so what it gives says that it has read what came before.
    blocks = min(device.multiprocessors, rows // 8, spec.hidden_dim // 8)
    parts = _parts(spec, blocks)
    fixed = _fixed_bytes(spec, blocks)
    stages = (device.shared - fixed) // (_STAGE_BYTES + 16)
    fits = parts > 0 and stages >= _FEWEST_STAGES
    if not fits or not all(_streams(*product, stages) for product in _products(spec, rows)):
        return None
    return WholeStep(blocks, parts, stages, fixed + stages * (_STAGE_BYTES + 16))


def whole_step_launch(
    kernels: "DecodeKernels",
    module: CudaModule,
    plan: WholeStep,
    length: int,
    inputs: Mapping[str, int],
    cache: Sequence[int],
) -> tuple[Launch, Sequence[DeviceArray]] | None:
    """The kernel over buffers that stay where they are, as `DecodeKernels.step` describes them, and what it keeps on
    the device; None where the GPU has no room for all of its blocks at once."""
    function = module.function("whole_step", plan.shared)
    if module.blocks_at_once(function, _THREADS, plan.shared) == 0:
        return None
    spec, stream = kernels.spec, kernels.stream
    layers, given = _layers(kernels, cache), _exchanged(spec, plan)
    between = DeviceArray((sum(given) + 1,), "int32", stream.device)
    stream.clear(between.address, between.size)  # as of an even layer, and the first is an odd one
    starts = between.address + 4 * np.cumsum([0, *given])
    of_layers, of_step = DeviceArray((len(layers),), "int64", stream.device), DeviceArray((17,), "int64", stream.device)
    step = [*(inputs[name] for name in ("tokens", "last_index", "logits")), length, of_layers.address]
    step += [*kernels.matrix(spec.embedding), *map(kernels.address, (spec.norm, spec.cos, spec.sin)), *starts]
    for numbers, array in ((layers, of_layers), (step, of_step)):
        stream.upload(np.array(numbers, np.uint64).view(np.int64), array)
    arguments = [ctypes.c_uint64(of_step.address)]
    launch = Launch(function, (plan.blocks, 1, 1), _THREADS, plan.shared, arguments, early=False, together=True)
    return launch, (between, of_layers, of_step)


def _layers(kernels: "DecodeKernels", cache: Sequence[int]) -> list[int]:
    """What each layer reads, in the order of `Layer` in step_attention.cu."""
    found, count = list[int](), len(kernels.spec.layers)
    for index, layer in enumerate(kernels.spec.layers):
        found += [kernels.address(layer.norm1), *kernels.matrix(layer.qkv), *kernels.matrix(layer.out)]
        found += [kernels.address(layer.norm2), *kernels.matrix(layer.gate_up), *kernels.matrix(layer.down)]
        found += [cache[index], cache[count + index]]
    return found


def _exchanged(spec: KernelSpec, plan: WholeStep) -> list[int]:
    """How many words of 4 bytes blocks give each other, in the order of `Step` in step_attention.cu."""
    rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    records = spec.heads * plan.parts * (spec.head_dim + _RECORD_MORE)
    dim, width, hidden = (-(-size // 256) * 256 for size in (spec.dim, spec.heads * spec.head_dim, spec.hidden_dim))
    return [dim, dim, rows, records, width // 2, hidden // 2]


def _parts(spec: KernelSpec, blocks: int) -> int:
    """Blocks that share a key/value head, a power of two, each with some channels of one head; 0 where that fails."""
    group = spec.heads // spec.kv_heads
    most, parts = min(_MOST_PARTS, blocks // spec.kv_heads, group * spec.head_dim // 8), 1
    while 2 * parts <= most:
        parts *= 2
    channels = group * spec.head_dim // parts
    teams = spec.head_dim % 8 == 0 and 32 % (spec.head_dim // 8) == 0  # lanes that share a head, as a part of a warp
    fits = most >= 1 and teams and channels % 8 == 0 and channels <= 32 * _WARPS and spec.head_dim % channels == 0
    return parts if fits else 0


def _fixed_bytes(spec: KernelSpec, blocks: int) -> int:
    """Shared memory besides the stages, as `Everything` in step_attention.cu, rounded up generously."""
    group, columns = spec.heads // spec.kv_heads, max(spec.dim, spec.hidden_dim, spec.heads * spec.head_dim)
    attention = 4 * group * spec.head_dim + 4 * spec.head_dim + 4 * _WARPS * group * (spec.head_dim + _RECORD_MORE)
    between = max(2 * columns, attention) + columns // 16 * 4 + 4 * (2 * _WARPS * 32 + _WARPS)
    kept = 12 * group * spec.head_dim + 32 * -(-spec.dim // 8 // blocks) + 4 * spec.head_dim
    return -(-(between + kept + 96 * len(spec.layers) + 256) // 16) * 16


def _products(spec: KernelSpec, rows: int) -> list[tuple[StoredMatrix, int, int, int]]:
    """Matrices with their rows and columns, and how many lie one above the other."""
    layer, width = spec.layers[0], spec.heads * spec.head_dim
    projections = [(layer.qkv, rows, spec.dim, 1), (layer.out, spec.dim, width, 1)]
    projections += [(layer.gate_up, spec.hidden_dim, spec.dim, 2), (layer.down, spec.dim, spec.hidden_dim, 1)]
    return [*projections, (spec.embedding, spec.vocab_size, spec.dim, 1)]


def _streams(matrix: StoredMatrix, rows: int, columns: int, parts: int, stages: int) -> bool:
    """Whether a matrix can be copied in stages and multiplied, as `Streamed` in step_products.cu divides it."""
    if matrix.bits not in (4, 8) or rows % 8:
        return False
    lane = 128 // matrix.bits
    if matrix.block % lane or 4 * lane % matrix.block or columns % matrix.block:
        return False
    row, scales, chunks = columns * matrix.bits // 8, columns // matrix.block * 2, 1
    while parts * 16 * (row // chunks + 64 + scales // chunks + 16) > _STAGE_BYTES:
        chunks *= 2
    whole = columns % (chunks * 4 * lane) == 0 and row % (16 * chunks) == 0 and scales % (16 * chunks) == 0
    return whole and chunks <= min(stages, _WARPS)
