"""Computes what rows may choose only where some row does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from cosmos_export.onnx.passes.branches import hand_over, producer_of


class SkipUnchosen(ir.passes.InPlacePass):
    """A selection between a value and a costly other one becomes a branch, taken where any row selects the other.

    Before:  f = Gemm(x, W, b);  y = Where(c, f, x)                    c (B, 1), found by the model
    After:   y = If(ReduceMax(c)) {f = Gemm(x, W, b); y = Where(c, f, x)} else {y = x}

    Rows are computed as one, so the eager model computes what each of them might need: a vector without bias, without
    personal information, corrected. Seldom does one need it, and its matrices are a good part of what a token reads.
    Selections by one condition become one branch, with all that nothing else reads.
    What is within a branch, of this pass or another, is looked at in the same way.
    Precondition: the condition follows from a weight. One that follows from a graph's inputs alone (is there anything
    in the memory?) is left as it is: it changes once, not from token to token.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, _skip(model.graph))


def _skip(graph: ir.Graph, known: frozenset[ir.Value] = frozenset()) -> bool:
    """Makes the branches of a graph and, within them, those by other conditions than are `known`; whether there were
    any."""
    modified = False
    # The largest first: what it computes may have branches of its own, which are then found within it.
    while found := [branch for branch in _branches(graph) if branch.condition not in known]:
        _branch_off(graph, max(found, key=lambda branch: len(branch.nodes)))
        graph.sort()
        modified = True
    for node in [node for node in graph if node.op_type == "If"]:
        for attribute in node.attributes.values():
            modified = _skip(attribute.as_graph(), known | _condition_of(node)) or modified
    return modified


def _condition_of(choice: ir.Node) -> frozenset[ir.Value]:
    """Whose any row a branch is for."""
    any_row = producer_of(choice.inputs[0])
    condition = any_row.inputs[0] if any_row is not None else None
    return frozenset() if condition is None else frozenset({condition})


class _Branch:
    """Selections by one condition, in the order of the graph, and what computes nothing but what they choose."""

    def __init__(self, condition: ir.Value, selections: Sequence[ir.Node]) -> None:
        self.condition, self.selections = condition, selections
        self.computing = _computing(selections)

    @property
    def nodes(self) -> set[ir.Node]:
        return {*self.selections, *self.computing}

    @property
    def is_worth_it(self) -> bool:
        """Whether a matrix need not be read."""
        return any(_reads_matrix(node) for node in self.computing)

    @property
    def is_convex(self) -> bool:
        """Whether nothing that it needs needs something of it, so that all of it can be at one place."""
        nodes = self.nodes
        outside = {p for node in nodes for p in _producers(node) if p not in nodes}
        return not any(ancestor in nodes for node in outside for ancestor in _ancestors(node))


def _branches(graph: ir.Graph) -> Iterator[_Branch]:
    by_condition: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        condition = node.inputs[0] if node.domain == "" and node.op_type == "Where" else None
        if condition is not None and _follows_from_a_weight(condition):
            by_condition.setdefault(condition, []).append(node)
    for condition, selections in by_condition.items():
        yield from (branch for branch in _grouped(condition, selections) if branch.is_worth_it)


def _grouped(condition: ir.Value, selections: list[ir.Node]) -> list[_Branch]:
    """As few branches as there can be."""
    branches: list[_Branch] = []
    for selection in selections:
        joined = _Branch(condition, [*branches[-1].selections, selection]) if branches else None
        if joined is not None and joined.is_convex:
            branches[-1] = joined
        else:
            branches.append(_Branch(condition, [selection]))
    return branches


def _computing(selections: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes whose results go nowhere but into what `selections` choose, last ones first."""
    found: dict[ir.Node, None] = {}
    waiting = [producer for node in selections if (producer := producer_of(node.inputs[1])) is not None]
    while waiting:
        node = waiting.pop()
        uses = [use for output in node.outputs for use in output.uses()]
        if node in found or node.graph is not selections[0].graph:
            continue
        if not all(use.node in found or (use.node in selections and use.idx == 1) for use in uses):
            continue  # it comes again with its next reader
        if any(output.is_graph_output() for output in node.outputs):
            continue
        found[node] = None
        waiting += _producers(node)
    return list(found)


def _producers(node: ir.Node) -> list[ir.Node]:
    return [producer for value in node.inputs if (producer := producer_of(value)) is not None]


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """A node and all that it needs."""
    seen, waiting = {node}, [node]
    while waiting:
        new = [producer for producer in _producers(waiting.pop()) if producer not in seen]
        seen.update(new)
        waiting += new
    return seen


def _follows_from_a_weight(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and any(_reads_matrix(node) for node in _ancestors(producer))


def _reads_matrix(node: ir.Node) -> bool:
    """Whether a node reads a weight of two axes."""
    return any(
        value is not None and value.is_initializer() and value.const_value is None and _rank(value) == 2
        for value in node.inputs
    )


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _branch_off(graph: ir.Graph, branch: _Branch) -> None:
    nodes = branch.nodes
    inner = [node for node in graph if node in nodes]
    chosen = [node.outputs[0] for node in branch.selections if _is_read_outside(node, nodes)]
    kept = [_kept(value, nodes) for value in chosen]
    name = branch.selections[0].name
    graph.remove(inner)
    any_row = ir.node("ReduceMax", [branch.condition], {"keepdims": 0}, name=f"{name}/Any")
    any_row.outputs[0].name = f"{name}/any"  # what a graph calls its values by itself, others call theirs
    any_row.outputs[0].type, any_row.outputs[0].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    choice = ir.node("If", [any_row.outputs[0]], num_outputs=len(chosen), name=f"{name}/If")
    for value, output in zip(chosen, choice.outputs, strict=True):
        hand_over(graph, value, output, nodes)
    choice.attributes["then_branch"] = ir.AttrGraph(
        "then_branch", ir.Graph([], chosen, nodes=inner, name=f"{name}/then")
    )
    choice.attributes["else_branch"] = ir.AttrGraph("else_branch", _identities(chosen, kept, f"{name}/else"))
    graph.extend([any_row, choice])


def _is_read_outside(node: ir.Node, nodes: set[ir.Node]) -> bool:
    output = node.outputs[0]
    return output.is_graph_output() or any(use.node not in nodes for use in output.uses())


def _kept(value: ir.Value, nodes: set[ir.Node]) -> ir.Value:
    """What a selection gives where no row chooses: the first that is not such a selection itself."""
    selection = value.producer()
    while selection is not None and selection in nodes:
        if selection.inputs[2] is None:
            raise AssertionError("Where has three inputs")
        value = selection.inputs[2]
        selection = value.producer()
    return value


def _identities(chosen: Sequence[ir.Value], kept: Sequence[ir.Value], name: str) -> ir.Graph:
    nodes = [ir.node("Identity", [value], name=f"{name}/Identity_{i}") for i, value in enumerate(kept)]
    for node, value in zip(nodes, chosen, strict=True):
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{value.name}.not", value.shape, value.type
    return ir.Graph([], [node.outputs[0] for node in nodes], nodes=nodes, name=name)
