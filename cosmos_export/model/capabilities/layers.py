"""What the capability heads are made of: two-layer perceptrons and scores.

B  batch    D  dim    N  outputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Score tensors by name; the batch is their first axis.
Scores = dict[str, Tensor]

# A detector that was never trained should seldom fire: the prior of arXiv:1708.02002, section 4.1, at probability 0.1.
UNTRAINED_LOGIT = -2.2


def perceptron(inputs: int, hidden: int, outputs: int, *, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """Linear, [LayerNorm,] ReLU, [Dropout,] Linear. The indices are the checkpoint's: what is left out has none."""
    layers: list[nn.Module] = [nn.Linear(inputs, hidden)]
    if norm:
        layers.append(nn.LayerNorm(hidden))
    layers.append(nn.ReLU())
    if dropout:
        layers.append(nn.Dropout(dropout))
    layers.append(nn.Linear(hidden, outputs))
    return nn.Sequential(*layers)


def detector(inputs: int, hidden: int, outputs: int, *, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """A perceptron whose outputs are logits of things that seldom are: it starts with none of them found."""
    network = perceptron(inputs, hidden, outputs, norm=norm, dropout=dropout)
    nn.init.constant_(network[-1].bias, UNTRAINED_LOGIT)  # type: ignore[arg-type]
    return network


def in_score_precision(x: Tensor) -> Tensor:
    """`x` in at least float32. A score is compared with a threshold in the precision in which it is given out."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def probabilities(logits: Tensor) -> Tensor:
    """Independent probabilities of logits (B, N), in at least float32."""
    return torch.sigmoid(in_score_precision(logits))


def probability(logit: Tensor) -> Tensor:
    """The probability (B,) of logits (B, 1), in at least float32."""
    return probabilities(logit).squeeze(-1)


def distribution(logits: Tensor) -> Tensor:
    """Probabilities (B, N) that sum to 1, in at least float32."""
    return F.softmax(in_score_precision(logits), dim=-1)


def choose(condition: Tensor, chosen: Tensor, otherwise: Tensor) -> Tensor:
    """Row by row: `chosen` (B, D) where `condition` (B, 1) holds, else `otherwise` (B, D).

    Graphs compute `chosen` only where some row wants it (`onnx.passes.SkipUnchosen`).
    """
    return torch.where(condition, chosen, otherwise)
