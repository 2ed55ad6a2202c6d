"""Computes what branches alone read where it is read."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir


class ComputeInBranches(ir.passes.InPlacePass):
    """A node whose result only branches read becomes a node of each branch that reads it.

    Before:  q = Gemm(x, W, b);  s = If(wanted) {Sigmoid(q)} else {none};  y = If(again) {Add(x, q)} else {x}
    After:   s = If(wanted) {q1 = Gemm(x, W, b); Sigmoid(q1)} else {none}
             y = If(again) {q2 = Gemm(x, W, b); Add(x, q2)} else {x}

    Where no branch is taken it is not computed, and where both are it is computed twice: branches are for what is
    seldom wanted (see `SkipUnchosen` and `ScoresOnDemand`).
    What both branches of one If read is left alone: it is computed in any case.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        places = _places(graph)
        modified = False
        for node in reversed(list(graph)):  # readers first: what they need may follow them
            branches = _only_readers(node, places)
            for branch in branches:
                _compute_in(branch, node, places)
            if branches:
                graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


class _Branch(NamedTuple):
    """One of a node's graphs."""

    choice: ir.Node
    graph: ir.Graph


def _places(graph: ir.Graph) -> dict[ir.Node, _Branch]:
    """In which branch of `graph` each node of its branches is, however deep."""
    found = {}
    for choice in graph:
        for attribute in choice.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                branch = _Branch(choice, attribute.as_graph())
                found.update(dict.fromkeys(branch.graph.all_nodes(), branch))
    return found


def _only_readers(node: ir.Node, places: dict[ir.Node, _Branch]) -> list[_Branch]:
    """The branches that read what `node` computes, if nothing else does and they are of different choices."""
    readers = [use.node for output in node.outputs for use in output.uses()]
    if any(reader not in places for reader in readers) or any(output.is_graph_output() for output in node.outputs):
        return []
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return []
    branches = list({id(places[reader].graph): places[reader] for reader in readers}.values())
    return branches if len({branch.choice for branch in branches}) == len(branches) else []


def _compute_in(branch: _Branch, node: ir.Node, places: dict[ir.Node, _Branch]) -> None:
    """Puts a copy of `node` before all else of a branch, for its readers there."""
    name = branch.graph.name
    copy = ir.Node(
        node.domain,
        node.op_type,
        node.inputs,
        node.attributes,
        num_outputs=len(node.outputs),
        name=f"{node.name}/{name}",
        metadata_props=dict(node.metadata_props),
    )
    for output, copied in zip(node.outputs, copy.outputs, strict=True):
        copied.name, copied.shape, copied.type = f"{output.name}/{name}", output.shape, output.type
        for use in list(output.uses()):
            if places[use.node] == branch:
                use.node.replace_input_with(use.idx, copied)
    branch.graph.insert_before(branch.graph[0], copy)
    places[copy] = branch
