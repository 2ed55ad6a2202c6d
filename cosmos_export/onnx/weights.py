"""Gives a traced graph its values: each initializer reads its checkpoint tensors at the moment it is written.

Nothing is held: a tensor is mapped from the checkpoint, converted, written and let go, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import ExportError
from cosmos_export.model.loading import skeleton
from cosmos_export.model.rope import rotary_tables
from cosmos_export.onnx.quantize import QuantizedMatrix, dequantize, quantize
from cosmos_export.onnx.signature import ROTARY_COS, ROTARY_SIN, QuantizedPart, parts_of, quantized_part, source_of
from cosmos_export.recipe import ExportRecipe


class WeightReader:
    """What each initializer of a graph has to hold: what export writes and verification compares with."""

    def __init__(self, checkpoint: Checkpoint, recipe: ExportRecipe) -> None:
        self.checkpoint, self.recipe = checkpoint, recipe
        self._last: tuple[str, QuantizedMatrix] | None = None

    def read(self, initializer: str) -> Tensor:
        """The tensor of an initializer, by its name. Raises CheckpointError where the checkpoint has none for it."""
        source, part = quantized_part(initializer)
        if part is not None:
            return self._quantized_part(source, part)
        source, transposed = source_of(initializer)
        if source in (ROTARY_COS, ROTARY_SIN):
            return self._rotary(source)
        matrix = self._matrix(source)
        return (matrix.T if transposed else matrix).contiguous()

    def effective(self, source: str) -> Tensor:
        """The float32 values of a checkpoint tensor that the graph computes with: rounded where the recipe rounds."""
        form = self.recipe.form_of(source)
        matrix = self._matrix(source)
        return matrix if form is None else dequantize(quantize(matrix, form), matrix.shape[1], form)

    def _matrix(self, source: str) -> Tensor:
        return torch.cat([self.checkpoint.tensor(part).to(torch.float32) for part in parts_of(source)])

    def _rotary(self, source: str) -> Tensor:
        config = self.checkpoint.config
        cos, sin = rotary_tables(config.head_dim, config.rope_theta, config.max_sequence_length, torch.float32)
        return cos if source == ROTARY_COS else sin

    def _quantized_part(self, source: str, part: QuantizedPart) -> Tensor:
        # The parts of a matrix are written one after another, so the last one is worth keeping; no more than that.
        if self._last is None or self._last[0] != source:
            form = self.recipe.form_of(source)
            if form is None:
                raise ExportError(f"the graph holds {source} quantised, but recipe {self.recipe.name} does not say how")
            self._last = (source, quantize(self._matrix(source), form))
        tensor = getattr(self._last[1], part)
        if tensor is None:
            raise ExportError(f"{source} has no {part}: recipe {self.recipe.name} quantises it symmetrically")
        return tensor


def attach_weights(model: ir.Model, checkpoint: Checkpoint, recipe: ExportRecipe) -> None:
    """Sets every valueless initializer of `model` to a lazy tensor that reads `checkpoint`.

    Raises CheckpointError when tensors are missing or have another shape than the model's.
    """
    checkpoint.require({name: tuple(p.shape) for name, p in skeleton(checkpoint.config).state_dict().items()})
    reader = WeightReader(checkpoint, recipe)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = _lazy(value, partial(reader.read, name))


def _lazy(value: ir.Value, read: Callable[[], Tensor]) -> ir.LazyTensor:
    if value.shape is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.UINT8):
        raise ExportError(f"initializer {value.name}: expected float32 or uint8 of a known shape, got {value}")
    return ir.LazyTensor(lambda: ir.tensor(read().numpy()), dtype=value.dtype, shape=value.shape, name=value.name)
