"""Makes the working memory safe to update in place."""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.errors import ExportError


class WriteMemoryLast(ir.passes.InPlacePass):
    """Entries are written into the memory only when it has been read.

    Before:  read = MatMul(weights, GatherElements(values, best))    ScatterElements(values, Expand(slot, shape), new)
    After:   the same, with Expand(slot, Shape(read))

    A call reads the entries before it and then puts its own where the oldest was. Where a caller has one buffer as the
    memory that goes in and the one that comes out, the write changes what a later read would see, and a graph has no
    order but that of its data: so the write takes its shape, which is the same, from what was read.
    Raises ExportError where some reader of a memory that is written is still free to come after the write.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        writes = [node for node in model.graph if _overwrites_what_is_read(node)]
        modified = False
        for write in writes:
            modified = _order(model.graph, write) or modified
        if modified:
            model.graph.sort()
        for write in writes:
            _check(write)
        return ir.passes.PassResult(model, modified)


def _overwrites_what_is_read(node: ir.Node) -> bool:
    """Whether `node` gives a graph input with some elements replaced, to be a graph output, and others read it, too."""
    state = node.inputs[0] if node.domain == "" and node.op_type == "ScatterElements" else None
    if state is None or not state.is_graph_input() or not node.outputs[0].is_graph_output():
        return False
    return bool(_other_readers(node, state))


def _other_readers(write: ir.Node, state: ir.Value) -> list[ir.Node]:
    """Who reads the contents of `state` besides `write`."""
    return [node for node in state.consumers() if node is not write and node.op_type != "Shape"]


def _order(graph: ir.Graph, write: ir.Node) -> bool:
    """Lets `write` depend on what was read of the memory; False where it does so already, or cannot."""
    expand = write.inputs[1].producer() if write.inputs[1] is not None else None
    read = _what_was_read(graph)
    if expand is None or expand.op_type != "Expand" or read is None or _depends(expand, read):
        return False
    shape = ir.node("Shape", [read.outputs[0]], name=f"{read.name}/Shape")
    shape.outputs[0].type, shape.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([3])
    graph.insert_after(read, shape)
    expand.replace_input_with(1, shape.outputs[0])
    return True


def _what_was_read(graph: ir.Graph) -> ir.Node | None:
    """The product that sums up entries which were gathered from a state."""
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[1] is not None:
            gather = node.inputs[1].producer()
            entries = gather.inputs[0] if gather is not None and gather.op_type == "GatherElements" else None
            if entries is not None and entries.is_graph_input():
                return node
    return None


def _check(write: ir.Node) -> None:
    state = write.inputs[0]
    if state is None:
        raise AssertionError("_overwrites_what_is_read has checked this")
    for reader in _other_readers(write, state):
        if not _depends(write, reader):
            raise ExportError(
                f"{write.name} could overwrite {state.name} before {reader.name} has read it: the graph is not in the "
                f"form that WriteMemoryLast knows"
            )


def _depends(node: ir.Node, other: ir.Node) -> bool:
    """Whether `node` needs what `other` computes."""
    seen: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is other:
                return True
            if producer is not None and producer not in seen:
                seen.add(producer)
                waiting.append(producer)
    return False
