"""Computes what only a report reads where a run wants a report."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
import onnx_ir as ir

from cosmos_export.onnx.head_signature import WANTS_SCORES
from cosmos_export.onnx.passes.branches import computing_only, hand_over, producer_of
from cosmos_runtime import CAPABILITIES


class ScoresOnDemand(ir.passes.InPlacePass):
    """Scores that no choice depends on go into a branch, which is taken where the run says that it wants them.

    Before:  s = Sigmoid(Gemm(x, W, b))                                            s (B, n), an output
    After:   s = If(ReduceMax(wants_scores)) {Sigmoid(Gemm(x, W, b))} else {no rows: (0, n)}

    What nothing else reads goes with them: detectors' last layers, assessments, matrices. A score that something is
    chosen by, a blocked row above all, is computed in any case. Where the branch is not taken its scores have no rows:
    a caller cannot take them for scores. A selection stays where what it may choose is needed otherwise: it belongs to
    the branch that computes that (see `SkipUnchosen`).
    Precondition: `wants_scores` is an input that nothing reads yet. Without it, this pass does nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        wanted = next((value for value in graph.inputs if value.name == WANTS_SCORES and not value.uses()), None)
        scores = [] if wanted is None else [value for value in graph.outputs if _is_told(value)]
        nodes = _told_alone(graph, scores)
        scores = [value for value in scores if value.producer() in nodes]
        if wanted is not None and scores:
            _branch_off(graph, wanted, scores, nodes)
            graph.sort()
        return ir.passes.PassResult(model, bool(scores))


def _is_told(output: ir.Value) -> bool:
    """Whether an output is a score of a capability; whether a row is blocked is told in any case."""
    return output.name is not None and output.name.partition(".")[0] in CAPABILITIES and output.shape is not None


def _told_alone(graph: ir.Graph, scores: Sequence[ir.Value]) -> set[ir.Node]:
    """What is computed for these scores and nothing else."""
    staying: set[ir.Node] = set()
    while True:
        nodes = set(computing_only(graph, scores, staying))
        torn = {node for node in nodes if node.op_type == "Where" and not _computes_what_it_chooses(node, nodes)}
        if not torn:
            return nodes
        staying |= torn


def _computes_what_it_chooses(selection: ir.Node, nodes: Set[ir.Node]) -> bool:
    producer = producer_of(selection.inputs[1])
    while producer is not None and producer.op_type == "Cast":  # in whatever type
        producer = producer_of(producer.inputs[0])
    return producer is None or producer in nodes


def _branch_off(graph: ir.Graph, wanted: ir.Value, scores: list[ir.Value], nodes: set[ir.Node]) -> None:
    inner = [node for node in graph if node in nodes]
    graph.remove(inner)
    any_wanted = ir.node("ReduceMax", [wanted], {"keepdims": 0}, name="scores/Any")
    any_wanted.outputs[0].name = "scores/wanted"
    any_wanted.outputs[0].type, any_wanted.outputs[0].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    choice = ir.node("If", [any_wanted.outputs[0]], num_outputs=len(scores), name="scores/If")
    none = [_no_rows(value) for value in scores]
    for value, output in zip(scores, choice.outputs, strict=True):
        hand_over(graph, value, output, nodes)
    then = ir.Graph([], scores, nodes=inner, name="scores/then")
    otherwise = ir.Graph([], [node.outputs[0] for node in none], nodes=none, name="scores/else")
    choice.attributes["then_branch"] = ir.AttrGraph("then_branch", then)
    choice.attributes["else_branch"] = ir.AttrGraph("else_branch", otherwise)
    graph.extend([any_wanted, choice])


def _no_rows(like: ir.Value) -> ir.Node:
    """A constant of the type of a score, of no rows."""
    if like.dtype is None or like.shape is None:
        raise AssertionError(f"{like.name}: a traced value has a type and a shape")
    shape = [0, *(int(axis) for axis in like.shape.dims[1:] if isinstance(axis, int))]
    nothing = np.zeros(shape, like.dtype.numpy())
    node = ir.node("Constant", [], {"value": ir.tensor(nothing, dtype=like.dtype)}, name=f"{like.name}/none")
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{like.name}.none", like.type, ir.Shape(shape)
    return node
