"""Models from checkpoints: built without memory, then given the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.model.capabilities.stored_names import ignored_prefixes
from cosmos_export.model.cosmos import CosmosAdvancedModel
from cosmos_export.model.decoder import CosmosDecoder
from cosmos_export.model.random_weights import random_weights
from cosmos_export.resources import preset_path
from cosmos_runtime import CAPABILITIES

Model = TypeVar("Model", bound=CosmosBackbone)


def skeleton(config: CosmosAdvancedConfig, *, causal: bool = True) -> CosmosDecoder:
    """A decoder of shapes only (meta device), in evaluation mode: what a trace needs, whatever the model's size."""
    with torch.device("meta"):
        return CosmosDecoder(config, causal=causal).eval()


def model_skeleton(
    config: CosmosAdvancedConfig, *, causal: bool = True, capabilities: Iterable[str] = CAPABILITIES
) -> CosmosAdvancedModel:
    """The model with these capabilities, of shapes only (meta device), frozen and in evaluation mode."""
    with torch.device("meta"):
        return CosmosAdvancedModel(config, causal=causal, capabilities=capabilities).eval().freeze()


def parameter_count(config: CosmosAdvancedConfig, capabilities: Iterable[str] | None = None) -> int:
    """Parameters of the plain decoder, or of the model with these heads; the tied embedding is counted once."""
    model = skeleton(config) if capabilities is None else model_skeleton(config, capabilities=capabilities)
    return sum(parameter.numel() for parameter in model.parameters())


def load_decoder(checkpoint: Checkpoint, *, causal: bool = True, dtype: torch.dtype = torch.float32) -> CosmosDecoder:
    """The eager decoder of a checkpoint, in evaluation mode and of `dtype`; float32 tensors are mapped, not copied.

    Raises CheckpointError that lists tensors which are missing or do not fit the configuration.
    """
    return _with_weights(skeleton(checkpoint.config, causal=causal), checkpoint, dtype)


def load_model(
    checkpoint: Checkpoint,
    *,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
    capabilities: Iterable[str] = CAPABILITIES,
) -> CosmosAdvancedModel:
    """The eager model of a checkpoint with these capabilities, frozen, in evaluation mode and of `dtype`.

    Weights that no forward pass reads, and those of capabilities that are not asked for, are never read.
    Raises CheckpointError that lists tensors which are missing, do not fit the configuration, or are unknown.
    """
    model = model_skeleton(checkpoint.config, causal=causal, capabilities=capabilities)
    checkpoint.refuse_unknown(model.state_dict(), ignored_prefixes(model.capabilities))
    return _with_weights(model, checkpoint, dtype)


def _with_weights(model: Model, checkpoint: Checkpoint, dtype: torch.dtype) -> Model:
    """The skeleton with the checkpoint's tensors in it."""
    checkpoint.require({name: tuple(p.shape) for name, p in model.state_dict().items()})
    state = {name: checkpoint.tensor(name).to(dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    model.rope.rebuild(torch.device("cpu"), torch.float64 if dtype == torch.float64 else torch.float32)
    return model.requires_grad_(False)


def random_checkpoint(
    config: CosmosAdvancedConfig, *, name: str, seed: int = 0, capabilities: Iterable[str] | None = None
) -> Checkpoint:
    """A checkpoint of random weights, the same for the same configuration and seed: what a preset exports.

    It is a plain decoder's, or with `capabilities` a model's that has these; the backbone is the same in both, and each
    of its tensors is drawn anew whenever it is read.
    """
    origin = {"kind": "preset", "location": name, "seed": seed, "head_layout": "interleave"}
    return Checkpoint(config.validate(), random_weights(config, seed, capabilities), origin)


def preset_checkpoint(name: str, seed: int = 0, capabilities: Iterable[str] | None = None) -> Checkpoint:
    """`random_checkpoint` of a model preset. Raises ConfigError for a name that there is not."""
    config = CosmosAdvancedConfig.from_file(preset_path(name))
    return random_checkpoint(config, name=name, seed=seed, capabilities=capabilities)
