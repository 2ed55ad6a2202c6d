"""Stores projection matrices row by row, as kernels for single tokens read them."""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.onnx.signature import source_of


class MultiplyByRows(ir.passes.InPlacePass):
    """A product with an initializer that is stored transposed transposes it as it reads.

    Before:  y = MatMul(x, w.transposed)                                    (in, out)
    After:   y = com.microsoft::FusedMatMul(x, w, transB=1)                 w (out, in), torch's order

    The decoding kernels want an output's weights side by side; a GPU's library multiplies by either form as fast.
    Precondition: the initializer has no value yet, and the product is its only reader.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if _multiplies_transposed(node)]
        for node in nodes:
            _replace(model.graph, node)
        if nodes:
            model.opset_imports.setdefault("com.microsoft", 1)
        return ir.passes.PassResult(model, bool(nodes))


def _multiplies_transposed(node: ir.Node) -> bool:
    if node.domain != "" or node.op_type != "MatMul":
        return False
    weight = node.inputs[1]
    if weight is None or weight.name is None or not weight.is_initializer() or weight.const_value is not None:
        return False
    return source_of(weight.name)[1] and weight.shape is not None and len(weight.uses()) == 1


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, product = node.inputs[0], node.inputs[1], node.outputs[0]
    if weight is None or weight.name is None or weight.shape is None:
        raise AssertionError("_multiplies_transposed has checked these")
    by_rows = ir.Value(name=source_of(weight.name)[0], shape=ir.Shape(reversed(weight.shape.dims)), type=weight.type)
    graph.initializers.add(by_rows)
    fused = ir.node("FusedMatMul", [x, by_rows], {"transB": 1}, domain="com.microsoft", name=node.name)
    result = fused.outputs[0]
    result.name, result.shape, result.type = product.name, product.shape, product.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [fused], [product], [result])
    del graph.initializers[weight.name]
