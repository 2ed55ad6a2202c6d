"""Cuts a bundle's graph where the model has its borders: embedding, each layer, final norm and logits, and the steps
within a layer. A slice is a small ONNX model that refers to the bundle's own external data, so no weight is copied.

    B  batch    T  sequence    D  dim    L  layers

Where the borders are follows from the weights that a value depends on, not from what nodes are called. Initializers
have the checkpoint's names, whatever passes did (packed, transposed, quantised). Of the values that follow from tokens
and embedding, those that nothing bypasses on the way to the logits are the only places where one tensor carries all:
after the embedding, after each residual sum, after the final norm. The last of them before anything meets a weight of
layer k is the hidden state that goes into layer k. Within a layer, a step begins or ends where a product reads one of
its matrices.

A skip-norm operator spans such a place: it gives the sum, which is the hidden state, and the norm of it, which belongs
to the next layer. A slice that begins with the sum runs the same operator on (sum, zeros), which adds nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from cosmos_export.checkpoint import EMBEDDING
from cosmos_export.errors import ExportError
from cosmos_export.onnx.branch_outputs import BRANCHING, reads, with_outputs_alone
from cosmos_export.onnx.signature import parts_of, quantized_part, source_of
from cosmos_runtime import GraphSpec, Role

SKIP_NORM = "SkipSimplifiedLayerNormalization"
# Its outputs: the norm, and the sum that it is of.
_NORMED, _SUM = 0, 3
FINAL_NORM = "norm.weight"

_OF_THE_CACHE = (Role.PRESENT_KEY, Role.PRESENT_VALUE)


@dataclass(frozen=True)
class LayerSteps:
    """Values of the graph between the steps of one layer, by name.

    `query`, `key` and `value` are one where the projections are packed, and so are `gate` and `up`.
    """

    hidden: str  # (B, T, D): what goes into the layer
    normed: str
    query: str
    key: str
    value: str
    attended: str
    middle: str  # hidden state between attention and feed-forward
    normed_middle: str
    gate: str
    up: str
    activated: str
    output: str  # hidden state after the layer


@dataclass(frozen=True)
class _Step:
    """What a node computes of one of its results: `reads` are what it follows from."""

    node: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]


class SlicedGraph:
    """An ONNX file of a bundle, and where it can be cut. Values are called by their names in the graph."""

    def __init__(self, model: ModelProto, folder: Path, spec: GraphSpec) -> None:
        self.model, self.folder, self.spec = model, folder, spec
        _name_sums(model.graph)
        self.initializers = {i.name: i for i in model.graph.initializer}
        self._inputs = {i.name: i for i in model.graph.input}
        self._known = {v.name: v for v in (*model.graph.value_info, *model.graph.output, *model.graph.input)}
        self._nodes = list(model.graph.node)
        self._steps = [step for at, node in enumerate(self._nodes) for step in _steps(at, node)]
        self._writer = {value: step for step in self._steps for value in step.writes}

    @classmethod
    def open(cls, path: Path, spec: GraphSpec) -> Self:
        """Reads the graph without its external data; `spec` is what the manifest says of it."""
        return cls(onnx.load(path, load_external_data=False), path.parent, spec)

    # Where it can be cut

    @cached_property
    def hidden(self) -> tuple[str, ...]:
        """The hidden state after the embedding and after each layer: L + 1 values (B, T, D).

        Raises ExportError where the graph's layers cannot be told apart.
        """
        borders = [self._cuts_before(f"layers.{layer}.")[-1] for layer in self._layers]
        # Before the final norm its quotient may be the last cut; the sum is the first that depends on the same weights.
        before = self._cuts_before(FINAL_NORM)
        last = next(cut for cut in before if self._depends[cut] == self._depends[before[-1]])
        return (*borders, last)

    @cached_property
    def normed(self) -> str:
        """The hidden state after the final norm, (B, T, D)."""
        return self._first_cut({FINAL_NORM}, "the final norm")

    def steps(self, layer: int) -> LayerSteps:
        """The steps of one layer. Raises ExportError where a product with one of its matrices is missing."""
        of = f"layers.{layer}."
        q, k, v = (self._product(f"{of}attention.{name}.weight") for name in ("q_proj", "k_proj", "v_proj"))
        o, w2 = self._product(f"{of}attention.o_proj.weight"), self._product(f"{of}feed_forward.w2.weight")
        w1, w3 = (self._product(f"{of}feed_forward.{name}.weight") for name in ("w1", "w3"))
        return LayerSteps(
            hidden=self.hidden[layer],
            normed=self._data_input(q),
            query=q.writes[0],
            key=k.writes[0],
            value=v.writes[0],
            attended=self._data_input(o),
            middle=self._first_cut({f"{of}attention.o_proj.weight"}, f"the attention of layer {layer}"),
            normed_middle=self._data_input(w1),
            gate=w1.writes[0],
            up=w3.writes[0],
            activated=self._data_input(w2),
            output=self.hidden[layer + 1],
        )

    def cache_outputs(self, layer: int) -> list[str]:
        """The graph's outputs that hold a layer's key and value cache; none in a graph without a cache."""
        present = [[t.name for t in self.spec.outputs if t.role == role] for role in _OF_THE_CACHE]
        return [names[layer] for names in present if names]

    @property
    def results(self) -> list[str]:
        """The graph's outputs other than caches."""
        return [t.name for t in self.spec.outputs if t.role not in _OF_THE_CACHE]

    # Following the heads

    def taken_by_product(self, weight: str) -> str:
        """The value that follows from the tokens where it meets this matrix. Raises ExportError where none does."""
        return self._data_input(self._product(weight))

    def written_by(self, value: str) -> tuple[str, tuple[str, ...]]:
        """The operator that gives a value, and what that reads; ("", ()) for what no node gives."""
        step = self._writer.get(value)
        return ("", ()) if step is None else (self._nodes[step.node].op_type, step.reads)

    def depends_on(self, value: str) -> frozenset[str]:
        """The checkpoint's tensors, and the graph's inputs ("input NAME"), that a value follows from."""
        return self._depends.get(value, frozenset())

    def before(self, value: str) -> list[str]:
        """What a value is made of, itself included, in the order of the graph."""
        if value not in self._writer:
            return [value]
        found = {value, *self._ancestors(self._writer[value])}
        return [written for step in self._steps for written in step.writes if written in found]

    def first_after(self, weights: Sequence[str]) -> str:
        """The first value that follows from all these weights. Raises ExportError where none does."""
        wanted = set(weights)
        for step in self._steps:
            if wanted <= self.depends_on(step.writes[0]):
                return step.writes[0]
        raise ExportError(f"{self.folder}: nothing in the graph follows from {weights[0]}; export the bundle again")

    def unsliced(self, cuts: Iterable[tuple[Sequence[str], Sequence[str]]]) -> list[str]:
        """What the graph's results need and none of these cuts, (inputs, outputs) each, computes."""
        left = self._computed([], [t.name for t in self.spec.outputs])
        for inputs, outputs in cuts:
            left -= self._computed(inputs, outputs)
        return sorted(left)

    def _computed(self, inputs: Sequence[str], outputs: Sequence[str]) -> set[str]:
        return set().union(*self._needed(set(inputs), outputs).values())

    # Cutting

    def cut(self, inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
        """The model that computes `outputs` from `inputs`, values of the graph, and from the graph's inputs that it
        needs besides.

        Its inputs keep the graph's names. External data are the bundle's own: see `parity.slice_runs.open_slice`.
        """
        needed = self._needed(set(inputs), outputs)
        nodes, initializers, graph_inputs = list[NodeProto](), set[str](), set[str]()
        for at in sorted(needed):
            nodes += self._emitted(self._nodes[at], needed[at], set(inputs))
        made = {name for node in nodes for name in node.output}
        for name in (name for node in nodes for name in reads(node)):
            if name in self._inputs:
                graph_inputs.add(name)
            elif name in self.initializers and name not in made:
                initializers.add(name)
        wanted = [self._known_value(name) for name in dict.fromkeys(inputs)]
        wanted += [value for name, value in self._inputs.items() if name in graph_inputs and name not in inputs]
        graph = helper.make_graph(
            nodes,
            "slice",
            wanted,
            [self._known_value(name) for name in dict.fromkeys(outputs)],
            [tensor for name, tensor in self.initializers.items() if name in initializers],
            value_info=[v for v in self.model.graph.value_info if v.name in made and v.name not in outputs],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        model.functions.extend(self.model.functions)
        return model

    def with_outputs(self, values: Iterable[str]) -> ModelProto:
        """The whole graph, with `values` as outputs besides its own, and with inputs that all have to be given."""
        model = ModelProto()
        model.CopyFrom(self.model)
        del model.graph.initializer[:]
        model.graph.initializer.extend(i for i in self.model.graph.initializer if i.name not in self._inputs)
        present = {output.name for output in model.graph.output}
        model.graph.output.extend(self._known_value(v) for v in dict.fromkeys(values) if v not in present)
        return model

    def sources(self, model: ModelProto) -> list[str]:
        """The checkpoint's tensors that the initializers of a slice hold, each once."""
        named = (part for i in model.graph.initializer for part in parts_of(source_of(quantized_part(i.name)[0])[0]))
        return list(dict.fromkeys(named))

    # Following values

    @cached_property
    def _depends(self) -> dict[str, frozenset[str]]:
        """The checkpoint's tensors, and the graph's inputs ("input NAME"), that each value follows from."""
        found: dict[str, frozenset[str]] = {name: frozenset({f"input {name}"}) for name in self._inputs}
        for name in self.initializers.keys() - self._inputs.keys():
            found[name] = frozenset(parts_of(source_of(quantized_part(name)[0])[0]))
        for step in self._steps:
            shape = self._nodes[step.node].op_type == "Shape"  # of a value, which says nothing of what is in it
            depends = frozenset() if shape else frozenset().union(*(found.get(r, frozenset()) for r in step.reads))
            found |= dict.fromkeys(step.writes, depends)
        return found

    def _is_data(self, value: str) -> bool:
        tokens = next(t.name for t in self.spec.inputs if t.role == Role.TOKENS)
        return {EMBEDDING, f"input {tokens}"} <= self._depends.get(value, frozenset())

    @cached_property
    def _cuts(self) -> list[str]:
        """Values that follow from tokens and embedding and that nothing bypasses on its way to the results."""
        data = [step for step in self._steps if any(self._is_data(value) for value in step.writes)]
        reaches = set(self.results)
        for step in reversed(data):
            if reaches.intersection(step.writes):
                reaches.update(step.reads)
        data = [step for step in data if reaches.intersection(step.writes)]
        last_use = {value: at for at, step in enumerate(data) for value in step.reads}
        last_use |= dict.fromkeys(self.results, len(data))
        cuts, live = list[str](), set[str]()
        for at, step in enumerate(data):
            live |= {value for value in step.writes if self._is_data(value)}
            live = {value for value in live if last_use.get(value, -1) > at}
            if len(live) == 1 and not live.issubset(cuts[-1:]):
                cuts += live
        return cuts

    @property
    def _layers(self) -> range:
        depends = (self._depends[name] for name in self.initializers)
        numbers = {int(s.split(".")[1]) for sources in depends for s in sources if s.startswith("layers.")}
        if not numbers:
            raise ExportError(
                f"{self.folder}: no initializer of the graph is called layers.NUMBER.*, as a checkpoint's tensors are, "
                f"so its layers cannot be told apart; export it again"
            )
        return range(max(numbers) + 1)

    def _cuts_before(self, weights: str) -> list[str]:
        """The cuts that lie before anything meets a weight whose name begins so."""
        for step in self._steps:
            if any(self._is_data(v) for v in step.reads) and any(self._follows_from(v, weights) for v in step.reads):
                before = self._ancestors(step)
                cuts = [cut for cut in self._cuts if cut in before]
                if cuts:
                    return cuts
        raise ExportError(
            f"{self.folder}: no single value of the graph is the hidden state before {weights}*. The graph is not one "
            f"that this version writes; export the bundle again"
        )

    def _follows_from(self, value: str, weights: str) -> bool:
        return any(name.startswith(weights) for name in self._depends.get(value, ()))

    def _ancestors(self, step: _Step) -> set[str]:
        found, open_ = set[str](), list(step.reads)
        while open_:
            value = open_.pop()
            if value not in found:
                found.add(value)
                open_ += self._writer[value].reads if value in self._writer else ()
        return found

    def _first_cut(self, weights: set[str], what: str) -> str:
        for cut in self._cuts:
            if weights and weights <= self._depends[cut]:
                return cut
        raise ExportError(
            f"{self.folder}: {what} ends nowhere in this graph: no single value depends on all of its weights. The "
            f"graph is not one that this version writes; export the bundle again"
        )

    def _product(self, weight: str) -> _Step:
        """The step where a matrix meets what follows from the tokens."""
        for step in self._steps:
            others = [value for value in step.reads if not self._is_data(value)]
            if len(others) < len(step.reads) and any(weight in self._depends.get(v, ()) for v in others):
                return step
        raise ExportError(f"{self.folder}: no product of this graph reads {weight}; export the bundle again")

    def _data_input(self, step: _Step) -> str:
        return next(value for value in step.reads if self._is_data(value))

    def _needed(self, inputs: set[str], outputs: Sequence[str]) -> dict[int, set[str]]:
        """Which values are needed of which node, in order to have `outputs` when `inputs` are there."""
        needed, seen, open_ = defaultdict[int, set[str]](set), set(inputs), list(outputs)
        while open_:
            value = open_.pop()
            if value in seen or value not in self._writer:
                continue
            seen.add(value)
            step = self._writer[value]
            needed[step.node].update(step.writes)
            open_ += step.reads
        return needed

    def _emitted(self, node: NodeProto, needed: set[str], inputs: set[str]) -> Iterator[NodeProto]:
        """`node` as a slice has it."""
        if node.op_type == BRANCHING:
            yield with_outputs_alone(node, needed)
            return
        if not _is_skip_norm(node) or (node.output[_NORMED] in needed and node.output[_SUM] in needed):
            yield node
            return
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.output[_NORMED] in needed:  # of a sum that is an input
            total, zeros = node.output[_SUM], f"{node.output[_SUM]}.zeros"
            yield helper.make_node("Sub", [total, total], [zeros], name=zeros)
            copy.input[0], copy.input[1] = total, zeros
            copy.output[_SUM] = f"{total}.again"
        else:
            copy.output[_NORMED] = f"{node.output[_NORMED]}.unused"
        yield copy

    def _known_value(self, name: str) -> ValueInfoProto:
        if name in self._known:
            return self._known[name]
        hidden = next((self._known[v] for v in self.hidden if v in self._known), None)
        if hidden is None:
            raise ExportError(f"{self.folder}: the graph does not say of which type {name} is; export the bundle again")
        return helper.make_tensor_value_info(name, hidden.type.tensor_type.elem_type, None)


def stored_array(tensor: TensorProto, folder: Path) -> NDArray:
    """The numbers of an initializer, read from its file and not mapped, so that nothing stays in memory behind it."""
    if not tensor.external_data:
        return numpy_helper.to_array(tensor)
    entry = {e.key: e.value for e in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    values = np.fromfile(folder / entry["location"], dtype, count, offset=int(entry.get("offset", 0)))
    if len(values) != count:
        raise ExportError(f"{folder / entry['location']} ends before {tensor.name}; export the bundle again")
    return values.reshape(tuple(tensor.dims))


def _is_skip_norm(node: NodeProto) -> bool:
    return node.op_type == SKIP_NORM and node.domain == "com.microsoft"


def _name_sums(graph: GraphProto) -> None:
    """A sum that nothing else reads has no name; as a place to cut it needs one."""
    for node in graph.node:
        if _is_skip_norm(node):
            node.output.extend([""] * (_SUM + 1 - len(node.output)))
            node.output[_SUM] = node.output[_SUM] or f"{node.output[_NORMED]}.sum"


def _steps(at: int, node: NodeProto) -> Iterator[_Step]:
    """A node as what it computes: one step, but a skip-norm is a sum and a norm of it, and a branch may be taken for
    each of its results by itself."""
    if _is_skip_norm(node):
        total = node.output[_SUM]
        yield _Step(at, (*node.input[:2], *node.input[3:4]), (total,))
        yield _Step(at, (total, node.input[2]), (node.output[_NORMED],))
    elif node.op_type == BRANCHING:
        for name in node.output:
            yield _Step(at, tuple(reads(with_outputs_alone(node, {name}))), (name,))
    else:
        yield _Step(at, tuple(reads(node)), tuple(name for name in node.output if name))
