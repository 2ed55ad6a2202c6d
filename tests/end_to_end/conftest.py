"""A small random model, exported once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.loading import random_checkpoint
from cosmos_export.onnx.quantize import Quantization
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe

from .head_bundles import exported_once, heads_checkpoint, heads_config


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On models this small, threads only wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosmos_runtime.session.thread_count", lambda threads: threads or 1)
        yield


@pytest.fixture(scope="session")
def small_config() -> CosmosAdvancedConfig:
    """Grouped heads (6 over 2) and a head_dim that is not dim / n_heads; positions enough for rotary faults to show."""
    return CosmosAdvancedConfig(
        dim=48, n_layers=2, head_dim=16, hidden_dim=96, n_heads=6, n_kv_heads=2, vocab_size=160, max_sequence_length=64
    )


@pytest.fixture(scope="session")
def small_checkpoint(small_config: CosmosAdvancedConfig) -> Checkpoint:
    """Random weights, ten times the usual size: a model whose attention is not uniform, as a trained one's is not."""
    checkpoint = random_checkpoint(small_config, name="small", seed=3)
    tensors = {n: checkpoint.tensor(n) * (10 if checkpoint.tensor(n).dim() > 1 else 1) for n in checkpoint.names}
    return Checkpoint.from_tensors(small_config, tensors, {"kind": "preset", "location": "small"})


@pytest.fixture(scope="session")
def recipe() -> ExportRecipe:
    return ExportRecipe.load("fp32")


@pytest.fixture(scope="session")
def small_bundle(
    small_checkpoint: Checkpoint, recipe: ExportRecipe, tmp_path_factory: pytest.TempPathFactory
) -> ExportedBundle:
    out: Path = tmp_path_factory.mktemp("bundles") / "small"
    return export_bundle(small_checkpoint, out, recipe)


@pytest.fixture(scope="session")
def small_decoder(small_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ExportedBundle:
    """The same model with a key/value cache, in float32."""
    out = tmp_path_factory.mktemp("bundles") / "decoder"
    return export_bundle(small_checkpoint, out, ExportRecipe.load("cpu-fp32"))


@pytest.fixture(scope="session")
def lively_checkpoint() -> Checkpoint:
    """A small model with all capability heads, whose scores spread; see `head_bundles`."""
    return heads_checkpoint(heads_config())


@pytest.fixture(scope="session")
def lively_bundle(
    lively_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ExportedBundle]:
    """Its bundle by a recipe, exported when it is first asked for and not proven; shared, so read only."""
    return exported_once(lively_checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def gentle_checkpoint(small_config: CosmosAdvancedConfig) -> Checkpoint:
    """Wide enough for blocks of 32, and weights of a size with which rounded activations stay near exact ones."""
    config = replace(small_config, dim=64, hidden_dim=80)
    checkpoint = random_checkpoint(config, name="gentle", seed=3)
    tensors = {n: checkpoint.tensor(n) * (3 if checkpoint.tensor(n).dim() > 1 else 1) for n in checkpoint.names}
    return Checkpoint.from_tensors(config, tensors, {"kind": "preset", "location": "gentle"})


@pytest.fixture(scope="session")
def small_int4(gentle_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ExportedBundle:
    """Every part that a quantised matrix can have: blocks, scales and zero points."""
    out = tmp_path_factory.mktemp("bundles") / "int4"
    form = Quantization(bits=4, block_size=32, symmetric=False, accuracy_level=4)
    return export_bundle(gentle_checkpoint, out, replace(ExportRecipe.load("cpu-int4"), quantization=form))
