"""What several passes look for."""

from __future__ import annotations

import onnx_ir as ir


def transposed_matrix(node: ir.Node | None) -> ir.Value | None:
    """The initializer w (rows, columns) when `node` is Transpose(w) of the standard domain, else None.

    None too when the transposed value is itself a graph output: it has to stay what it is.
    """
    if node is None or node.domain != "" or node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return None
    matrix = node.inputs[0]
    if matrix is None or not matrix.is_initializer() or matrix.shape is None or len(matrix.shape) != 2:
        return None
    return matrix if list(node.attributes.get_ints("perm", [1, 0])) == [1, 0] else None
