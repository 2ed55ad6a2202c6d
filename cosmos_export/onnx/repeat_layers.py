"""The graph of a model's first layer becomes the graph of all its layers.

Decoder layers differ in nothing but their weights, their caches and what the layer before hands on, and to trace one
takes a third of a second. So one is traced, and copied for each that the model has besides:

    before:  embedding ──► layer 0 ──────────────────────────► norm, logits, heads
    after:   embedding ──► layer 0 ──► layer 1 ──► layer 2 ──► norm, logits, heads

What layers share (positions, rotary angles, a mask, shapes), the optimizer leaves in a whole trace to the first that
needs it, where the others read it; and so do copies. The result is what a whole trace gives, node for node and
initializer for initializer, but for names that mean nothing and for which input is asked how long an axis is.
A layer whose computation followed from its number would be lost here: verification finds that, as the model has it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from cosmos_export.checkpoint import EMBEDDING
from cosmos_export.errors import ExportError
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_runtime import GraphSpec, Role, TensorSpec

SCOPES = "pkg.torch.onnx.name_scopes"  # where a trace notes which modules a node comes from

_CACHES = (Role.PAST_KEY, Role.PAST_VALUE, Role.PRESENT_KEY, Role.PRESENT_VALUE)


class LayerNotFoundError(ExportError):
    """The layer of a traced graph does not stand apart from what is around it, so no other can be made of it."""


def first_layer(model: CosmosBackbone) -> CosmosBackbone:
    """A copy of a skeleton, with its first layer only."""
    shallow = copy.deepcopy(model)
    shallow.layers = shallow.layers[:1]
    shallow.config.n_layers = 1
    return shallow


def spec_of_first_layer(spec: GraphSpec) -> GraphSpec:
    """The signature of a graph without the caches of all layers but the first."""

    def kept(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        others = {name for names in _cache_names(tensors) for name in names[1:]}
        return tuple(tensor for tensor in tensors if tensor.name not in others)

    return replace(spec, inputs=kept(spec.inputs), outputs=kept(spec.outputs))


def repeat_layer(model: ir.Model, spec: GraphSpec, layers: int) -> None:
    """Gives a graph of one layer as many as `layers`, and with them the signature `spec`.

    Raises LayerNotFoundError, and leaves the graph as it is, where the layer does not stand apart.
    """
    graph = model.graph
    all_layers = [first := _Layer.find(graph, spec)]
    readers = first.output.uses()
    for number in range(1, layers):
        all_layers.append(first.copied(all_layers[-1].output, spec, number))
    graph.insert_after(first.nodes[-1], [node for layer in all_layers[1:] for node in layer.nodes])
    for node, place in readers:
        node.replace_input_with(place, all_layers[-1].output)
    _declare(graph, spec, all_layers)


@dataclass(frozen=True)
class _Layer:
    """The nodes of one layer in their order, and what they stand between: the hidden states (B, T, D) before and after
    it, its weights in the graph's order, and its caches before and after it; none in a graph without."""

    nodes: Sequence[ir.Node]
    hidden: ir.Value
    output: ir.Value
    weights: Sequence[ir.Value]
    pasts: Sequence[ir.Value]
    presents: Sequence[ir.Value]

    @classmethod
    def find(cls, graph: ir.Graph, spec: GraphSpec) -> _Layer:
        """The layer of a graph of one: of the nodes of its module, and of those that the optimizer put between them,
        all that follow from a hidden state, a weight or a cache. The others are shared."""
        weights = [value for name, value in graph.initializers.items() if name.startswith(_prefix(0))]
        caches = _caches_of(spec, 0)
        pasts = [value for value in graph.inputs if value.name in caches]
        presents = [value for value in graph.outputs if value.name in caches]
        follows = _following(graph, [graph.initializers[EMBEDDING], *weights, *pasts])
        nodes = [node for node in _of_module(graph) if follows.intersection(node.inputs)]
        made = {value for node in nodes for value in node.outputs}
        taken = follows.intersection(v for node in nodes for v in node.inputs) - {*made, *weights, *pasts}
        given = {value for value in made if not {*nodes}.issuperset(value.consumers())} - {*presents}
        stands_apart = len(taken) == len(given) == 1 and made.issuperset(presents)
        if not stands_apart or not weights or any(map(_has_branches, nodes)):
            raise LayerNotFoundError(
                f"the traced layer ({len(nodes)} nodes, {len(weights)} weights) was expected to take one hidden state, "
                f"to give one and its caches, and to have no branches; it takes {_listed(taken)} and gives "
                f"{_listed(given)}"
            )
        return cls(nodes, taken.pop(), given.pop(), weights, pasts, presents)

    def copied(self, hidden: ir.Value, spec: GraphSpec, number: int) -> _Layer:
        """The same layer as number `number`, with `hidden` before it; in no graph yet."""
        caches = dict(zip(_caches_of(spec, 0), _caches_of(spec, number), strict=True))
        values = {self.hidden: hidden}
        for weight in self.weights:
            values[weight] = _copied_value(weight, _prefix(number) + str(weight.name).removeprefix(_prefix(0)))
        for value in (*self.pasts, *(value for node in self.nodes for value in node.outputs)):
            values[value] = _copied_value(value, caches.get(str(value.name), f"{_prefix(number)}{value.name}"))
        return replace(
            self,
            nodes=[_copied_node(node, values, number) for node in self.nodes],
            hidden=hidden,
            output=values[self.output],
            weights=[values[value] for value in self.weights],
            pasts=[values[value] for value in self.pasts],
            presents=[values[value] for value in self.presents],
        )


def _copied_node(node: ir.Node, values: Mapping[ir.Value, ir.Value], number: int) -> ir.Node:
    notes = dict(node.metadata_props)
    if SCOPES in notes:
        notes[SCOPES] = notes[SCOPES].replace(_module(0), _module(number))
    return ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values.get(value, value) for value in node.inputs],
        list(node.attributes.values()),
        overload=node.overload,
        outputs=[values[value] for value in node.outputs],
        version=node.version,
        name=f"{_prefix(number)}{node.name}",
        metadata_props=notes,
    )


def _copied_value(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=copy.copy(value.shape), type=value.type, metadata_props=dict(value.metadata_props))


def _declare(graph: ir.Graph, spec: GraphSpec, layers: Sequence[_Layer]) -> None:
    """Makes the layers' caches inputs and outputs, in the order of `spec`, and their weights initializers, in the order
    of the layers."""
    for values, tensors, caches in (
        (graph.inputs, spec.inputs, [value for layer in layers for value in layer.pasts]),
        (graph.outputs, spec.outputs, [value for layer in layers for value in layer.presents]),
    ):
        named = {value.name: value for value in (*values, *caches)}
        values[:] = [named[tensor.name] for tensor in tensors]
    initializers = list(graph.initializers.values())
    behind = initializers.index(layers[0].weights[-1]) + 1
    initializers[behind:behind] = [value for layer in layers[1:] for value in layer.weights]
    graph.initializers.clear()
    for value in initializers:
        graph.initializers.add(value)


def _following(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Value]:
    """`values`, and what follows from them, other than from their shapes alone."""
    found = {*values}
    for node in graph:
        if node.op_type != "Shape" and found.intersection(node.inputs):
            found.update(node.outputs)
    return found


def _of_module(graph: ir.Graph) -> list[ir.Node]:
    """From the first node of the layer's module to its last: what the optimizer adds has no note of its module."""
    nodes = list(graph)
    noted = [place for place, node in enumerate(nodes) if f"'{_module(0)}'" in node.metadata_props.get(SCOPES, "")]
    return nodes[noted[0] : noted[-1] + 1] if noted else []


def _module(layer: int) -> str:
    return f"model.layers.{layer}"


def _prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with, in a checkpoint and in a graph."""
    return f"layers.{layer}."


def _cache_names(tensors: Iterable[TensorSpec]) -> list[list[str]]:
    """The names of caches among a graph's inputs or outputs: a list of all layers' for each role that there is."""
    names = [[tensor.name for tensor in tensors if tensor.role == role] for role in _CACHES]
    return [of_role for of_role in names if of_role]


def _caches_of(spec: GraphSpec, layer: int) -> list[str]:
    """The names of one layer's caches, before and after it."""
    return [names[layer] for names in _cache_names((*spec.inputs, *spec.outputs))]


def _has_branches(node: ir.Node) -> bool:
    return any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    )


def _listed(values: Collection[ir.Value]) -> str:
    return ", ".join(sorted(str(value.name) for value in values)) or "none"
