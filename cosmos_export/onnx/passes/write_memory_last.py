"""Makes the working memory safe to update in place."""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.errors import ExportError


class WriteMemoryLast(ir.passes.InPlacePass):
    """Entries are written into the memory only when it has been read.

    Before:  read = MatMul(weights, Gather(Reshape(values), best))     ScatterND(values, slots, new)       slots (B, 2)
    After:   the same, with Expand(slots, Shape(read)[:2])             read (B, 1, D)

    A call reads the entries before it and then puts its own where the oldest was. Where a caller has one buffer as the
    memory that goes in and the one that comes out, the write changes what a later read would see, and a graph has no
    order but that of its data: so the slots take their shape, which they have already, from what was read.
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
    state = node.inputs[0] if node.domain == "" and node.op_type == "ScatterND" else None
    if state is None or not state.is_graph_input() or not node.outputs[0].is_graph_output():
        return False
    return bool(_other_readers(node, state))


def _other_readers(write: ir.Node, state: ir.Value) -> list[ir.Node]:
    """Who reads the contents of `state` besides `write`."""
    return [node for node in state.consumers() if node is not write and node.op_type != "Shape"]


def _order(graph: ir.Graph, write: ir.Node) -> bool:
    """Lets `write` depend on what was read of the memory; False where it does so already, or cannot."""
    slots, read = write.inputs[1], _what_was_read(graph)
    if slots is None or slots.shape is None or len(slots.shape) != 2 or read is None or _depends(write, read):
        return False
    shape = ir.node("Shape", [read.outputs[0]], {"end": 2}, name=f"{write.name}/Shape")
    shape.outputs[0].type, shape.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([2])
    expand = ir.node("Expand", [slots, shape.outputs[0]], name=f"{write.name}/Expand")
    expand.outputs[0].type, expand.outputs[0].shape = slots.type, slots.shape
    graph.insert_before(write, [shape, expand])
    write.replace_input_with(1, expand.outputs[0])
    return True


def _what_was_read(graph: ir.Graph) -> ir.Node | None:
    """The product that sums up entries which were gathered from a state."""
    for node in graph:
        gather = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if gather is None or gather.op_type != "Gather" or gather.inputs[0] is None:
            continue
        table = gather.inputs[0].producer()
        entries = table.inputs[0] if table is not None and table.op_type == "Reshape" else None
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
