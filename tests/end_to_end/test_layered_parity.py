"""Layer by layer the gates bite as well, and name the piece: a fault in one layer fails that layer and no other."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from onnx import GraphProto, helper

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.cli import main
from cosmos_export.errors import ParityError, ParityUnavailableError
from cosmos_export.model.loading import load_decoder
from cosmos_export.parity import layered_report
from cosmos_export.parity.gates import Arithmetic, Verdict
from cosmos_export.parity.layer_cases import build_layer_cases, in_pieces, unequal_rows
from cosmos_export.parity.report import ParityReport
from cosmos_export.parity.streamed_model import Lane, StreamedModel, StreamedWeights, product
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.progress import Silent
from cosmos_export.recipe import ExportRecipe

from .mutants import attribute_of, nodes_of, with_graph_fault, with_tensor_fault


def by_layers(bundle: object, checkpoint: Checkpoint, **options: object) -> ParityReport:
    return verify_bundle(bundle, checkpoint, effort=Effort.LAYERS, **options)  # type: ignore[arg-type]


def failed(report: ParityReport, arithmetic: Arithmetic = Arithmetic.FLOAT32) -> list[str]:
    return [piece.name for piece in report.failed_pieces if piece.arithmetic is arithmetic]


@pytest.fixture(scope="module")
def portable_decoder(small_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ExportedBundle:
    out = tmp_path_factory.mktemp("bundles") / "portable"
    return export_bundle(small_checkpoint, out, ExportRecipe.load("portable-fp32"), effort=Effort.OFF)


def test_bundles_of_every_kind_pass(
    small_bundle, small_decoder, small_int4, portable_decoder, small_checkpoint, gentle_checkpoint
):
    for bundle in (small_bundle, small_decoder, portable_decoder):
        report = by_layers(bundle.path, small_checkpoint)
        assert report.passed, report.summary()
        assert [piece.name for piece in report.pieces] == ["embedding", "layer 0", "layer 1", "logits"]
        assert report.stored == verify_bundle(bundle.path, small_checkpoint, effort=Effort.QUICK).stored
    report = by_layers(small_int4.path, gentle_checkpoint)
    assert report.passed, report.summary()
    assert {piece.arithmetic for piece in report.pieces} == {Arithmetic.FLOAT32, Arithmetic.INT8_ACTIVATIONS}
    assert report.quality is not None
    assert report.quality.passed is None  # random tokens are no text


def test_half_precision_passes(gentle_checkpoint, tmp_path):
    bundle = export_bundle(gentle_checkpoint, tmp_path / "out", ExportRecipe.load("cpu-fp16"), effort=Effort.LAYERS)
    assert bundle.report.passed
    assert {piece.arithmetic for piece in bundle.report.pieces} == {Arithmetic.FLOAT16}
    assert bundle.manifest.parity["mode"] == "layer by layer"


def test_the_report_says_how_it_compared(small_decoder, small_checkpoint):
    report = by_layers(small_decoder.path, small_checkpoint)
    document = report.to_dict()
    assert document["mode"] == "layer by layer"
    assert report.summary().startswith("layer by layer: each of 4 pieces alone")
    assert {"float32", "piece, float32"} <= document["gates"].keys()
    assert [piece["name"] for piece in document["pieces"]] == ["embedding", "layer 0", "layer 1", "logits"]
    assert verify_bundle(small_decoder.path, small_checkpoint, effort=Effort.QUICK).to_dict()["mode"] == "whole graph"


# The reference


def test_the_streamed_model_is_the_eager_model(small_checkpoint):
    """Every lane, in float64: as if the model had been there whole."""
    config, weights = small_checkpoint.config, StreamedWeights(small_checkpoint, ExportRecipe.load("fp32"))
    whole = load_decoder(small_checkpoint, dtype=torch.float64)
    cases = [case for case in build_layer_cases(config, cached=True)[0] if not case.past]
    model, quantised = StreamedModel(config), weights.quantised([])

    def read(prefix: str) -> dict:
        return weights.computed(weights.names_of(prefix), quantised)

    lanes = [Lane(case, model.embedded(case, read("tok_embeddings."))) for case in cases]
    for layer in range(config.n_layers):
        after = model.layer(layer, read(f"layers.{layer}."), lanes, torch.float64)
        lanes = [Lane(case, hidden) for case, hidden in zip(cases, after, strict=True)]
    found = model.logits(read("norm.") | read("tok_embeddings."), lanes, torch.float64)
    for case, logits in zip(cases, found, strict=True):
        expected = whole(torch.from_numpy(case.input_ids))
        torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)


def test_what_lies_before_a_case_is_attended_to(small_checkpoint):
    """A case at the end of a cache is not the same tokens at the beginning."""
    config, weights = small_checkpoint.config, StreamedWeights(small_checkpoint, ExportRecipe.load("fp32"))
    computed = weights.computed(weights.names_of("layers.0."), weights.quantised([]))
    model, ids = StreamedModel(config), np.array([[3, 5]])
    hidden = torch.ones(1, 2, config.dim)
    late, early = (Lane(in_pieces("1 x 2 x", ids, [2], past), hidden) for past in (40, 0))
    after = model.layer(0, computed, [late, early], torch.float64)
    assert not torch.allclose(after[0], after[1])


def test_only_what_pieces_reach_is_compared():
    case = unequal_rows("3 x 5 x", np.zeros((3, 5), int), (1, 4, 2))
    assert case.computed.sum(1).tolist() == [2, 5, 3]
    assert [piece.count for piece in case.pieces] == [4, 1]


def test_products_do_not_depend_on_how_a_matrix_is_cut(monkeypatch, gentle_checkpoint):
    weights = StreamedWeights(gentle_checkpoint, ExportRecipe.load("cpu-int4-quick"))
    name = "layers.0.feed_forward.w1.weight"
    whole = weights.computed([name], weights.quantised([name]))[name]
    x = torch.randn(3, 64, dtype=torch.float64)
    expected = product(x, whole)
    monkeypatch.setattr("cosmos_export.parity.streamed_model._AT_ONCE", 64 * 7)
    in_parts = weights.computed([name], weights.quantised([name]))[name]
    torch.testing.assert_close(product(x, in_parts), expected, rtol=0, atol=1e-14)


def test_one_layer_is_in_memory_at_a_time(small_decoder, small_checkpoint):
    """Tensors of a checkpoint are let go before those of the next layer are read."""
    alive: dict[str, weakref.ref] = {}
    most: list[set[str]] = []

    def watched(name: str, read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def observe() -> torch.Tensor:
            gc.collect()
            most.append({n.split(".")[1] for n, tensor in alive.items() if "layers." in n and tensor() is not None})
            tensor = read().clone()
            alive[name] = weakref.ref(tensor)
            return tensor

        return observe

    stored = {n: replace(t, read=watched(n, t.read)) for n, t in small_checkpoint.stored.items()}
    assert by_layers(small_decoder.path, replace(small_checkpoint, stored=stored)).passed
    assert {layer for layers in most for layer in layers} == {"0", "1"}, "the watch saw both layers"
    assert max(len(layers) for layers in most) == 1


# Faults


def _of(operator: str, at: int, change: Callable[[object], None]) -> Callable[[GraphProto], None]:
    return lambda graph: change(nodes_of(graph, operator)[at])


def _scale(node: object) -> None:
    attribute_of(node, "scale").f *= 1.001  # type: ignore[arg-type]


def _no_rotary(node: object) -> None:
    attribute_of(node, "do_rotary").i = 0  # type: ignore[arg-type]


def _interleaved(node: object) -> None:
    attribute_of(node, "rotary_interleaved").i = 1  # type: ignore[arg-type]


def _short_window(node: object) -> None:
    node.attribute.append(helper.make_attribute("local_window_size", 4))  # type: ignore[attr-defined]


def _epsilon(node: object) -> None:
    attribute_of(node, "epsilon").f = 1e-3  # type: ignore[arg-type]


def _residual_twice(node: object) -> None:
    node.input[1] = node.input[0]  # type: ignore[attr-defined]


_FAULTS = [
    pytest.param(_of("GroupQueryAttention", 1, _scale), "layer 1", id="scale off by a thousandth"),
    pytest.param(_of("GroupQueryAttention", 0, _no_rotary), "layer 0", id="no rotary embedding"),
    pytest.param(_of("GroupQueryAttention", 1, _interleaved), "layer 1", id="rotary pairs interleaved"),
    pytest.param(_of("GroupQueryAttention", 1, _short_window), "layer 1", id="attention to the last few only"),
    pytest.param(_of("SkipSimplifiedLayerNormalization", 0, _epsilon), "layer 0", id="another norm_eps"),
    pytest.param(_of("SkipSimplifiedLayerNormalization", 1, _epsilon), "layer 1", id="another norm_eps of layer 1"),
    pytest.param(_of("SkipSimplifiedLayerNormalization", -1, _epsilon), "logits", id="another eps of the last norm"),
    pytest.param(_of("SkipSimplifiedLayerNormalization", 0, _residual_twice), "layer 0", id="a residual added twice"),
]


@pytest.mark.parametrize(("fault", "piece"), _FAULTS)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_fault_of_the_graph_fails_its_piece_alone(
    fault, piece, precision, small_decoder, small_checkpoint, small_int4, gentle_checkpoint, tmp_path
):
    bundle, checkpoint = {"fp32": (small_decoder, small_checkpoint), "int4": (small_int4, gentle_checkpoint)}[precision]
    report = by_layers(with_graph_fault(bundle, tmp_path, fault), checkpoint)
    assert failed(report) == [piece]
    assert all(stored.passed for stored in report.stored)
    assert not report.passed
    assert report.count(Verdict.FAIL) > 0, "the chain shows it in the logits, too"
    assert f"{piece} alone is wrong" in report.summary()


def _keys_forgotten(graph: GraphProto) -> None:
    node = nodes_of(graph, "GroupQueryAttention")[1]
    nothing = helper.make_node("Sub", [node.input[3], node.input[3]], ["nothing"], name="nothing")
    node.input[3] = "nothing"
    graph.node.insert(0, nothing)


def _lengths_of_rows_ignored(graph: GraphProto) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "all ones" if name == "attention_mask" else name
    graph.node.insert(0, helper.make_node("Equal", ["attention_mask", "attention_mask"], ["same"], name="same"))
    graph.node.insert(1, helper.make_node("Cast", ["same"], ["all ones"], name="all ones", to=7))


def test_a_fault_of_the_cache_fails(small_decoder, small_checkpoint, tmp_path):
    report = by_layers(with_graph_fault(small_decoder, tmp_path, _keys_forgotten), small_checkpoint)
    assert failed(report) == ["layer 1"]
    wrong = {case.name for case in report.cases if case.verdict is Verdict.FAIL}
    assert wrong
    assert not any("tokens" in name or "extreme" in name for name in wrong), "a prefill does not read what was before"


def test_a_fault_of_the_padding_fails(small_decoder, small_checkpoint, tmp_path):
    report = by_layers(with_graph_fault(small_decoder, tmp_path, _lengths_of_rows_ignored), small_checkpoint)
    assert failed(report) == ["layer 0", "layer 1", "logits"]


def _one_weight(matrix: np.ndarray) -> None:
    matrix[3, 5] += 0.002


def _one_ulp(matrix: np.ndarray) -> None:
    matrix[0, 0] = np.nextafter(matrix[0, 0], np.float32(np.inf))


def _negated(table: np.ndarray) -> None:
    table *= -1


def _last_position(table: np.ndarray) -> None:
    table[-1] = table[-2]


@pytest.mark.parametrize(
    ("tensor", "perturb", "pieces"),
    [
        ("layers.1.feed_forward.w2.weight.transposed", _one_weight, ["layer 1"]),
        ("layers.0.attention.qkv_proj.weight.transposed", _one_weight, ["layer 0"]),
        ("layers.0.attention.qkv_proj.weight.transposed", _one_ulp, []),
        ("tok_embeddings.weight", _one_weight, ["logits"]),
        ("rope.sin", _negated, ["layer 0", "layer 1"]),
        ("rope.cos", _last_position, ["layer 0", "layer 1"]),
    ],
)
def test_a_fault_of_the_weights_fails(tensor, perturb, pieces, small_decoder, small_checkpoint, tmp_path):
    report = by_layers(with_tensor_fault(small_decoder, tmp_path, tensor, perturb), small_checkpoint)
    assert not report.passed
    assert [problem.split()[0] for problem in report.stored_problems] == [tensor]
    assert failed(report) == pieces


def test_nan_never_passes(small_decoder, small_checkpoint, tmp_path):
    def not_a_number(matrix: np.ndarray) -> None:
        matrix[1, 1] = np.nan

    name = "layers.0.feed_forward.w2.weight.transposed"
    report = by_layers(with_tensor_fault(small_decoder, tmp_path, name, not_a_number), small_checkpoint)
    assert failed(report) == ["layer 0"]
    assert report.to_dict()["pieces"][1]["error"] is None, "JSON has no infinity"


# When


class _Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_model_that_does_not_fit_is_compared_by_layers(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(layered_report, "available_memory", lambda: 1 << 18)
    notes = _Notes()
    recipe = ExportRecipe.load("cpu-fp32")
    bundle = export_bundle(small_checkpoint, tmp_path / "out", recipe, progress=notes)
    assert bundle.report.layer_by_layer
    assert any("compared layer by layer" in note for note in notes.notes)


def test_the_export_fails_where_a_layer_does(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("cosmos_export.onnx.fused_attention.FusedAttention.__init__", _with_another_scale)
    with pytest.raises(ParityError, match="layer 0 alone is wrong"):
        export_bundle(small_checkpoint, tmp_path / "out", ExportRecipe.load("cpu-fp32"), effort=Effort.LAYERS)
    assert not (tmp_path / "out").exists()


def _with_another_scale(self, config, rotary, last_index, total, cache):  # type: ignore[no-untyped-def]
    self.config = replace(config, head_dim=32)
    self.rotary, self.cache = rotary, list(cache)
    self.last_index, self.total = last_index, total


def test_a_pytorch_program_is_refused_with_what_to_do(small_checkpoint, tmp_path):
    recipe = ExportRecipe.load("torchscript-fp32")
    bundle = export_bundle(small_checkpoint, tmp_path / "out", recipe, effort=Effort.OFF)
    with pytest.raises(ParityUnavailableError, match="without --layers"):
        by_layers(bundle.path, small_checkpoint)


def test_the_command_takes_layers(small_checkpoint, tmp_path):
    bundle = tmp_path / "demo"
    made = CliRunner().invoke(main, ["onnx", "--out", str(bundle), "--recipe", "cpu-fp32", "--verify", "layers"])
    assert made.exit_code == 0, made.output
    assert "each of 8 pieces alone" in made.output
    again = CliRunner().invoke(main, ["verify", str(bundle), "--layers", "--json", "-"])
    assert again.exit_code == 0
    both = CliRunner().invoke(main, ["verify", str(bundle), "--layers", "--quick"])
    assert both.exit_code == 2
