"""Slices: small models out of a graph, which run alone and chained give what the whole gives."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ExportError
from cosmos_export.model.loading import random_checkpoint
from cosmos_export.onnx.slices import SlicedGraph, stored_array
from cosmos_export.parity.layer_cases import in_pieces, unequal_rows, whole_rows
from cosmos_export.parity.slice_runs import CaseRunner, open_slice
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import Bundle, choose_graph

LAYERS = 3
RECIPES = ["fp32", "portable-fp32", "cpu-fp32", "cpu-fp16", "cpu-int4-quick", "cuda-int4"]


@pytest.fixture(scope="module")
def config() -> CosmosAdvancedConfig:
    return CosmosAdvancedConfig(
        dim=64,
        n_layers=LAYERS,
        head_dim=16,
        hidden_dim=96,
        n_heads=6,
        n_kv_heads=2,
        vocab_size=96,
        max_sequence_length=40,
    )


@pytest.fixture(scope="module")
def checkpoint(config: CosmosAdvancedConfig) -> Checkpoint:
    return random_checkpoint(config, name="sliced", seed=5)


@pytest.fixture(scope="module", params=RECIPES)
def bundle(request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("slices") / request.param
    return Bundle.open(_export(checkpoint, out, request.param).path)


def _export(checkpoint: Checkpoint, out: Path, recipe: str) -> ExportedBundle:
    return export_bundle(checkpoint, out, ExportRecipe.load(recipe), effort=Effort.OFF)


def _sliced(bundle: Bundle) -> SlicedGraph:
    _, spec = choose_graph(bundle.manifest)
    return SlicedGraph.open(bundle.file(spec.file), spec)


@pytest.fixture
def graph(bundle: Bundle) -> SlicedGraph:
    return _sliced(bundle)


def test_layers_have_their_own_weights_and_no_other(graph):
    for layer in range(LAYERS):
        steps = graph.steps(layer)
        model = graph.cut([graph.hidden[layer]], [graph.hidden[layer + 1], *graph.cache_outputs(layer)])
        weights = {name for name in graph.sources(model) if name.startswith("layers.") and name.endswith(".weight")}
        # A sum is an output of the operator that also norms it, so a slice may end with the next layer's vector.
        own = {name for name in weights if not name.endswith("norm1.weight") or f"layers.{layer}." in name}
        assert own == {name for name in own if name.startswith(f"layers.{layer}.")}
        assert len(own) == 9
        assert weights - own <= {f"layers.{layer + 1}.norm1.weight"}
        assert (steps.hidden, steps.output) == (graph.hidden[layer], graph.hidden[layer + 1])
        assert steps.middle not in (steps.hidden, steps.output)


def test_no_weight_is_copied(graph, bundle):
    for layer in range(LAYERS):
        model = graph.cut([graph.hidden[layer]], [graph.hidden[layer + 1]])
        assert model.ByteSize() < graph.model.ByteSize()
        large = [i for i in model.graph.initializer if np.prod(i.dims) * 4 > 4096]
        assert large
        assert all(i.external_data and not i.raw_data for i in large)
    assert not (bundle.path / "slice").exists()


def test_chained_slices_give_the_whole_graphs_logits_and_caches(graph, bundle, config):
    _, spec = choose_graph(bundle.manifest)
    runner = CaseRunner(spec, config)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (1, 12))
    cases = [whole_rows("1 x 12 whole", ids)]
    if runner.cached:
        cases += [in_pieces("1 x 12 pieces", ids, [5, 1, 4, 1, 1]), in_pieces("1 x 12 late", ids, [6, 6], past=28)]
        cases += [unequal_rows("3 x 12 unequal", np.concatenate([ids] * 3), (2, 9, 5))]
    whole = open_slice(graph.with_outputs(graph.hidden), graph.folder, threads=1)
    for case in cases:
        taps = runner.run(whole, case, {}, range(LAYERS))
        chained = _chained(graph, runner, case)
        for name, expected in taps.items():
            found = chained[name]
            if name.startswith("present."):
                found, expected = _of_the_rows(found, case), _of_the_rows(expected, case)
            tolerance = 5e-3 if "float16" in str(bundle.manifest.recipe) or "fp16" in bundle.manifest.name else 2e-5
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * (1 + np.abs(expected).max()))


def _of_the_rows(cache, case):
    """What lies beyond a row's end is what its padding left there, and nobody reads it."""
    ends = case.past + case.computed.sum(1)
    return np.concatenate([cache[row, :, :end] for row, end in enumerate(ends)], axis=1)


def _chained(graph, runner, case):
    found = runner.run(open_slice(graph.cut([], [graph.hidden[0]]), graph.folder, threads=1), case, {})
    for layer, (before, after) in enumerate(zip(graph.hidden, graph.hidden[1:], strict=False)):
        session = open_slice(graph.cut([before], [after, *graph.cache_outputs(layer)]), graph.folder, threads=1)
        found |= runner.run(session, case, {before: found[before]}, [layer])
    tail = open_slice(graph.cut([graph.hidden[-1]], graph.results), graph.folder, threads=1)
    return found | runner.run(tail, case, {graph.hidden[-1]: found[graph.hidden[-1]]})


def test_every_step_of_a_layer_runs_alone(graph, bundle, config):
    """From the values before it, each step gives what the layer gives there."""
    _, spec = choose_graph(bundle.manifest)
    runner, steps = CaseRunner(spec, config), graph.steps(1)
    case = whole_rows("2 x 5 tokens", np.random.default_rng(3).integers(0, config.vocab_size, (2, 5)))
    hidden = np.random.default_rng(4).standard_normal((2, 5, config.dim)).astype(np.float16).astype(np.float32)
    between = [
        steps.normed, steps.query, steps.key, steps.value, steps.attended, steps.middle,
        steps.normed_middle, steps.gate, steps.up, steps.activated, steps.output,
    ]  # fmt: skip
    whole = open_slice(graph.cut([steps.hidden], list(dict.fromkeys(between))), graph.folder, threads=1)
    values = {steps.hidden: hidden} | runner.run(whole, case, {steps.hidden: hidden}, [1])
    for given, wanted in (
        ([steps.hidden], [steps.normed]),
        ([steps.normed], [steps.query, steps.key, steps.value]),
        ([steps.query, steps.key, steps.value], [steps.attended]),
        ([steps.hidden, steps.attended], [steps.middle]),
        ([steps.middle], [steps.normed_middle]),
        ([steps.normed_middle], [steps.gate, steps.up]),
        ([steps.gate, steps.up], [steps.activated]),
        ([steps.middle, steps.activated], [steps.output]),
    ):
        model = graph.cut(given, list(dict.fromkeys(wanted)))
        inputs = {i.name for i in model.graph.input}
        assert inputs.issuperset(given)
        found = runner.run(open_slice(model, graph.folder, threads=1), case, values, [1])
        for name in wanted:
            assert np.abs(found[name] - values[name]).max() <= 4e-3 * np.abs(values[name]).max(), name


def test_stored_arrays_are_what_a_mapped_file_has(graph, bundle):
    whole = onnx.load(bundle.path / "model.onnx")
    for tensor in whole.graph.initializer:
        stored = stored_array(graph.initializers[tensor.name], graph.folder)
        assert stored.tobytes() == onnx.numpy_helper.to_array(tensor).tobytes(), tensor.name


def test_a_file_that_ends_too_early_is_an_error(checkpoint, tmp_path):
    bundle = Bundle.open(_export(checkpoint, tmp_path / "out", "cpu-fp32").path)
    data = bundle.path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4096])
    graph = _sliced(bundle)
    with pytest.raises(ExportError, match="ends before"):
        for tensor in graph.initializers.values():
            stored_array(tensor, graph.folder)


def test_node_names_do_not_matter(checkpoint, tmp_path):
    """Only what a value depends on does: another exporter's names, or none, are as good."""
    bundle = Bundle.open(_export(checkpoint, tmp_path / "out", "cpu-fp32").path)
    expected = _sliced(bundle)
    _, spec = choose_graph(bundle.manifest)
    model = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    for at, node in enumerate(model.graph.node):
        node.name = f"n{at}"
    assert SlicedGraph(model, bundle.path, spec).hidden == expected.hidden


def test_a_graph_whose_layers_cannot_be_told_apart(checkpoint, tmp_path):
    bundle = Bundle.open(_export(checkpoint, tmp_path / "out", "cpu-fp32").path)
    model = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    renamed = {i.name: f"w{at}" for at, i in enumerate(model.graph.initializer) if i.name.startswith("layers.")}
    for initializer in model.graph.initializer:
        initializer.name = renamed.get(initializer.name, initializer.name)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    _, spec = choose_graph(bundle.manifest)
    with pytest.raises(ExportError, match="export it again"):
        _ = SlicedGraph(model, bundle.path, spec).hidden


def test_a_model_of_one_layer_can_be_cut(config, tmp_path):
    for recipe in ("fp32", "cpu-fp32"):
        checkpoint = random_checkpoint(replace(config, n_layers=1), name="one", seed=1)
        graph = _sliced(Bundle.open(_export(checkpoint, tmp_path / recipe, recipe).path))
        assert len(set(graph.hidden)) == 2
        shutil.rmtree(tmp_path / recipe)
