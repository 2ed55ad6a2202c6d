"""The axes of a graph's inputs: which sizes they are traced with, and which sizes they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.export import Dim

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities import entries_read
from cosmos_export.onnx.head_signature import MEMORY_SLOTS
from cosmos_export.onnx.signature import BATCH, CACHE_LENGTH, NUM_LOGITS, SEQUENCE, TOTAL_SEQUENCE
from cosmos_runtime import GraphSpec, TensorSpec

# Sizes to trace with: no two alike, so that none is taken for another, and none 1, which torch.export would take for a
# constant.
_TRACED = {BATCH: 2, SEQUENCE: 3, TOTAL_SEQUENCE: 5, CACHE_LENGTH: 7, NUM_LOGITS: 4, MEMORY_SLOTS: 6}
# Sizes for what is compiled, whose products are timed and chosen for as many rows: few would choose badly for a prompt.
COMPILED_SIZES = {**_TRACED, SEQUENCE: 64, TOTAL_SEQUENCE: 80, CACHE_LENGTH: 96}
# Axes that no configuration limits.
_UNLIMITED = (BATCH, NUM_LOGITS)
# Axes that the model's positions limit.
_OF_TOKENS = (SEQUENCE, TOTAL_SEQUENCE, CACHE_LENGTH)


def traced_shape(tensor: TensorSpec, max_sequence_length: int, sizes: Mapping[str, int] | None = None) -> list[int]:
    """The shape of an input that a graph is traced with; no longer than the model's positions.

    `sizes` of the axes are any that differ, unless it matters for what is compiled (`COMPILED_SIZES`).
    """
    return [_traced_size(axis, max_sequence_length, sizes or _TRACED) for axis in tensor.shape]


def dynamic_axes(spec: GraphSpec, config: CosmosAdvancedConfig) -> dict[str, Dim]:
    """Every axis of a graph's inputs that may have any size, with its smallest and largest."""
    names = dict.fromkeys(axis for tensor in spec.inputs for axis in tensor.shape if isinstance(axis, str))
    return {name: _dim(name, config) for name in names}


def dynamic_shape(tensor: TensorSpec, axes: Mapping[str, Dim]) -> dict[int, Any]:
    """An input's axes as torch.export wants them, by their place."""
    return {place: axes.get(str(axis), Dim.STATIC) for place, axis in enumerate(tensor.shape)}


def _traced_size(axis: int | str, limit: int, sizes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    return min(sizes[axis], limit) if axis in _OF_TOKENS else sizes[axis]


def _dim(axis: str, config: CosmosAdvancedConfig) -> Dim:
    if axis == MEMORY_SLOTS:
        size = config.memory.working_memory_size
        return Dim(axis, min=entries_read(size), max=size)
    return Dim(axis, min=1, max=None if axis in _UNLIMITED else config.max_sequence_length)
