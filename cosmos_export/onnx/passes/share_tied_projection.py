"""Keeps one copy of a matrix that is read both as it is and transposed: the tied embedding."""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.onnx.passes.matching import transposed_matrix


class ShareTiedProjection(ir.passes.InPlacePass):
    """A product with a transposed initializer that has other readers becomes a Gemm that transposes as it reads.

    Before:  y = MatMul(x, Transpose(w))                          and elsewhere  Gather(w, ids)
    After:   y = Reshape(Gemm(Reshape(x, [-1, D]), w, transB=1), [...shape of x without D, V])
             y = Gemm(x, w, transB=1) where x is a matrix

    Without this a runtime folds the transpose at load and holds the largest matrix of a small model twice.
    Precondition: x has a static last axis, w is an initializer (V, D).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            weight = _transposed_shared_weight(node)
            if weight is not None:
                _replace(node, weight)
                modified = True
        return ir.passes.PassResult(model, modified)


def _transposed_shared_weight(node: ir.Node) -> ir.Value | None:
    """The initializer w when `node` is MatMul(x, Transpose(w)) and w has readers besides this transpose."""
    if node.domain != "" or node.op_type != "MatMul":
        return None
    x, transposed = node.inputs
    if x is None or x.shape is None or transposed is None or len(transposed.uses()) != 1:
        return None
    weight = transposed_matrix(transposed.producer())
    return weight if weight is not None and len(weight.uses()) > 1 else None


def _replace(node: ir.Node, weight: ir.Value) -> None:
    x, transposed, product = node.inputs[0], node.inputs[1], node.outputs[0]
    if x is None or transposed is None or weight.shape is None or x.shape is None or node.graph is None:
        raise AssertionError("_transposed_shared_weight has checked these")
    rows, columns = weight.shape.numpy()  # V, D
    tape = ir.tape.Tape()
    result = _product(tape, x, weight, rows, columns)
    result.name, result.shape, result.type = product.name, product.shape, product.type
    transpose = transposed.producer()
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], tape.nodes, [product], [result])
    if transpose is not None and transpose.graph is not None:
        transpose.graph.remove(transpose, safe=True)


def _product(tape: ir.tape.Tape, x: ir.Value, weight: ir.Value, rows: int, columns: int) -> ir.Value:
    """x (..., D) times the weight (V, D) transposed."""
    if x.shape is None or len(x.shape) == 2:
        return tape.op("Gemm", [x, weight], {"transB": 1})
    flat = tape.op("Reshape", [x, _constant(tape, [-1, columns])])
    projected = tape.op("Gemm", [flat, weight], {"transB": 1})
    leading = tape.op("Shape", [x], {"start": 0, "end": len(x.shape) - 1})
    shape = tape.op("Concat", [leading, _constant(tape, [rows])], {"axis": 0})
    return tape.op("Reshape", [projected, shape])


def _constant(tape: ir.tape.Tape, values: list[int]) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": values})
