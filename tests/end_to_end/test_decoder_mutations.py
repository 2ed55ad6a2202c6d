"""The gates bite on decoder bundles too: faults are made in the finished graph or in its stored tensors.

The fused attention operator replaces the code that `test_parity_mutations` changes, so here its attributes, inputs and
weights are changed instead.
"""

from __future__ import annotations

import numpy as np
import pytest
from onnx import GraphProto, helper, numpy_helper

from cosmos_export.parity.gates import Arithmetic, Verdict
from cosmos_export.parity.report import ParityReport
from cosmos_export.parity.verify import verify_bundle
from cosmos_runtime.decoder_graph import Stepper

from .mutants import TensorFault, attribute_of, nodes_of, with_graph_fault, with_tensor_fault


def test_without_a_fault_the_bundles_pass(small_decoder, small_int4):
    for bundle in (small_decoder, small_int4):
        assert bundle.report.passed
        assert bundle.report.count(Verdict.FAIL) == 0
    arithmetics = {case.arithmetic for case in small_int4.report.cases}
    assert arithmetics == {Arithmetic.FLOAT32, Arithmetic.INT8_ACTIVATIONS}


# Faults of the graph


def _scale_off_by_a_thousandth(graph: GraphProto) -> None:
    for node in nodes_of(graph, "GroupQueryAttention"):
        attribute_of(node, "scale").f *= 1.001


def _scale_of_another_width(graph: GraphProto) -> None:
    for node in nodes_of(graph, "GroupQueryAttention"):
        attribute_of(node, "scale").f **= 2


def _no_rotary(graph: GraphProto) -> None:
    for node in nodes_of(graph, "GroupQueryAttention"):
        attribute_of(node, "do_rotary").i = 0


def _rotary_pairs_interleaved(graph: GraphProto) -> None:
    for node in nodes_of(graph, "GroupQueryAttention"):
        attribute_of(node, "rotary_interleaved").i = 1


def _short_window(graph: GraphProto) -> None:
    for node in nodes_of(graph, "GroupQueryAttention"):
        node.attribute.append(helper.make_attribute("local_window_size", 4))


def _another_norm_eps(graph: GraphProto) -> None:
    for node in nodes_of(graph, "SkipSimplifiedLayerNormalization"):
        attribute_of(node, "epsilon").f = 1e-3


def _logits_one_position_early(graph: GraphProto) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "later" if name == "logit_offsets" else name
    graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    graph.node.insert(0, helper.make_node("Add", ["logit_offsets", "one"], ["later"], name="later"))


def _residual_added_twice(graph: GraphProto) -> None:
    """Before the last norm, in the place of what the last layer's feed-forward gives."""
    node = nodes_of(graph, "SkipSimplifiedLayerNormalization")[-1]
    node.input[1] = node.input[0]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(_scale_off_by_a_thousandth, id="scale off by a thousandth"),
        pytest.param(_scale_of_another_width, id="scale 1/E"),
        pytest.param(_no_rotary, id="no rotary embedding"),
        pytest.param(_rotary_pairs_interleaved, id="rotary pairs interleaved"),
        pytest.param(_short_window, id="attention to the last few only"),
        pytest.param(_another_norm_eps, id="another norm_eps"),
        pytest.param(_logits_one_position_early, id="logits one position early"),
        pytest.param(_residual_added_twice, id="a residual added twice"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_fault_of_the_graph_fails_the_logit_gate(
    fault, precision, small_decoder, small_checkpoint, small_int4, gentle_checkpoint, tmp_path
):
    bundle, checkpoint = {
        "fp32": (small_decoder, small_checkpoint),
        "int4": (small_int4, gentle_checkpoint),
    }[precision]
    report = verify_bundle(with_graph_fault(bundle, tmp_path, fault), checkpoint)
    assert all(stored.passed for stored in report.stored), "the fault is in the graph, the weights are still equal"
    assert _failed(report, Arithmetic.FLOAT32)
    assert not report.passed


def _caches_of_two_layers_swapped(graph: GraphProto) -> None:
    first, second = nodes_of(graph, "GroupQueryAttention")
    first.output[1], second.output[1] = second.output[1], first.output[1]


def _keys_and_values_swapped(graph: GraphProto) -> None:
    for node in nodes_of(graph, "GroupQueryAttention"):
        node.output[1], node.output[2] = node.output[2], node.output[1]


def _cache_not_read(graph: GraphProto) -> None:
    """Each call begins with zeros in the past's place."""
    graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    for i, node in enumerate(nodes_of(graph, "GroupQueryAttention")):
        empty = helper.make_node("Mul", [node.input[3], "nothing"], [f"empty{i}"], name=f"empty{i}")
        node.input[3] = empty.output[0]
        graph.node.insert(0, empty)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(_caches_of_two_layers_swapped, id="caches of two layers swapped"),
        pytest.param(_keys_and_values_swapped, id="keys and values swapped"),
        pytest.param(_cache_not_read, id="keys forgotten"),
    ],
)
def test_a_fault_of_the_cache_fails_where_tokens_come_in_pieces(fault, small_decoder, small_checkpoint, tmp_path):
    """And nowhere else: a prefill does not read what was there before."""
    report = verify_bundle(with_graph_fault(small_decoder, tmp_path, fault), small_checkpoint)
    failed = _failed(report, Arithmetic.FLOAT32)
    assert len(failed) == 5
    assert all(any(word in name for word in ("decode", "chunks", "unequal", "one by one")) for name in failed)
    assert not report.passed


def test_a_fault_of_single_tokens_near_the_maximum_fails(
    small_decoder, small_checkpoint, monkeypatch: pytest.MonkeyPatch
):
    """Where a kernel has another way for long rows: here the newest token is not attended to from position 60 on."""
    step = Stepper.step

    def faulty(self, tokens, lengths):
        return step(self, tokens, lengths - (lengths > 60) if isinstance(lengths, int) else lengths)

    monkeypatch.setattr(Stepper, "step", faulty)
    report = verify_bundle(small_decoder.path, small_checkpoint)
    assert _failed(report, Arithmetic.FLOAT32) == ["1 x 64 tokens, the last 4 one by one"]
    assert not report.passed


def _lengths_of_rows_ignored(graph: GraphProto) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "all ones" if name == "attention_mask" else name
    graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    graph.node.insert(0, helper.make_node("Max", ["attention_mask", "one"], ["all ones"], name="all ones"))


def test_a_fault_of_the_padding_fails(small_decoder, small_checkpoint, tmp_path):
    folder = with_graph_fault(small_decoder, tmp_path, _lengths_of_rows_ignored)
    assert not verify_bundle(folder, small_checkpoint).passed


# Faults of the stored tensors

QKV, W2 = "layers.0.attention.qkv_proj.weight.transposed", "layers.1.feed_forward.w2.weight.transposed"


def _negated(table: np.ndarray) -> None:
    table *= -1


def _one_position_late(table: np.ndarray) -> None:
    table[1:] = table[:-1].copy()


def _one_weight(matrix: np.ndarray) -> None:
    matrix[3, 5] += 0.05


def _one_ulp(matrix: np.ndarray) -> None:
    matrix[0, 0] = np.nextafter(matrix[0, 0], np.float32(np.inf))


def _heads_swapped(*groups: int) -> TensorFault:
    """The two key/value heads in the other order; `groups` counts in heads, from the first query head on."""

    def swap(matrix: np.ndarray) -> None:
        for first in groups:
            heads = matrix[:, 16 * first : 16 * (first + 2)]
            heads[:] = np.roll(heads, 16, axis=1)

    return swap


def _query_heads_tiled(matrix: np.ndarray) -> None:
    """Six query heads in the order of `repeat`, though the graph reads them in groups of three."""
    heads = matrix[:, :96].reshape(-1, 6, 16)
    heads[:] = heads[:, [0, 3, 1, 4, 2, 5]].copy()


@pytest.mark.parametrize(
    ("tensor", "perturb", "logits_show_it"),
    [
        pytest.param("rope.sin", _negated, True, id="rotated backwards"),
        pytest.param("rope.cos", _one_position_late, True, id="cosines one position late"),
        pytest.param(QKV, _heads_swapped(6, 8), True, id="kv heads swapped"),
        pytest.param(QKV, _heads_swapped(8), True, id="value heads swapped"),
        pytest.param(QKV, _query_heads_tiled, True, id="query heads tiled"),
        pytest.param(W2, _one_weight, True, id="one weight"),
        pytest.param("tok_embeddings.weight", _one_weight, True, id="one weight of the tied embedding"),
        pytest.param(QKV, _one_ulp, False, id="one weight by one rounding"),
    ],
)
def test_a_fault_of_the_weights_fails(tensor, perturb, logits_show_it, small_decoder, small_checkpoint, tmp_path):
    report = verify_bundle(with_tensor_fault(small_decoder, tmp_path, tensor, perturb), small_checkpoint)
    assert not report.passed
    assert [problem.split()[0] for problem in report.stored_problems] == [tensor]
    assert bool(_failed(report, Arithmetic.FLOAT32)) == logits_show_it


def _one_scale(scales: np.ndarray) -> None:
    scales[3, 1] *= 1.05


def _one_nibble_order(blocks: np.ndarray) -> None:
    blocks[3, 1] = blocks[3, 1] >> 4 | blocks[3, 1] << 4


def _one_zero_point(zeros: np.ndarray) -> None:
    zeros[3, 0] ^= 1


def _one_level(blocks: np.ndarray) -> None:
    blocks[3, 1, 4] ^= 1


@pytest.mark.parametrize(
    ("tensor", "perturb"),
    [
        pytest.param("layers.1.feed_forward.w2.weight.scales", _one_scale, id="one scale by 5 %"),
        pytest.param("layers.0.attention.qkv_proj.weight.scales", _one_scale, id="one scale of the queries by 5 %"),
        pytest.param("layers.0.feed_forward.w1_w3.weight.blocks", _one_nibble_order, id="one block's nibbles swapped"),
        pytest.param("layers.1.attention.o_proj.weight.zero_points", _one_zero_point, id="one zero point"),
        pytest.param("layers.1.feed_forward.w2.weight.blocks", _one_level, id="one level"),
        pytest.param("tok_embeddings.weight.scales", _one_scale, id="one scale of the embedding by 5 %"),
    ],
)
def test_a_fault_of_the_quantised_weights_fails(tensor, perturb, small_int4, gentle_checkpoint, tmp_path):
    """The float32 gate finds it, on the same bytes: the gate of rounded activations may be too wide to."""
    report = verify_bundle(with_tensor_fault(small_int4, tmp_path, tensor, perturb), gentle_checkpoint)
    assert not report.passed
    assert {problem.split()[0] for problem in report.stored_problems} == {tensor}
    assert _failed(report, Arithmetic.FLOAT32)


def test_rounded_activations_are_judged_by_their_own_gate(small_int4, gentle_checkpoint, tmp_path):
    """A graph that is far off fails both gates, so the wide one is not for show."""
    report = verify_bundle(with_graph_fault(small_int4, tmp_path, _scale_of_another_width), gentle_checkpoint)
    assert _failed(report, Arithmetic.INT8_ACTIVATIONS)


def _failed(report: ParityReport, arithmetic: Arithmetic) -> list[str]:
    return [case.name for case in report.cases if case.arithmetic is arithmetic and case.verdict is Verdict.FAIL]
