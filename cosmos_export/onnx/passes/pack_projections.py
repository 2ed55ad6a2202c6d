"""Makes one product of projections that read the same input."""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.onnx.signature import PACKED_PROJECTIONS, source_of, stored_transposed


class PackProjections(ir.passes.InPlacePass):
    """Projections of one input become one product, whose matrix holds theirs side by side.

    Before:  q = MatMul(x, Wq);  k = MatMul(x, Wk);  v = MatMul(x, Wv);  GroupQueryAttention(q, k, v, ...)
    After:   GroupQueryAttention(MatMul(x, [Wq Wk Wv]), , , ...)

    Before:  MatMul(x, W1);  MatMul(x, W3)
    After:   Split(MatMul(x, [W1 W3]))

    One large product reads memory faster than several small ones, and an activation that is quantised is quantised
    once. Which projections go together, and what the packed matrix is called, is `signature.PACKED_PROJECTIONS`.
    Precondition: matrices are stored transposed, (in, out), and have no values yet.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            for packed, parts in PACKED_PROJECTIONS.items():
                products = _products(node, parts)
                if products:
                    _pack(model.graph, products, packed, parts)
                    modified = True
        return ir.passes.PassResult(model, modified)


def _weight(node: ir.Node) -> ir.Value | None:
    """The valueless initializer that `node` multiplies by, if it is such a product."""
    if node.domain != "" or node.op_type != "MatMul" or node.graph is None:
        return None
    weight = node.inputs[1]
    return weight if weight is not None and weight.is_initializer() and weight.const_value is None else None


def _products(first: ir.Node, parts: tuple[str, ...]) -> list[ir.Node]:
    """The products of all `parts` that read the input of `first`, in order; none unless `first` is the first one's."""
    weight = _weight(first)
    if weight is None or weight.name is None or f".{parts[0]}." not in weight.name or first.inputs[0] is None:
        return []
    siblings = {w.name: node for node in first.inputs[0].consumers() if (w := _weight(node)) is not None}
    wanted = [weight.name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
    found = [siblings[name] for name in wanted if name in siblings]
    return found if len(found) == len(wanted) else []


def _pack(graph: ir.Graph, products: list[ir.Node], packed: str, parts: tuple[str, ...]) -> None:
    weights = [node.inputs[1] for node in products]
    sizes = [weight.shape.numpy() for weight in weights if weight is not None and weight.shape is not None]
    first = weights[0]
    if first is None or first.name is None or products[0].inputs[0] is None:
        raise AssertionError("_products has checked these")
    rows, columns = sizes[0][0], [size[1] for size in sizes]
    source, _ = source_of(first.name)
    matrix = ir.Value(
        name=stored_transposed(source.replace(f".{parts[0]}.", f".{packed}.")),
        shape=ir.Shape([rows, sum(columns)]),
        type=first.type,
    )
    graph.initializers.add(matrix)
    product = ir.node("MatMul", [products[0].inputs[0], matrix], name=products[0].name)
    _describe(product.outputs[0], products[0].outputs[0], sum(columns))
    graph.insert_before(products[0], product)
    _hand_out(graph, product, products, columns)
    graph.remove(products, safe=True)
    for weight in weights:
        if weight is not None and weight.name is not None and not weight.uses():
            del graph.initializers[weight.name]


def _hand_out(graph: ir.Graph, product: ir.Node, products: list[ir.Node], columns: list[int]) -> None:
    """Gives the readers of `products` their part: attention takes the packed product whole, others a split of it."""
    attention = _common_attention(products)
    if attention is not None:
        attention.replace_input_with(0, product.outputs[0])
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
        return
    sizes = ir.Value(
        name=f"{product.name}/sizes", shape=ir.Shape([len(columns)]), type=ir.TensorType(ir.DataType.INT64)
    )
    sizes.const_value = ir.tensor(columns, dtype=ir.DataType.INT64, name=sizes.name)
    graph.initializers.add(sizes)
    split = ir.node(
        "Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=len(columns), name=f"{product.name}/Split"
    )
    graph.insert_after(product, split)
    for part, old in zip(split.outputs, products, strict=True):
        part.name, part.shape, part.type = old.outputs[0].name, old.outputs[0].shape, old.outputs[0].type
        ir.convenience.replace_all_uses_with(old.outputs[0], part)


def _common_attention(products: list[ir.Node]) -> ir.Node | None:
    """The GroupQueryAttention that reads the three products as query, key and value, and nothing else does."""
    readers = {node for product in products for node in product.outputs[0].consumers()}
    if len(readers) != 1 or len(products) != 3:
        return None
    reader = readers.pop()
    takes_them = list(reader.inputs[:3]) == [product.outputs[0] for product in products]
    return reader if reader.op_type == "GroupQueryAttention" and takes_them else None


def _describe(value: ir.Value, like: ir.Value, columns: int) -> None:
    value.type = like.type
    if like.shape is not None:
        value.shape = ir.Shape([*like.shape.dims[:-1], columns])
