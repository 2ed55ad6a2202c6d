"""Gives a traced graph its values: each initializer reads its checkpoint tensor at the moment it is written.

Nothing is held: a tensor is mapped from the checkpoint, converted, written and let go, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir
import torch
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import ExportError
from cosmos_export.model.rope import rotary_tables
from cosmos_export.onnx.signature import ROTARY_COS, ROTARY_SIN, source_of


def attach_weights(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Sets every valueless initializer of `model` to a lazy tensor that reads `checkpoint`.

    Raises CheckpointError when tensors are missing or have another shape than the graph expects.
    """
    checkpoint.require(dict(_expected_shapes(model)))
    for value in _valueless(model):
        value.const_value = _lazy(value, initializer_reader(value.name or "", checkpoint))


def initializer_reader(name: str, checkpoint: Checkpoint) -> Callable[[], Tensor]:
    """A function that gives the float32 tensor which the initializer `name` has to hold.

    It is the definition that parity checks a written bundle against, too.
    """
    source, transposed = source_of(name)
    if source in (ROTARY_COS, ROTARY_SIN):
        return lambda: _rotary(source, checkpoint)

    def read() -> Tensor:
        tensor = checkpoint.tensor(source).to(torch.float32)
        return (tensor.T if transposed else tensor).contiguous()

    return read


def _rotary(source: str, checkpoint: Checkpoint) -> Tensor:
    config = checkpoint.config
    cos, sin = rotary_tables(config.head_dim, config.rope_theta, config.max_sequence_length, torch.float32)
    return cos if source == ROTARY_COS else sin


def _lazy(value: ir.Value, read: Callable[[], Tensor]) -> ir.LazyTensor:
    if value.shape is None or value.dtype != ir.DataType.FLOAT:
        raise ExportError(f"initializer {value.name}: expected float32 of a known shape, got {value}")
    return ir.LazyTensor(lambda: ir.tensor(read().numpy()), dtype=value.dtype, shape=value.shape, name=value.name)


def _valueless(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.initializers.values() if value.const_value is None]


def _expected_shapes(model: ir.Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    for value in _valueless(model):
        source, transposed = source_of(value.name or "")
        if source not in (ROTARY_COS, ROTARY_SIN) and value.shape is not None:
            shape = value.shape.numpy()
            yield source, shape[::-1] if transposed else shape
