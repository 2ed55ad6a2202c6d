"""Gives a traced graph its values: each initializer reads its checkpoint tensors at the moment it is written.

Nothing is held: a tensor is mapped from the checkpoint, converted or quantised a few rows at a time, written and let
go, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from threading import Thread
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import CheckpointError, ExportError
from cosmos_export.model.capabilities import is_of_heads
from cosmos_export.model.loading import model_skeleton, skeleton
from cosmos_export.model.rope import rotary_tables
from cosmos_export.model.row_reading import RowReader
from cosmos_export.onnx.quantize import Quantization, QuantizedMatrix, dequantize, quantize_stacked, stack_rows
from cosmos_export.onnx.signature import ROTARY_COS, ROTARY_SIN, QuantizedPart, parts_of, quantized_part, source_of
from cosmos_export.recipe import ExportRecipe
from cosmos_export.stopwatch import QUANTISING, READING, Stopwatch
from cosmos_export.threads import map_in_threads
from cosmos_export.torch_programs.rows import quantize_rows
from cosmos_export.weight_files import StoredTensor

_STORED_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.UINT8)


# Name of the threads that let the disk begin with the next tensor.
ANNOUNCING = "announce next tensor"
# Of a tensor that is converted and written: 16 MB in float32.
_VALUES_AT_ONCE = 1 << 22
# The same of one that is transposed: both forms of half a megabyte are in a core's cache.
_TURNED_AT_ONCE = 1 << 17


class WeightReader:
    """What each initializer of a graph has to hold: what export writes and verification compares with."""

    def __init__(self, checkpoint: Checkpoint, recipe: ExportRecipe, stopwatch: Stopwatch | None = None) -> None:
        self.checkpoint, self.recipe = checkpoint, recipe
        self.dtype: torch.dtype = getattr(torch, recipe.activations)
        self.stopwatch = stopwatch or Stopwatch()
        self._last: tuple[str, QuantizedMatrix] | None = None
        self._following: dict[str, str] = {}

    def expect(self, initializers: Iterable[str]) -> None:
        """Says in which order they will be read: while one is computed, the disk may fetch the next."""
        sources = dict.fromkeys(source_of(quantized_part(name)[0])[0] for name in initializers)
        self._following = dict(pairwise(source for source in sources if source not in (ROTARY_COS, ROTARY_SIN)))

    def read(self, initializer: str) -> Tensor:
        """The tensor of an initializer, by its name. Raises CheckpointError where the checkpoint has none for it."""
        pieces = list(self.pieces(initializer))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def pieces(self, initializer: str) -> Iterator[Tensor]:
        """The tensor of an initializer from its first row to its last, some rows at a time, so that a matrix never is
        in memory in two precisions. A quantised matrix is one piece, and so is a transposed one. Raises as `read` does.
        """
        source, part = quantized_part(initializer)
        if part is not None:
            yield self._quantized_part(source, part)
            return
        source, transposed = source_of(initializer)
        if source in (ROTARY_COS, ROTARY_SIN):
            yield self._rotary(source)
        elif transposed:
            yield self._transposed(source)
        else:
            for tensor in self._parts(source):
                for rows in _some_rows(tensor, _VALUES_AT_ONCE):
                    yield self._rounded(source, rows).contiguous()

    def effective(self, source: str) -> Tensor:
        """The float32 values of a checkpoint tensor that the graph computes with: rounded where the recipe rounds."""
        form = self.recipe.form_of(source)
        matrix = self._matrix(source)
        if self.recipe.rounds_rows(source):
            return quantize_rows(matrix).values()
        if form is None:
            return self._rounded(source, matrix).to(torch.float32)
        stored = self._quantized(source, form)
        stored = replace(stored, scales=self._rounded(source, stored.scales).to(torch.float32))
        return dequantize(stored, matrix.shape[1], form)

    def _matrix(self, source: str) -> Tensor:
        parts = [tensor.to(torch.float32) for tensor in self._parts(source)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _transposed(self, source: str) -> Tensor:
        names, stored = parts_of(source), self.checkpoint.stored
        if not all(name in stored for name in names):  # some are made of several tensors, and none of those is large
            return self._rounded(source, self._matrix(source)).T.contiguous()
        columns = stored[names[0]].shape[1]
        result = torch.empty(columns, sum(stored[name].shape[0] for name in names), dtype=self.dtype)

        def turn(piece: tuple[int, Tensor]) -> None:
            first, rows = piece
            # By way of memory of their own, in a cache: torch turns whole matrices several times as fast as parts.
            result[:, first : first + len(rows)] = self._rounded(source, rows).T.contiguous()

        for _ in map_in_threads(turn, self._numbered_rows(source)):
            pass
        return result

    def _numbered_rows(self, source: str) -> Iterator[tuple[int, Tensor]]:
        first = 0
        for tensor in self._parts(source):
            for rows in _some_rows(tensor, _TURNED_AT_ONCE):
                yield first, rows
                first += len(rows)

    def _parts(self, source: str) -> Iterator[Tensor]:
        """What `source` holds, in matrices one above the other, in their own precision: the tensors of the model, and
        of those that are stacked of many some rows at a time."""
        names = parts_of(source)
        for name in names:
            announced = name != names[-1]
            for tensor in self._timed(RowReader(self.checkpoint, name).matrices(_VALUES_AT_ONCE)):
                if not announced:
                    self._announce_after(source)
                    announced = True
                yield tensor
                del tensor

    def _timed(self, tensors: Iterator[Tensor]) -> Iterator[Tensor]:
        while True:
            with self.stopwatch.during(READING):
                tensor = next(tensors, None)
            if tensor is None:
                return
            yield tensor
            del tensor

    def _announce_after(self, source: str) -> None:
        following, stored = self._following.get(source), self.checkpoint.stored
        if following is not None:  # what is made of several tensors is not stored under its name
            tensors = [stored[name] for name in parts_of(following) if name in stored]
            Thread(target=_announce, args=(tensors,), name=ANNOUNCING, daemon=True).start()

    def _quantized(self, source: str, form: Quantization) -> QuantizedMatrix:
        """As a calibration left it, where there was one; else rounded here, each block for itself."""
        calibrated, parts = self.checkpoint.calibrated, parts_of(source)
        if all(part in calibrated for part in parts):
            return stack_rows([calibrated[part] for part in parts])
        with self.stopwatch.during(QUANTISING):
            return quantize_stacked(self._parts(source), form)

    def _rounded(self, source: str, values: Tensor) -> Tensor:
        """`values` in the type that is computed with. Raises ExportError where they are beyond its range."""
        values = values.to(torch.float32)  # first, so that every precision is rounded from the same numbers
        rounded = values.to(self.dtype)
        if self.dtype == torch.float16 and bool((rounded.isinf() & values.isfinite()).any()):
            raise ExportError(
                f"{source} has values up to {values.abs().max():.3g}, and float16 ends at "
                f"{torch.finfo(self.dtype).max:g}; use a recipe with float32 or bfloat16 activations"
            )
        return rounded

    def _rotary(self, source: str) -> Tensor:
        config = self.checkpoint.config
        # The fused operator wants the tables in the type of its queries; standard operators turn them in float32.
        dtype = self.dtype if self.recipe.fuses_attention(config) else torch.float32
        cos, sin = rotary_tables(config.head_dim, config.rope_theta, config.max_sequence_length, dtype)
        return cos if source == ROTARY_COS else sin

    def _quantized_part(self, source: str, part: QuantizedPart) -> Tensor:
        # The parts of a matrix are written one after another, so the last one is worth keeping; no more than that.
        if self._last is None or self._last[0] != source:
            form = self.recipe.form_of(source)
            if form is None:
                raise ExportError(f"the graph holds {source} quantised, but recipe {self.recipe.name} does not say how")
            quantized = self._quantized(source, form)
            self._last = (source, replace(quantized, scales=self._rounded(source, quantized.scales)))
        tensor = getattr(self._last[1], part)
        if tensor is None:
            raise ExportError(f"{source} has no {part}: recipe {self.recipe.name} quantises it symmetrically")
        return tensor


def require_weights(checkpoint: Checkpoint, capabilities: Sequence[str] | None = None) -> None:
    """Raises CheckpointError that lists what a model with these capabilities (None: the plain decoder) is missing, or
    has in another shape."""
    config = checkpoint.config
    model = skeleton(config) if capabilities is None else model_skeleton(config, capabilities=capabilities)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in wanted if is_of_heads(name) and name not in checkpoint.stored]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(
            f"{checkpoint.origin.get('location')}: this checkpoint lacks weights of the capability heads asked for: "
            f"{', '.join(missing[:4])}{more}. Leave out the capabilities that it has not, or export the plain decoder "
            f"with --head lm"
        )
    checkpoint.require(wanted)


def attach_weights(
    model: ir.Model,
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    capabilities: Sequence[str] | None = None,
    stopwatch: Stopwatch | None = None,
) -> None:
    """Sets every valueless initializer of `model` to a lazy tensor that reads `checkpoint`.

    `capabilities` are those of a model with heads; None is the plain decoder. `stopwatch` hears how long reading and
    quantising take, when the tensors are written.
    Raises CheckpointError when tensors are missing or have another shape than the model's.
    """
    require_weights(checkpoint, capabilities)
    reader = WeightReader(checkpoint, recipe, stopwatch)
    valueless = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    reader.expect(valueless)
    for name, value in valueless.items():
        value.const_value = _Streamed(value, partial(reader.pieces, name))


class _Streamed(ir.LazyTensor):
    """An initializer that is made when it is written, piece by piece, and never whole unless somebody asks for that."""

    def __init__(self, value: ir.Value, pieces: Callable[[], Iterator[Tensor]]) -> None:
        if value.shape is None or value.dtype not in _STORED_TYPES:
            known = "float32, float16, bfloat16 or uint8"
            raise ExportError(f"initializer {value.name}: expected {known} of a known shape, got {value}")
        super().__init__(self._whole, dtype=value.dtype, shape=value.shape, name=value.name)
        self._pieces = pieces

    def _whole(self) -> ir.TensorProtocol:
        return ir.tensor(as_array(torch.cat(list(self._pieces()))))

    def tofile(self, file: Any) -> None:
        """Writes the tensor's bytes, as ONNX's external data are: row by row, little-endian."""
        written = sum(_write(file, piece) for piece in self._pieces())
        if written != self.nbytes:
            raise ExportError(f"{self.name} has {written:,} bytes, and the graph has room for {self.nbytes:,}")


def _announce(tensors: Iterable[StoredTensor]) -> None:
    for tensor in tensors:
        tensor.announce()


def _write(file: BinaryIO, piece: Tensor) -> int:
    data = as_array(piece.contiguous()).reshape(-1).view(np.uint8)
    file.write(data.data)
    return data.nbytes


def _some_rows(tensor: Tensor, values: int) -> Sequence[Tensor]:
    """Views of some rows each, together of about so many values; of a vector, of some of its numbers."""
    return tensor.split(max(1, values * len(tensor) // max(1, tensor.numel()))) if tensor.dim() else [tensor]


def as_array(tensor: Tensor) -> NDArray:
    """The tensor as a numpy array that shares its memory; numpy knows bfloat16 through ml_dtypes only."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    shared: NDArray = tensor.view(torch.int16).numpy().view(np.dtype(ml_dtypes.bfloat16))
    return shared
