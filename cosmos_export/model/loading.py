"""Models from checkpoints: built without memory, then given the checkpoint's tensors."""

from __future__ import annotations

import torch

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.decoder import CosmosDecoder
from cosmos_export.resources import preset_path


def skeleton(config: CosmosAdvancedConfig, *, causal: bool = True) -> CosmosDecoder:
    """A decoder of shapes only (meta device), in evaluation mode: what a trace needs, whatever the model's size."""
    with torch.device("meta"):
        return CosmosDecoder(config, causal=causal).eval()


def parameter_count(config: CosmosAdvancedConfig) -> int:
    """Parameters of the plain decoder, the tied embedding counted once."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def load_decoder(checkpoint: Checkpoint, *, causal: bool = True, dtype: torch.dtype = torch.float32) -> CosmosDecoder:
    """The eager decoder of a checkpoint, in evaluation mode and of `dtype`; float32 tensors are mapped, not copied.

    Raises CheckpointError that lists tensors which are missing or do not fit the configuration.
    """
    model = skeleton(checkpoint.config, causal=causal)
    checkpoint.require({name: tuple(p.shape) for name, p in model.state_dict().items()})
    state = {name: checkpoint.tensor(name).to(dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    model.rope.rebuild(torch.device("cpu"), torch.float64 if dtype == torch.float64 else torch.float32)
    return model.requires_grad_(False)


def random_checkpoint(config: CosmosAdvancedConfig, *, name: str, seed: int = 0) -> Checkpoint:
    """A checkpoint of random weights, the same for the same configuration and seed: what a preset exports."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CosmosDecoder(config)
    origin = {"kind": "preset", "location": name, "seed": seed, "head_layout": "interleave"}
    return Checkpoint.from_tensors(config, model.state_dict(), origin)


def preset_checkpoint(name: str, seed: int = 0) -> Checkpoint:
    """`random_checkpoint` of a model preset. Raises ConfigError for a name that there is not."""
    return random_checkpoint(CosmosAdvancedConfig.from_file(preset_path(name)), name=name, seed=seed)
