"""Stores projection matrices in few bits."""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.onnx.passes.quantized import quantized_initializers, quantized_product
from cosmos_export.onnx.signature import source_of
from cosmos_export.recipe import ExportRecipe


class QuantizeProjections(ir.passes.InPlacePass):
    """A product with a stored matrix becomes com.microsoft::MatMulNBits.

    Before:  MatMul(x, w.transposed)                          w.transposed (in, out)
    After:   MatMulNBits(x, w.blocks, w.scales[, w.zero_points])

    Which matrices, and how, is the recipe's `form_of`. The values follow when they are written.
    Precondition: matrices are stored transposed and have no values yet.
    """

    def __init__(self, recipe: ExportRecipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            weight = node.inputs[1] if node.domain == "" and node.op_type == "MatMul" else None
            if weight is None or not weight.is_initializer() or weight.const_value is not None or weight.name is None:
                continue
            source, transposed = source_of(weight.name)
            form = self.recipe.form_of(source)
            if form is None or not transposed or weight.shape is None:
                continue
            columns, rows = weight.shape.numpy()
            parts = quantized_initializers(model.graph, weight, source, rows, columns, form)
            quantized_product(node, parts, rows, columns, form)
            if not weight.uses():
                del model.graph.initializers[weight.name]
            modified = True
        if modified:
            model.opset_imports.setdefault("com.microsoft", 1)
        return ir.passes.PassResult(model, modified)
