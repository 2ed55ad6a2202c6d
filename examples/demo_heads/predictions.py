"""What vectors predict, through the backbone's tied output projection.

N  vectors    D  dim    V  vocab_size
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cosmos_export.model import CosmosAdvancedModel

FEW, MANY = 5, 50  # the next token is among the few likeliest; it is not even among the many


def divergence(model: CosmosAdvancedModel, plain: Tensor, vectors: Tensor) -> Tensor:
    """Mean KL divergence, in nats, of what vectors (N, D) predict from what the plain decoder's logits (N, V) do."""
    predicted = model.logits(vectors).log_softmax(-1)
    return F.kl_div(predicted, plain.log_softmax(-1), log_target=True, reduction="batchmean")


def likelier_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    """How many tokens are likelier than the target (N,), by logits (N, V): 0 where the likeliest one is right."""
    return (logits > logits.gather(-1, targets[:, None])).sum(-1)
