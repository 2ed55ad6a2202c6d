"""The gates bite on capability heads, too: each fault is made in a finished graph, whose weights are still equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, NodeProto, helper, numpy_helper

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.parity.gates import Verdict
from cosmos_export.parity.report import ParityReport
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import ExportedBundle

from .head_bundles import export_heads, heads_checkpoint, heads_config
from .mutants import GraphFault, with_graph_fault


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return heads_checkpoint(heads_config())


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ExportedBundle:
    """Proven by itself: what fails below fails for its fault."""
    return export_heads(checkpoint, tmp_path_factory.mktemp("heads") / "bundle", effort=Effort.FULL)


def _all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Nodes of a graph and of the branches within it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g)


def _producer(graph: GraphProto, output: str) -> NodeProto:
    return next(node for node in _all_nodes(graph) if output in node.output)


def _node(graph: GraphProto, module: str, operator: str) -> NodeProto:
    """The first node of a kind in a module."""
    return next(node for node in _all_nodes(graph) if node.name.startswith(module) and node.op_type == operator)


def _rename_output(graph: GraphProto, old: str, new: str) -> None:
    outputs = _producer(graph, old).output
    outputs[list(outputs).index(old)] = new


def _scores_swapped(graph: GraphProto) -> None:
    _rename_output(graph, "safety.confidence", "other")
    _rename_output(graph, "safety.factuality", "safety.confidence")
    _rename_output(graph, "other", "safety.factuality")


def _a_score_of_another_round(graph: GraphProto) -> None:
    _rename_output(graph, "evaluation.factuality", "in order")
    graph.initializer.append(numpy_helper.from_array(np.array([1, 0]), "last first"))
    graph.node.append(helper.make_node("Gather", ["in order", "last first"], ["evaluation.factuality"], axis=1))


def _from_the_past(output: str, past: str) -> GraphFault:
    """What comes out is what came in."""

    def fault(graph: GraphProto) -> None:
        _rename_output(graph, output, f"{output}.unused")
        graph.node.append(helper.make_node("Identity", [past], [output], name=f"{output}/stale"))

    return fault


def _keys_and_values_swapped(graph: GraphProto) -> None:
    keys, values = _producer(graph, "present_memory.keys"), _producer(graph, "present_memory.values")
    keys.input[2], values.input[2] = values.input[2], keys.input[2]


def _entries_in_the_first_slot(graph: GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.int64(0), "no slot"))
    slot = _node(graph, "memory_system.working_memory", "Mod")
    zero = helper.make_node("Mul", [slot.output[0], "no slot"], ["first slot"], name="first slot")
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "first slot" if name == slot.output[0] else name
    graph.node.insert(list(graph.node).index(slot) + 1, zero)


def _threshold(module: str, factor: float, operator: str = "Greater") -> GraphFault:
    def fault(graph: GraphProto) -> None:
        comparison = _node(graph, module, operator)
        given = next(i for i in graph.initializer if i.name == comparison.input[1])
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(given) * np.float32(factor), "moved"))
        comparison.input[1] = "moved"

    return fault


def _query_never_passed_on(graph: GraphProto) -> None:
    """The first token of the run instead of the row's."""
    where = _producer(graph, "present_query")
    where.input[2] = where.input[1]


def _memory_reads_its_oldest(graph: GraphProto) -> None:
    top = next(node for node in graph.node if node.op_type == "TopK")
    next(attribute for attribute in top.attribute if attribute.name == "largest").i = 0


def _vector_at_every_position(graph: GraphProto) -> None:
    """Not at offset 0 alone."""
    graph.initializer.append(numpy_helper.from_array(np.array([-1]), "any"))
    equal = next(node for node in graph.node if node.op_type == "Equal" and node.input[0] == "logit_offsets")
    equal.op_type, equal.input[1] = "Greater", "any"


def _every_piece_ends_a_call(graph: GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array([True]), "yes"))
    for node in list(graph.node):
        for i, name in enumerate(node.input):
            node.input[i] = "always" if name == "ends_call" else name
    graph.node.insert(0, helper.make_node("Or", ["ends_call", "yes"], ["always"], name="always"))


FAULTS = {
    "two scores swapped": _scores_swapped,
    "a score of another round": _a_score_of_another_round,
    "memory keys not updated": _from_the_past("present_memory.keys", "past_memory.keys"),
    "memory values not updated": _from_the_past("present_memory.values", "past_memory.values"),
    "memory keys and values swapped": _keys_and_values_swapped,
    "memory has one slot": _entries_in_the_first_slot,
    "memory reads what is least alike": _memory_reads_its_oldest,
    "calls not counted": _from_the_past("memory.calls", "past_memory.calls"),
    "query not kept": _from_the_past("present_query", "past_query"),
    "query of the last run": _query_never_passed_on,
    "threshold of harm": _threshold("safety_system.content_filter", 0.8, "GreaterOrEqual"),
    "threshold of bias": _threshold("safety_system.bias_detector", 1.2),
    "threshold of attacks": _threshold("safety_system.adversarial_defense", 0.8),
    "threshold of corrections": _threshold("evaluation_system.self_correction", 1.2),
    "vector of the heads everywhere": _vector_at_every_position,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_of_the_heads_fails(
    fault: GraphFault, bundle: ExportedBundle, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    report = verify_bundle(with_graph_fault(bundle, tmp_path, fault), checkpoint)
    assert all(stored.passed for stored in report.stored), "the fault is in the graph, the weights are still equal"
    assert _failed(report)
    assert not report.passed


def test_a_piece_that_is_taken_for_a_call_fails(
    bundle: ExportedBundle, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sequences are so long that they go in pieces."""
    monkeypatch.setattr("cosmos_runtime.decoder_graph.CHUNK", 8)
    assert verify_bundle(bundle.path, checkpoint).passed
    report = verify_bundle(with_graph_fault(bundle, tmp_path, _every_piece_ends_a_call), checkpoint)
    assert any("1 x 32 tokens" in name for name in _failed(report))


def _failed(report: ParityReport) -> list[str]:
    return [case.name for case in report.cases if case.verdict is Verdict.FAIL]
