"""What the passes share that make branches of a graph."""

from __future__ import annotations

from collections.abc import Sequence, Set

import onnx_ir as ir


def computing_only(graph: ir.Graph, outputs: Sequence[ir.Value], without: Set[ir.Node] = frozenset()) -> list[ir.Node]:
    """The nodes of a graph whose results go nowhere but into these outputs of it, last ones first; `without` some, and
    what they need."""
    found: dict[ir.Node, None] = {}
    waiting = [node for value in outputs if (node := value.producer()) is not None]
    while waiting:
        node = waiting.pop()
        if node in found or node in without or node.graph is not graph:
            continue
        if not all(_is_for(output, outputs, found) for output in node.outputs):
            continue  # it comes again with its next reader
        found[node] = None
        waiting += [producer for value in node.inputs if (producer := producer_of(value)) is not None]
    return list(found)


def _is_for(value: ir.Value, outputs: Sequence[ir.Value], nodes: dict[ir.Node, None]) -> bool:
    is_other_output = value.is_graph_output() and not any(value is output for output in outputs)
    return not is_other_output and all(use.node in nodes for use in value.uses())


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value; None for an input, an initializer or an absent one."""
    return None if value is None else value.producer()


def hand_over(graph: ir.Graph, value: ir.Value, output: ir.Value, nodes: set[ir.Node]) -> None:
    """Gives the readers of `value` that are not among `nodes` the `output` of a branch in its place, with its name."""
    output.name, output.shape, output.type = value.name, value.shape, value.type
    for use in list(value.uses()):
        if use.node not in nodes:
            use.node.replace_input_with(use.idx, output)
    graph.outputs[:] = [output if each is value else each for each in graph.outputs]
    value.name = f"{value.name}.chosen"
