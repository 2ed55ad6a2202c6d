"""Stores the wide matrices of capability heads in few bits, those that read the same input as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from cosmos_export.onnx.passes.quantized import QuantizedParts, quantized_initializers, quantized_product
from cosmos_export.onnx.quantize import Quantization
from cosmos_export.onnx.signature import stacked
from cosmos_export.recipe import ExportRecipe

# A matrix with so many times more rows than columns is a product of its own: it is read as fast as it can be, and what
# it gives would only be copied.
_TALL = 8


class QuantizeHeads(ir.passes.InPlacePass):
    """Linear layers of the heads become com.microsoft::MatMulNBits; those of one input, one product.

    Before:  a = Gemm(x, Wa, ba, transB=1);  b = Gemm(x, Wb, bb, transB=1)        W (out, in), valueless
    After:   a, b = Split(Add(MatMulNBits(x, [Wa; Wb]), [ba; bb]))

    Many small products one after another read memory at a fraction of its speed, and round their input once each.
    Which matrices, and how, is the recipe's `form_of`. Matrices go together that meet the same inputs wherever they are
    used (in each round of the evaluation), so that each is stored once; and those of a branch (see `SkipUnchosen`) with
    each other alone. ONNX Runtime makes the sum part of the product.
    """

    def __init__(self, recipe: ExportRecipe) -> None:
        super().__init__()
        self.recipe = recipe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups = _groups([layer for node in model.graph.all_nodes() if (layer := self._layer(node)) is not None])
        for group in groups:
            _quantize(model.graph, group)
        if groups:
            model.opset_imports.setdefault("com.microsoft", 1)
        return ir.passes.PassResult(model, bool(groups))

    def _layer(self, node: ir.Node) -> _Layer | None:
        """The linear layer that `node` is, if its matrix is to be quantised."""
        if node.domain != "" or node.op_type != "Gemm" or node.attributes.get_int("transB", 0) != 1:
            return None
        if node.attributes.get_int("transA", 0) or _factors(node) != (1.0, 1.0):
            return None
        x, weight, *rest = node.inputs
        bias = rest[0] if rest else None
        if x is None or not _is_weight(weight, rank=2) or not (bias is None or _is_weight(bias, rank=1)):
            return None
        form = self.recipe.form_of(weight.name) if weight is not None and weight.name is not None else None
        return None if form is None or weight is None else _Layer(node, x, weight, bias, form)


class _Layer(NamedTuple):
    """Gemm(x, weight, bias, transB=1)."""

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    form: Quantization

    @property
    def shape(self) -> tuple[int, int]:
        if self.weight.shape is None:
            raise AssertionError("_is_weight has checked this")
        rows, columns = self.weight.shape.numpy()
        return rows, columns


class _Group(NamedTuple):
    """Matrices that go together, and for each input the layers that multiply it with them, in their order."""

    layers: list[list[_Layer]]

    @property
    def one_of_each(self) -> list[_Layer]:
        return self.layers[0]


def _factors(node: ir.Node) -> tuple[float, float]:
    return node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)


def _is_weight(value: ir.Value | None, rank: int) -> bool:
    if value is None or not value.is_initializer() or value.const_value is not None or value.name is None:
        return False
    return value.shape is not None and len(value.shape) == rank


def _groups(layers: list[_Layer]) -> list[_Group]:
    """Layers by matrix, and matrices by what they are multiplied with."""
    by_weight: dict[ir.Value, list[_Layer]] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight, []).append(layer)
    groups: dict[tuple[object, ...], list[list[_Layer]]] = {}
    for weight, uses in by_weight.items():
        first = uses[0]
        alone = first.bias is None or first.shape[0] >= _TALL * first.shape[1]
        key = (weight,) if alone else (first.form, *((use.x, use.node.graph) for use in uses))
        groups.setdefault(key, []).append(uses)
    return [_Group([list(layers) for layers in zip(*uses, strict=True)]) for uses in groups.values()]


def _quantize(graph: ir.Graph, group: _Group) -> None:
    matrices = group.one_of_each
    rows, columns = sum(layer.shape[0] for layer in matrices), matrices[0].shape[1]
    form = matrices[0].form
    name = stacked([layer.weight.name or "" for layer in matrices])
    parts = quantized_initializers(graph, matrices[0].weight, name, rows, columns, form)
    bias = _stacked_bias(graph, matrices)
    for layers in group.layers:
        _replace(graph, layers, parts, bias, (rows, columns))
    for layer in matrices:
        for value in (layer.weight, layer.bias):
            if value is not None and value.name is not None and not value.uses():
                graph.initializers.pop(value.name, None)


def _stacked_bias(graph: ir.Graph, layers: Sequence[_Layer]) -> ir.Value | None:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) < 2:
        return biases[0] if biases else None
    name = stacked([bias.name or "" for bias in biases])
    rows = sum(layer.shape[0] for layer in layers)
    bias = ir.Value(name=name, shape=ir.Shape([rows]), type=biases[0].type)
    graph.initializers.add(bias)
    return bias


def _replace(
    graph: ir.Graph, layers: list[_Layer], parts: QuantizedParts, bias: ir.Value | None, shape: tuple[int, int]
) -> None:
    """Puts one product where the first of `layers` was, and its parts where their outputs were."""
    first = layers[0]
    place = first.node.graph
    if place is None:
        raise AssertionError("a layer's node is in a graph")
    plain = ir.node("MatMul", [first.x, first.weight], name=first.node.name)
    _describe(plain.outputs[0], f"{first.node.name}/product", first.node.outputs[0], shape[0])
    place.insert_before(first.node, plain)
    result = quantized_product(plain, parts, *shape, first.form).outputs[0]
    if bias is not None:
        total = ir.node("Add", [result, bias], name=f"{first.node.name}/Add")
        _describe(total.outputs[0], f"{first.node.name}/sum", first.node.outputs[0], shape[0])
        place.insert_before(first.node, total)
        result = total.outputs[0]
    outputs = [result] if len(layers) == 1 else _split(graph, first.node, result, [each.shape[0] for each in layers])
    for layer, output in zip(layers, outputs, strict=True):
        old = layer.node.outputs[0]
        output.name, output.shape, output.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    place.remove([layer.node for layer in layers], safe=True)


def _split(graph: ir.Graph, before: ir.Node, value: ir.Value, rows: list[int]) -> Sequence[ir.Value]:
    sizes = ir.Value(name=f"{before.name}/sizes", shape=ir.Shape([len(rows)]), type=ir.TensorType(ir.DataType.INT64))
    sizes.const_value = ir.tensor(rows, dtype=ir.DataType.INT64, name=sizes.name)
    graph.initializers.add(sizes)
    split = ir.node("Split", [value, sizes], {"axis": -1}, num_outputs=len(rows), name=f"{before.name}/Split")
    if before.graph is None:
        raise AssertionError("a layer's node is in a graph")
    before.graph.insert_before(before, split)
    return split.outputs


def _describe(value: ir.Value, name: str, like: ir.Value, columns: int) -> None:
    """A name of its own, too: those that a graph gives are known in that graph alone, and not in its branches."""
    value.name, value.type = name, like.type
    if like.shape is not None:
        value.shape = ir.Shape([*like.shape.dims[:-1], columns])
