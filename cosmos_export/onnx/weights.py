"""Gives a traced graph its values: each initializer reads its checkpoint tensors at the moment it is written.

Nothing is held: a tensor is mapped from the checkpoint, converted, written and let go, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import CheckpointError, ExportError
from cosmos_export.model.capabilities import is_of_heads, weight_source
from cosmos_export.model.loading import model_skeleton, skeleton
from cosmos_export.model.rope import rotary_tables
from cosmos_export.onnx.quantize import Quantization, QuantizedMatrix, dequantize, quantize, stack_rows
from cosmos_export.onnx.signature import ROTARY_COS, ROTARY_SIN, QuantizedPart, parts_of, quantized_part, source_of
from cosmos_export.recipe import ExportRecipe
from cosmos_export.torch_programs.rows import quantize_rows

_STORED_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.UINT8)


class WeightReader:
    """What each initializer of a graph has to hold: what export writes and verification compares with."""

    def __init__(self, checkpoint: Checkpoint, recipe: ExportRecipe) -> None:
        self.checkpoint, self.recipe = checkpoint, recipe
        self.dtype: torch.dtype = getattr(torch, recipe.activations)
        self._last: tuple[str, QuantizedMatrix] | None = None

    def read(self, initializer: str) -> Tensor:
        """The tensor of an initializer, by its name. Raises CheckpointError where the checkpoint has none for it."""
        source, part = quantized_part(initializer)
        if part is not None:
            return self._quantized_part(source, part)
        source, transposed = source_of(initializer)
        if source in (ROTARY_COS, ROTARY_SIN):
            return self._rotary(source)
        matrix = self._rounded(source, self._matrix(source))
        return (matrix.T if transposed else matrix).contiguous()

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
        parts = [self._tensor(part) for part in parts_of(source)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tensor(self, name: str) -> Tensor:
        """A tensor of the model in float32: the checkpoint's of that name, or made of several."""
        source = weight_source(name)
        return self._stored(name) if source is None else source.read(self._stored)

    def _stored(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name).to(torch.float32)

    def _quantized(self, source: str, form: Quantization) -> QuantizedMatrix:
        """As a calibration left it, where there was one; else rounded here, each block for itself."""
        calibrated, parts = self.checkpoint.calibrated, parts_of(source)
        if all(part in calibrated for part in parts):
            return stack_rows([calibrated[part] for part in parts])
        return quantize(self._matrix(source), form)

    def _rounded(self, source: str, values: Tensor) -> Tensor:
        """Float32 `values` in the type that is computed with. Raises ExportError where they are beyond its range."""
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
    model: ir.Model, checkpoint: Checkpoint, recipe: ExportRecipe, capabilities: Sequence[str] | None = None
) -> None:
    """Sets every valueless initializer of `model` to a lazy tensor that reads `checkpoint`.

    `capabilities` are those of a model with heads; None is the plain decoder.
    Raises CheckpointError when tensors are missing or have another shape than the model's.
    """
    require_weights(checkpoint, capabilities)
    reader = WeightReader(checkpoint, recipe)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = _lazy(value, partial(reader.read, name))


def _lazy(value: ir.Value, read: Callable[[], Tensor]) -> ir.LazyTensor:
    if value.shape is None or value.dtype not in _STORED_TYPES:
        known = "float32, float16, bfloat16 or uint8"
        raise ExportError(f"initializer {value.name}: expected {known} of a known shape, got {value}")
    return ir.LazyTensor(lambda: ir.tensor(as_array(read())), dtype=value.dtype, shape=value.shape, name=value.name)


def as_array(tensor: Tensor) -> NDArray:
    """The tensor as a numpy array that shares its memory; numpy knows bfloat16 through ml_dtypes only."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    shared: NDArray = tensor.view(torch.int16).numpy().view(np.dtype(ml_dtypes.bfloat16))
    return shared
