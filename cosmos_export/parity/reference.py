"""What a bundle must equal: the eager model in float64, and how far float32 rounding alone takes the same model."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import load_decoder


class EagerReference:
    """The eager model of a checkpoint, in float64 and in float32."""

    def __init__(self, checkpoint: Checkpoint, *, causal: bool = True) -> None:
        self._exact = load_decoder(checkpoint, causal=causal, dtype=torch.float64)
        self._eager = load_decoder(checkpoint, causal=causal, dtype=torch.float32)

    def exact(self, input_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Logits (B, T, V) of ids (B, T), all arithmetic in float64."""
        return _run(self._exact, input_ids)

    def eager(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (B, T, V) of ids (B, T) as PyTorch computes them in float32."""
        return _run(self._eager, input_ids)


@torch.inference_mode()
def _run(model: torch.nn.Module, input_ids: NDArray[np.int64]) -> NDArray:
    return model(torch.from_numpy(input_ids)).numpy()
