"""Which of its tensors a model with capability heads reads in a forward pass, observed while it makes one.

A checkpoint has weights for every mode of reasoning and every check; the configuration decides which are computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.cosmos import CosmosAdvancedModel
from cosmos_export.model.loading import model_skeleton
from cosmos_runtime import CAPABILITIES


class _Watch(TorchFunctionMode):
    """Notes which tensors functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def tensors_read(config: CosmosAdvancedConfig, capabilities: Sequence[str]) -> set[str]:
    """Names of the parameters and derived tables that a model of this configuration computes with."""
    model = model_skeleton(config, capabilities=capabilities)
    named = dict(_tensors(model))
    ids = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    with torch.no_grad(), _Watch() as watch:
        model(ids, **{f"use_{name}": name in model.capabilities for name in CAPABILITIES})
    return {name for name, tensor in named.items() if id(tensor) in watch.seen}


def _tensors(model: CosmosAdvancedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if not name.startswith("rope."))
