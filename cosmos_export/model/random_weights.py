"""Random weights that are drawn when they are read, tensor by tensor: a model of any size is there without being held.

A tensor's numbers follow from the seed, its name and its shape, and so do not depend on which others are drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.backbone import initial_deviation
from cosmos_export.model.capabilities.stored_names import is_of_heads
from cosmos_export.model.cosmos import CosmosAdvancedModel
from cosmos_export.model.decoder import CosmosDecoder
from cosmos_export.threads import map_in_threads
from cosmos_export.weight_files import StoredTensor

# Numbers of one generator. It is part of what a seed means: another size gives other numbers.
_BLOCK = 1 << 20


def random_weights(
    config: CosmosAdvancedConfig, seed: int, capabilities: Iterable[str] | None = None
) -> dict[str, StoredTensor]:
    """The weights of a plain decoder, none of them drawn yet; with `capabilities` those of a model's heads as well,
    which are drawn here."""
    with torch.device("meta"):
        state = CosmosDecoder(config).state_dict()
    stored = {
        name: StoredTensor(tuple(tensor.shape), torch.float32, partial(_drawn, config, seed, name, tuple(tensor.shape)))
        for name, tensor in state.items()
    }
    return stored if capabilities is None else stored | _heads(config, seed, capabilities)


def _drawn(config: CosmosAdvancedConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:  # the weight of a norm
        return torch.ones(shape)
    values = torch.empty(math.prod(shape))
    draw = partial(_fill, seed, name, initial_deviation(name, config))
    for _ in map_in_threads(lambda block: draw(*block), enumerate(values.split(_BLOCK))):
        pass
    return values.view(shape)


def _fill(seed: int, name: str, deviation: float, block: int, values: Tensor) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    values.normal_(0.0, deviation, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))


def _heads(config: CosmosAdvancedConfig, seed: int, capabilities: Iterable[str]) -> dict[str, StoredTensor]:
    """The weights of the heads, as their modules initialise them; the backbone made with them is as small as may be."""
    small = replace(config, n_layers=1, vocab_size=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = CosmosAdvancedModel(small, capabilities=capabilities).state_dict()
    heads = {name: tensor for name, tensor in state.items() if is_of_heads(name)}
    return dict(Checkpoint.from_tensors(config, heads, {}).stored)
