"""What the quantising passes share: the initializers of a quantised matrix, and the product that reads them.

N  rows (outputs)    C  columns (inputs)    n  blocks of a row
"""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.onnx.quantize import Quantization
from cosmos_export.onnx.signature import quantized_name

QuantizedParts = tuple[ir.Value, ir.Value, ir.Value | None]


def quantized_initializers(
    graph: ir.Graph, matrix: ir.Value, source: str, rows: int, columns: int, form: Quantization
) -> QuantizedParts:
    """Adds blocks (N, n, bytes), scales (N, n) and, unless symmetric, zero points (N, bytes) of `source` (N, C).

    Scales have the type of `matrix`, the value that held it so far: that of the activations it is multiplied with.
    """
    count = -(-columns // form.block_size)
    levels = ir.TensorType(ir.DataType.UINT8)
    blocks = _add(graph, quantized_name(source, "blocks"), (rows, count, form.block_size * form.bits // 8), levels)
    scales = _add(graph, quantized_name(source, "scales"), (rows, count), matrix.type)
    if form.symmetric:
        return blocks, scales, None
    zeros = _add(graph, quantized_name(source, "zero_points"), (rows, -(-count * form.bits // 8)), levels)
    return blocks, scales, zeros


def quantized_product(node: ir.Node, parts: QuantizedParts, rows: int, columns: int, form: Quantization) -> ir.Node:
    """Puts MatMulNBits with a quantised matrix in the place of `node`, a product with a matrix (C, N)."""
    blocks, scales, zeros = parts
    product = ir.node(
        "MatMulNBits",
        [node.inputs[0], blocks, scales, *([] if zeros is None else [zeros])],
        {
            "K": columns,
            "N": rows,
            "bits": form.bits,
            "block_size": form.block_size,
            "accuracy_level": form.accuracy_level,
        },
        domain="com.microsoft",
        name=node.name,
    )
    replace_node(node, product)
    return product


def replace_node(old: ir.Node, new: ir.Node) -> None:
    """Puts `new` where `old` was; its one output takes over the name, shape, type and readers of the old one."""
    if old.graph is None:
        raise AssertionError("a node that is replaced is in a graph")
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.shape, after.type = before.name, before.shape, before.type
    old.graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    old.graph.remove(old, safe=True)


def _add(graph: ir.Graph, name: str, shape: tuple[int, ...], type_: ir.TypeProtocol | None) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=type_)
    graph.initializers.add(value)
    return value
