"""Fixtures of the export package's tests: a tiny geometry, a random checkpoint of it, its traces, the oracle folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.loading import random_checkpoint, skeleton
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.onnx.trace import trace
from cosmos_runtime.manifest import FULL_SEQUENCE

# On tensors this small threads only wait for each other.
torch.set_num_threads(1)

# Reference material that is kept beside the repository, not in it.
SHARED = Path(__file__).resolve().parents[3] / "shared"

TINY = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "hidden_dim": 64,
    "vocab_size": 96,
    "max_sequence_length": 64,
}


@pytest.fixture(scope="session")
def make_config() -> Callable[..., CosmosAdvancedConfig]:
    """A new tiny configuration; keywords replace its settings."""

    def make(**changes: Any) -> CosmosAdvancedConfig:
        return CosmosAdvancedConfig(**{**TINY, **changes})

    return make


@pytest.fixture
def tiny_config(make_config: Callable[..., CosmosAdvancedConfig]) -> CosmosAdvancedConfig:
    return make_config()


@pytest.fixture(scope="session")
def tiny_checkpoint(make_config: Callable[..., CosmosAdvancedConfig]) -> Checkpoint:
    """Random weights of the tiny geometry; shared by all tests, so read only."""
    return random_checkpoint(make_config(), name="tiny")


@pytest.fixture(scope="session")
def wide_checkpoint(make_config: Callable[..., CosmosAdvancedConfig]) -> Checkpoint:
    """What quantising recipes can be made of: blocks fill dim, and not hidden_dim, whose last block is not full.

    Larger weights than usual, so that attention is not uniform and a fault shows.
    """
    checkpoint = random_checkpoint(make_config(dim=64, hidden_dim=80), name="wide")
    tensors = {n: checkpoint.tensor(n) * (5 if checkpoint.tensor(n).dim() > 1 else 1) for n in checkpoint.names}
    return Checkpoint.from_tensors(checkpoint.config, tensors, {"kind": "preset", "location": "wide"})


@pytest.fixture
def state(tiny_checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tiny checkpoint's tensors: the test's own copies."""
    return {name: tiny_checkpoint.tensor(name).clone() for name in tiny_checkpoint.names}


@pytest.fixture
def folder(tmp_path: Path, tiny_config: CosmosAdvancedConfig) -> Path:
    """A checkpoint folder of the tiny geometry that still lacks its weights."""
    place = tmp_path / "checkpoint"
    place.mkdir()
    tiny_config.save(place / "config.json")
    return place


@pytest.fixture(scope="session")
def _tiny_trace(make_config: Callable[..., CosmosAdvancedConfig]) -> ir.Model:
    return trace(skeleton(make_config()), FULL_SEQUENCE, graph_spec(FULL_SEQUENCE, make_config(), 20))


@pytest.fixture
def tiny_trace(_tiny_trace: ir.Model) -> ir.Model:
    """The tiny model's full-sequence graph at opset 20, before any pass: the test's own copy."""
    return _tiny_trace.clone()


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the reference material of ../shared is not here")
    return SHARED


@pytest.fixture(scope="session")
def oracle(shared: Path) -> Path:
    """A checkpoint folder with expected outputs in float64."""
    folder = shared / "oracle" / "tiny"
    if not folder.is_dir():
        pytest.skip("the oracle of ../shared/oracle/tiny is not here")
    return folder
