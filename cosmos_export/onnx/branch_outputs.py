"""An If node as what it computes of each of its outputs: a slice of a graph takes some of them, and none of the rest.

Capability heads share branches (`passes.ScoresOnDemand` puts the scores of all of them into one), so a head is cut out
of a branch as it is out of the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from onnx import AttributeProto, GraphProto, NodeProto

BRANCHING = "If"


def reads(node: NodeProto) -> Iterator[str]:
    """What a node reads, the branches in it included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            inner = attribute.g
            own = {i.name for i in (*inner.input, *inner.initializer)} | {o for n in inner.node for o in n.output}
            yield from (name for n in inner.node for name in reads(n) if name not in own)
            yield from (o.name for o in inner.output if o.name not in own)


def with_outputs_alone(node: NodeProto, wanted: Collection[str]) -> NodeProto:
    """An If with these of its outputs, and of its branches what computes them; another node as it is."""
    places = [at for at, name in enumerate(node.output) if name in wanted]
    if node.op_type != BRANCHING or len(places) == len(node.output):
        return node
    kept = NodeProto()
    kept.CopyFrom(node)
    del kept.output[:]
    kept.output.extend(node.output[at] for at in places)
    for attribute in kept.attribute:
        if attribute.type == AttributeProto.GRAPH:
            _keep(attribute.g, places)
    return kept


def _keep(branch: GraphProto, places: Collection[int]) -> None:
    """Leaves of a branch its outputs at these places, and the nodes that they need."""
    outputs = [branch.output[at] for at in places]
    needed, nodes = {output.name for output in outputs}, list[NodeProto]()
    for node in reversed(branch.node):
        if needed.intersection(node.output):
            nodes.append(with_outputs_alone(node, needed))
            needed.update(reads(nodes[-1]))
    kept_outputs, kept_nodes = _copies(outputs), _copies(nodes[::-1])  # of what the next lines delete
    del branch.output[:], branch.node[:]
    branch.output.extend(kept_outputs)
    branch.node.extend(kept_nodes)


def _copies(messages: list) -> list:
    copies = [type(message)() for message in messages]
    for copy, message in zip(copies, messages, strict=True):
        copy.CopyFrom(message)
    return copies
