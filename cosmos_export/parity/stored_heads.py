"""The stored tensors of capability heads, compared bit for bit some rows at a time: the largest of them, all skills of
the procedural memory in one matrix, is many times a layer's size."""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cosmos_export.model.capabilities import is_of_heads
from cosmos_export.onnx.signature import parts_of, quantized_part, source_of
from cosmos_export.onnx.slices import SlicedGraph, stored_array
from cosmos_export.onnx.weights import WeightReader, as_array
from cosmos_export.parity.stored import difference


def compare_heads(graph: SlicedGraph, reader: WeightReader, wanted: Set[str]) -> Iterator[tuple[str, str | None]]:
    """(tensor of the model, what is wrong with an initializer that holds it or None) for those of `wanted` that are of
    the heads."""
    of_heads = {name for name in wanted if is_of_heads(name)}
    for name, tensor in graph.initializers.items():
        parts = parts_of(source_of(quantized_part(name)[0])[0])
        if of_heads.issuperset(parts):
            problem = _difference(name, tensor, graph.folder, reader)
            yield from ((part, problem) for part in parts)


def _difference(name: str, tensor: TensorProto, folder: Path, reader: WeightReader) -> str | None:
    start, alike = 0, True
    for piece in reader.pieces(name):
        expected = as_array(piece)
        stored = _rows(tensor, folder, start, len(expected))
        alike = alike and stored.shape == expected.shape and difference(name, stored, expected) is None
        start += len(expected)
    if alike and start == tensor.dims[0]:
        return None
    return difference(name, stored_array(tensor, folder), as_array(reader.read(name)))  # which says where


def _rows(tensor: TensorProto, folder: Path, start: int, count: int) -> NDArray:
    """Rows of a stored tensor; fewer where it ends before."""
    if not tensor.external_data:
        return stored_array(tensor, folder)[start : start + count]
    entry = {e.key: e.value for e in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    columns = int(np.prod(tensor.dims[1:], dtype=np.int64))
    count = max(0, min(count, tensor.dims[0] - start))
    offset = int(entry.get("offset", 0)) + start * columns * dtype.itemsize
    values = np.fromfile(folder / entry["location"], dtype, count * columns, offset=offset)
    return values.reshape(-1, *tensor.dims[1:]) if columns else values
