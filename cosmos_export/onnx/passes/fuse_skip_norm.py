"""Adds the residual and normalises in one operator of ONNX Runtime."""

from __future__ import annotations

import onnx_ir as ir


class FuseSkipNorm(ir.passes.InPlacePass):
    """A sum that is normalised becomes com.microsoft::SkipSimplifiedLayerNormalization, which gives both.

    Before:  s = Add(a, b);  y = RMSNormalization(s, weight)          and elsewhere  s
    After:   y, _, _, s = SkipSimplifiedLayerNormalization(a, b, weight)

    Saves one pass over the hidden state for each of the two norms of a layer.
    Precondition: the norm is over the last axis, and a, b have the same shape (a residual connection).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            residual = _residual(node)
            if residual is not None:
                _fuse(model.graph, node, residual)
                modified = True
        if modified:
            model.opset_imports.setdefault("com.microsoft", 1)
        return ir.passes.PassResult(model, modified)


def _residual(node: ir.Node) -> ir.Node | None:
    """The Add whose sum `node` normalises, when the two can be one operator."""
    if node.domain != "" or node.op_type != "RMSNormalization" or node.inputs[0] is None:
        return None
    add = node.inputs[0].producer()
    if add is None or add.domain != "" or add.op_type != "Add" or node.attributes.get_int("axis", -1) != -1:
        return None
    a, b = add.inputs
    if a is None or b is None or a.shape is None or a.shape != b.shape or len(a.shape) != 3:
        return None
    known = all(isinstance(dim, int) or dim.value is not None for dim in a.shape)
    return add if known else None  # two axes of which nothing is known may broadcast


def _fuse(graph: ir.Graph, norm: ir.Node, add: ir.Node) -> None:
    normed, total = norm.outputs[0], add.outputs[0]
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain="com.microsoft",
        num_outputs=4,
        name=norm.name,
    )
    _rename(fused.outputs[0], normed)
    _rename(fused.outputs[3], total)
    for unused in fused.outputs[1:3]:
        unused.name = ""
    # The sum has readers before the norm only where nothing else normalises it, so the Add's place is the right one.
    graph.insert_after(add, fused)
    ir.convenience.replace_all_uses_with(
        [normed, total], [fused.outputs[0], fused.outputs[3]], replace_graph_outputs=True
    )
    graph.remove([norm, add], safe=True)


def _rename(new: ir.Value, old: ir.Value) -> None:
    new.name, new.shape, new.type = old.name, old.shape, old.type
