"""Stores the tied embedding in few bits, once, for both of its ends."""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.onnx.passes.matching import transposed_matrix
from cosmos_export.onnx.passes.quantized import quantized_initializers, quantized_product, replace_node
from cosmos_export.recipe import ExportRecipe


class QuantizeEmbedding(ir.passes.InPlacePass):
    """A table that is looked up in, and multiplied by transposed, becomes one quantised table that both read.

    Before:  Gather(table, ids)    MatMul(x, Transpose(table)) or Gemm(x, table, transB=1)    table (V, D)
    After:   Reshape(GatherBlockQuantized(table.blocks, ids, table.scales), (.., D))
             MatMulNBits(x, table.blocks, table.scales)

    The product wants its blocks as (V, n, bytes); so the lookup treats a row as n rows of one block, and what it gives
    is reshaped. Precondition: the recipe quantises the table symmetrically (zero points have no layout that suits
    both), and the table has no value yet.
    """

    def __init__(self, recipe: ExportRecipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        lookups = [node for node in model.graph if self._is_lookup(node)]
        for lookup in lookups:
            self._quantize(model.graph, lookup)
        if lookups:
            model.opset_imports.setdefault("com.microsoft", 1)
        return ir.passes.PassResult(model, bool(lookups))

    def _is_lookup(self, node: ir.Node) -> bool:
        table = node.inputs[0] if node.domain == "" and node.op_type == "Gather" else None
        if table is None or table.name is None or not table.is_initializer() or table.const_value is not None:
            return False
        if node.inputs[1] is None or node.inputs[1].shape is None:
            return False
        form = self.recipe.form_of(table.name)
        return form is not None and form.symmetric and node.attributes.get_int("axis", 0) == 0

    def _quantize(self, graph: ir.Graph, lookup: ir.Node) -> None:
        table, ids = lookup.inputs
        if table is None or table.name is None or table.shape is None or ids is None or ids.shape is None:
            raise AssertionError("_is_lookup has checked these")
        form = self.recipe.form_of(table.name)
        if form is None:
            raise AssertionError("_is_lookup has checked this")
        rows, columns = table.shape.numpy()
        parts = quantized_initializers(graph, table, table.name, rows, columns, form)
        for transpose in [node for node in table.consumers() if transposed_matrix(node) is table]:
            transposed = transpose.outputs[0]
            for product in [node for node in transposed.consumers() if _multiplies_by(node, transposed)]:
                quantized_product(product, parts, rows, columns, form)
            if not transposed.uses():
                graph.remove(transpose, safe=True)
        for product in [node for node in table.consumers() if _multiplies_by_transposed(node, table)]:
            quantized_product(product, parts, rows, columns, form)
        _look_up(graph, lookup, parts[0], parts[1], len(ids.shape), form.bits, form.block_size)
        if not table.uses():
            del graph.initializers[table.name]


def _multiplies_by(node: ir.Node, matrix: ir.Value) -> bool:
    return node.domain == "" and node.op_type == "MatMul" and node.inputs[1] is matrix


def _multiplies_by_transposed(node: ir.Node, matrix: ir.Value) -> bool:
    """Whether `node` is Gemm(x, matrix, transB=1) and nothing else: no addend, no factor."""
    if node.domain != "" or node.op_type != "Gemm" or node.inputs[1] is not matrix or len(node.inputs) != 2:
        return False
    factors = node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)
    return factors == (0, 1) and node.attributes.get_float("alpha", 1.0) == 1.0


def _look_up(
    graph: ir.Graph, lookup: ir.Node, blocks: ir.Value, scales: ir.Value, ids_rank: int, bits: int, block_size: int
) -> None:
    tape = ir.tape.Tape()
    one_a_block = tape.op("Unsqueeze", [scales, tape.op("Constant", [], {"value_ints": [2]})])  # (V, n, 1)
    rows = tape.op(
        "GatherBlockQuantized",
        [blocks, lookup.inputs[1], one_a_block],
        {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 2},
        domain="com.microsoft",
    )  # (.., n, block_size)
    flat = tape.op("Constant", [], {"value_ints": [0] * ids_rank + [-1]})
    for node in tape.nodes:
        graph.insert_before(lookup, node)
    replace_node(lookup, ir.node("Reshape", [rows, flat], name=lookup.name))
