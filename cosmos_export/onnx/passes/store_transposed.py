"""Stores projection matrices the way a product reads them."""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.onnx.passes.matching import transposed_matrix
from cosmos_export.onnx.signature import stored_transposed


class StoreTransposed(ir.passes.InPlacePass):
    """A transposed initializer becomes an initializer that is stored transposed.

    Before:  Transpose(w)             w (out, in), torch's order
    After:   w.transposed             (in, out)

    Without this a runtime transposes every matrix at each load. Only the name and shape change here: the values are
    read, and transposed, when they are written.
    Precondition: w is an initializer (out, in) without a value, and the transpose is its only reader.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if _transposes_weight(node)]
        for node in nodes:
            _replace(model.graph, node)
        return ir.passes.PassResult(model, bool(nodes))


def _transposes_weight(node: ir.Node) -> bool:
    weight = transposed_matrix(node)
    return weight is not None and weight.const_value is None and len(weight.uses()) == 1


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    weight, result = node.inputs[0], node.outputs[0]
    if weight is None or weight.name is None or weight.shape is None:
        raise AssertionError("_transposes_weight has checked these")
    stored = ir.Value(
        name=stored_transposed(weight.name), shape=ir.Shape(reversed(weight.shape.dims)), type=weight.type
    )
    graph.initializers.add(stored)
    ir.convenience.replace_all_uses_with(result, stored)
    graph.remove(node, safe=True)
    del graph.initializers[weight.name]
