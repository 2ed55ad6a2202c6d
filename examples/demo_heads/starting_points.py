"""Weights to start from, with which a head gives back its input: x = relu(x) - relu(-x).

Training then only has to find what to do better, and nothing reads worse on the way.
"""

from __future__ import annotations

import torch
from torch import nn

from cosmos_export.model.capabilities.fusion import SLOTS, CapabilityFusion

QUIET = 0.1  # of the usual size: random weights beside those that are set


@torch.no_grad()
def as_identity(network: nn.Linear | nn.Sequential) -> None:
    """A linear layer, or a perceptron at least 2D wide inside, gives back the first D of its inputs."""
    layers = [network] if isinstance(network, nn.Linear) else [network[0], network[-1]]
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    dim = layers[-1].out_features
    if isinstance(network, nn.Linear):
        nn.init.eye_(network.weight)
        return
    pair = torch.cat((torch.eye(dim), -torch.eye(dim)))  # (2D, D)
    layers[0].weight[: 2 * dim, :dim] = pair
    layers[1].weight[:, : 2 * dim] = pair.T


@torch.no_grad()
def as_plain_decoder(fusion: CapabilityFusion, size: float) -> None:
    """The fusion gives back about the representation, whatever the other slots hold.

    The LayerNorm inside divides by the size of the representation, its root mean square; `size` multiplies by it
    again. The backbone's final norm makes it nearly the same everywhere.
    """
    first, last = fusion[0], fusion[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    dim = last.out_features
    pair = torch.cat((torch.eye(dim), -torch.eye(dim)))
    first.weight *= QUIET * SLOTS
    first.weight[:, :dim] = pair
    last.weight.mul_(QUIET).add_(size * pair.T)
    nn.init.zeros_(last.bias)
