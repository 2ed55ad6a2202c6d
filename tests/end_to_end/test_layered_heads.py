"""Capability heads layer by layer: each fault fails the piece that it is in, and no head is held with another."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.cli import main
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities import MemoryState
from cosmos_export.model.loading import load_model, parameter_count
from cosmos_export.onnx.head_slices import (
    CALLS_BEFORE,
    KEYS,
    KEYS_BEFORE,
    QUERY,
    REPRESENTATION,
    VALUES_BEFORE,
    VECTOR,
    head_pieces,
)
from cosmos_export.onnx.slices import SlicedGraph
from cosmos_export.onnx.weights import WeightReader
from cosmos_export.parity import layered_report
from cosmos_export.parity.layered_report import bytes_of_whole_model
from cosmos_export.parity.report import ParityReport
from cosmos_export.parity.streamed_heads import StreamedHeads
from cosmos_export.parity.streamed_model import StreamedWeights
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import ExportedBundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import CAPABILITIES, MANIFEST_NAME, choose_graph

from .head_bundles import export_heads, heads_checkpoint, heads_config, quantised
from .mutants import GraphFault, with_graph_fault, with_tensor_fault
from .test_heads_mutations import FAULTS, _every_piece_ends_a_call

BACKBONE = ["embedding", "layer 0", "layer 1", "final norm"]
MEMORIES = ["working memory", "semantic memory", "procedural memory", "memory fusion"]
PIECES = [*BACKBONE, "call", "reasoning", *MEMORIES, "safety", "capability fusion", "evaluation", "logits"]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return heads_checkpoint(heads_config())


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExportedBundle]:
    made: dict[str, ExportedBundle] = {}

    def export(recipe: str) -> ExportedBundle:
        if recipe not in made:
            chosen = quantised(4) if recipe == "int4" else ExportRecipe.load(recipe)
            made[recipe] = export_heads(checkpoint, tmp_path_factory.mktemp("layered") / "bundle", chosen)
        return made[recipe]

    return export


def by_layers(bundle: Path, checkpoint: Checkpoint, **options: object) -> ParityReport:
    return verify_bundle(bundle, checkpoint, effort=Effort.LAYERS, **options)  # type: ignore[arg-type]


def failed(report: ParityReport) -> set[str]:
    return {piece.name for piece in report.failed_pieces}


@pytest.mark.parametrize("recipe", ["cpu-fp32", "fp32", "cpu-fp16", "int4"])
def test_bundles_with_heads_pass(recipe, exported, checkpoint):
    report = by_layers(exported(recipe).path, checkpoint)
    assert report.passed, report.summary()
    assert list(dict.fromkeys(piece.name for piece in report.pieces)) == PIECES
    assert report.mode == "layer by layer"
    assert any("memory full" in case.name for case in report.cases)
    assert all(stored.passed for stored in report.stored)
    assert (report.quality is not None) == (recipe in {"cpu-fp16", "int4"})


def test_the_same_tensors_are_compared_as_with_the_whole_model(exported, checkpoint):
    path = exported("cpu-fp32").path
    assert by_layers(path, checkpoint).stored == verify_bundle(path, checkpoint, effort=Effort.QUICK).stored


def _config(change: Callable[[CosmosAdvancedConfig], None]) -> CosmosAdvancedConfig:
    config = heads_config()
    change(config)
    return config


def _reflexion(config: CosmosAdvancedConfig) -> None:
    config.reasoning.mode = "reflexion"


def _direct(config: CosmosAdvancedConfig) -> None:
    config.reasoning.mode = "direct"


def _no_bank(config: CosmosAdvancedConfig) -> None:
    config.memory.working_memory_size = 0


def _blocking(config: CosmosAdvancedConfig) -> None:
    config.safety.safety_level = "high"


def _uncorrected(config: CosmosAdvancedConfig) -> None:
    config.evaluation.self_correction = config.evaluation.quality_scoring = False


@pytest.mark.parametrize(
    ("change", "recipe", "without"),
    [
        pytest.param(_reflexion, "cpu-fp32", set(), id="a head that gives its input on"),
        pytest.param(_direct, "fp32", {"reasoning"}, id="a head that does nothing is no piece"),
        pytest.param(_no_bank, "cpu-fp32", set(), id="no working memory"),
        pytest.param(_blocking, "cpu-fp32", set(), id="rows that are blocked"),
        pytest.param(_uncorrected, "fp32", set(), id="no corrections"),
    ],
)
def test_heads_of_every_kind_pass(change, recipe, without, tmp_path):
    checkpoint = heads_checkpoint(_config(change))
    report = by_layers(export_heads(checkpoint, tmp_path / "out", recipe).path, checkpoint)
    assert report.passed, report.summary()
    assert set(PIECES) - {piece.name for piece in report.pieces} == without


@pytest.mark.parametrize("capabilities", [(), ("memory",), ("safety", "evaluation")])
def test_some_heads_pass_without_the_others(capabilities, tmp_path):
    checkpoint = heads_checkpoint(heads_config(), capabilities)
    bundle = export_heads(checkpoint, tmp_path / "out", "cpu-fp32", capabilities)
    report = by_layers(bundle.path, checkpoint)
    assert report.passed, report.summary()
    named = {piece.name for piece in report.pieces}
    assert {"safety", "evaluation"} & named == {"safety", "evaluation"} & set(capabilities)
    assert ("working memory" in named) == ("memory" in capabilities)


@pytest.mark.parametrize("recipe", ["cpu-fp32", "fp32", "int4"])
def test_every_value_of_a_graph_is_in_a_piece(recipe, exported):
    bundle = exported(recipe)
    _, spec = choose_graph(bundle.manifest)
    graph = SlicedGraph.open(bundle.path / spec.file, spec)
    hidden = graph.hidden
    cuts = [([], [hidden[0]]), ([hidden[-1]], [graph.normed])]
    cuts += [([hidden[i]], [hidden[i + 1], *graph.cache_outputs(i)]) for i in range(len(hidden) - 1)]
    heads = [(list(p.takes.values()), list(p.gives.values())) for p in head_pieces(graph, CAPABILITIES)]
    assert graph.unsliced([*cuts, *heads]) == []
    assert graph.unsliced([*cuts, *heads[:-1]]), "what is left out is named"


# The reference


def test_the_streamed_heads_are_the_eager_heads(checkpoint):
    """In float64, one piece after another: as if the model had been there whole."""
    config, rows = checkpoint.config, 9
    model = load_model(checkpoint, dtype=torch.float64)
    reader = WeightReader(checkpoint, ExportRecipe.load("cpu-fp32"))
    for name, table in model.named_buffers():
        if "concept" in name:  # which the bundle has in float32
            table.data = reader.effective(name).double()
    torch.manual_seed(0)
    x, query, values = (torch.randn(rows, *shape, config.dim, dtype=torch.float64) for shape in ((), (), (7,)))
    keys = torch.nn.functional.normalize(torch.randn_like(values), dim=-1)
    state = MemoryState(keys, values, torch.arange(rows))
    with torch.inference_mode():
        expected = model.enhance(x, query, memory=state)
    weights = StreamedWeights(checkpoint, ExportRecipe.load("cpu-fp32"))
    heads = StreamedHeads(config, CAPABILITIES)
    found = {REPRESENTATION: x, QUERY: query, KEYS_BEFORE: keys, VALUES_BEFORE: values, CALLS_BEFORE: state.calls}
    for piece in [p for p in PIECES if p not in {*BACKBONE, "call", "logits"}]:
        names = heads.names_of(piece)
        found |= heads.run(piece, weights.computed(names, weights.quantised(names)), found, torch.float64)
    torch.testing.assert_close(found[VECTOR], expected.vector, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[KEYS], expected.memory.keys, rtol=1e-11, atol=1e-11)
    for name, score in expected.scores.items():
        torch.testing.assert_close(found[name], score, rtol=1e-11, atol=1e-11)


def test_one_head_is_in_memory_at_a_time(exported, checkpoint):
    """Tensors of a checkpoint are let go before those of the next head are read."""
    alive: dict[str, weakref.ref] = {}
    most: list[set[str]] = []

    def watched(name: str, read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def observe() -> torch.Tensor:
            gc.collect()
            most.append({_head_of(n) for n, tensor in alive.items() if tensor() is not None} - {""})
            tensor = read().clone()
            alive[name] = weakref.ref(tensor)
            return tensor

        return observe

    stored = {n: replace(t, read=watched(n, t.read)) for n, t in checkpoint.stored.items()}
    assert by_layers(exported("cpu-fp32").path, replace(checkpoint, stored=stored)).passed
    assert len({head for heads in most for head in heads}) > 5, "the watch saw all heads"
    assert max(len(heads) for heads in most) == 1


def _head_of(name: str) -> str:
    """The piece that a tensor is of; nothing for one of the backbone."""
    system, _, rest = name.partition(".")
    if system == "memory_system":
        return rest.partition(".")[0]
    return system if system.endswith(("_engine", "_system", "_fusion")) else ""


# Faults

# In which piece each fault of `test_heads_mutations` is.
FOUND_IN = {
    "two scores swapped": "safety",
    "a score of another round": "evaluation",
    "memory keys not updated": "working memory",
    "memory values not updated": "working memory",
    "memory keys and values swapped": "working memory",
    "memory has one slot": "working memory",
    "memory reads what is least alike": "working memory",
    "calls not counted": "working memory",
    "query not kept": "call",
    "query of the last run": "call",
    "threshold of harm": "safety",
    "threshold of bias": "safety",
    "threshold of attacks": "safety",
    "threshold of corrections": "evaluation",
    "vector of the heads everywhere": "logits",
    "every piece ends a call": "logits",
}


@pytest.mark.parametrize("recipe", ["cpu-fp32", "int4"])
@pytest.mark.parametrize("name", FOUND_IN)
def test_a_fault_of_the_graph_fails_its_piece_alone(name, recipe, exported, checkpoint, tmp_path):
    fault: GraphFault = _every_piece_ends_a_call if name == "every piece ends a call" else FAULTS[name]
    report = by_layers(with_graph_fault(exported(recipe), tmp_path, fault), checkpoint)
    assert all(stored.passed for stored in report.stored), "the fault is in the graph, the weights are still equal"
    assert failed(report) == {FOUND_IN[name]}
    assert f"{FOUND_IN[name]} alone is wrong" in report.summary()
    assert not report.passed


def test_every_fault_has_its_piece():
    assert FAULTS.keys() <= FOUND_IN.keys()


def _one_row(matrix: np.ndarray) -> None:
    matrix[1] *= 1.01


@pytest.mark.parametrize(
    ("tensor", "piece"),
    [
        ("reasoning_engine.cot.step_encoder.2.weight", "reasoning"),
        ("memory_system.working_memory.key_proj.weight", "working memory"),
        ("memory_system.semantic_memory.concept_keys.weight.transposed", "semantic memory"),
        ("memory_system.procedural_memory.skills_in.weight", "procedural memory"),
        ("memory_system.procedural_memory.skills_out.weight", "procedural memory"),
        ("memory_system.memory_fusion.3.weight", "memory fusion"),
        ("safety_system.toxicity_detector.toxicity_scorer.0.weight", "safety"),
        ("capability_fusion.4.weight", "capability fusion"),
        ("evaluation_system.quality_scorer.quality_dimensions.0.weight", "evaluation"),
    ],
)
def test_a_fault_of_the_weights_fails_its_piece(tensor, piece, exported, checkpoint, tmp_path):
    report = by_layers(with_tensor_fault(exported("cpu-fp32"), tmp_path, tensor, _one_row), checkpoint)
    assert [problem.split()[0] for problem in report.stored_problems] == [tensor]
    assert failed(report) == {piece}
    assert not report.passed


# When


def test_heads_count_where_a_model_does_not_fit(exported, checkpoint, monkeypatch):
    """As many weights as they are: the heads of this model are many times its backbone."""
    bundle = exported("cpu-fp32")
    needed = bytes_of_whole_model(checkpoint, bundle.manifest)
    assert needed > 12 * parameter_count(checkpoint.config, CAPABILITIES) > 100 * parameter_count(checkpoint.config)
    monkeypatch.setattr(layered_report, "available_memory", lambda: needed)
    assert verify_bundle(bundle.path, checkpoint, effort=Effort.QUICK).layer_by_layer
    monkeypatch.setattr(layered_report, "available_memory", lambda: 2 * needed)
    assert not verify_bundle(bundle.path, checkpoint, effort=Effort.QUICK).layer_by_layer


def test_the_command_exports_and_verifies_heads_by_layers(checkpoint, tmp_path):
    from cosmos_export.checkpoint import save_checkpoint

    folder, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    save_checkpoint(folder, checkpoint.config, tensors)
    options = ["--checkpoint", str(folder), "--capabilities", ",".join(CAPABILITIES), "--recipe", "cpu-fp32"]
    made = CliRunner().invoke(main, ["onnx", *options, "--out", str(bundle), "--verify", "layers"])
    assert made.exit_code == 0, made.output
    assert "each of 14 pieces alone" in made.output
    assert json.loads((bundle / MANIFEST_NAME).read_text())["parity"]["mode"] == "layer by layer"
    again = CliRunner().invoke(main, ["verify", str(bundle), "--layers", "--json", "-"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["mode"] == "layer by layer"
