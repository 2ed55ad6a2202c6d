"""Levels and scales learned from the unrounded model: the rounded one is to give its next-token distributions.

The loss is KL(model, rounded model) on the calibration text; gradients pass through the rounding as if it were not
there (the straight-through estimator, arXiv:1308.3432). Scales learn in their logarithm, levels in steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_export.calibration.levels import Levels, spread, zero_level
from cosmos_export.model.decoder import CosmosDecoder

# Found on the demo checkpoint: 0.01 hardly moves a level, 0.1 breaks the model (benchmarks/LOG.md).
_LEVEL_RATE, _SCALE_RATE = 0.03, 0.005
_BETAS = (0.9, 0.98)
_ROWS_A_STEP = 8


def learn_levels(
    model: CosmosDecoder,
    levels: Mapping[str, Levels],
    ids: Tensor,
    epochs: int,
    update: Callable[[int, int], None],
) -> dict[str, Levels]:
    """Improves the levels of the tensors that `levels` names on token ids (R, T), each seen `epochs` times.

    `update(done, total)` hears of every step. The model is not changed.
    """
    grids = {name: _Grid(level) for name, level in levels.items()}
    optimizer = torch.optim.Adam(
        [
            {"params": [grid.steps for grid in grids.values()], "lr": _LEVEL_RATE},
            {"params": [grid.stretch for grid in grids.values()], "lr": _SCALE_RATE},
        ],
        betas=_BETAS,
    )
    batches = ids.split(_ROWS_A_STEP)
    total = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.5 * (1 + math.cos(math.pi * done / total)))
    for step in range(total):
        update(step, total)
        loss = _divergence(model, {n: g.values() for n, g in grids.items()}, batches[step % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    update(total, total)
    return {name: grid.settled() for name, grid in grids.items()}


class _Grid:
    """What is learned of one matrix: its steps, and the logarithm of what its scales are stretched by."""

    def __init__(self, levels: Levels) -> None:
        self.levels = levels
        self.steps = levels.steps.clone().requires_grad_(True)
        self.stretch = torch.zeros_like(levels.scales).requires_grad_(True)

    def values(self) -> Tensor:
        steps = self.steps + (self._rounded() - self.steps).detach()
        return spread(steps, self.levels.scales * self.stretch.exp(), self.levels.form.block_size)

    @torch.no_grad()
    def settled(self) -> Levels:
        return Levels(self._rounded().detach(), self.levels.scales * self.stretch.exp(), self.levels.form)

    def _rounded(self) -> Tensor:
        zero = zero_level(self.levels.form)
        return self.steps.round().clamp(-zero, zero - 1)


def _divergence(model: CosmosDecoder, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Mean KL(model, model with `weights`) in nats per token of ids (R, T)."""
    with torch.no_grad():
        target = torch.log_softmax(model(ids), dim=-1).flatten(0, 1)
    rounded = torch.log_softmax(torch.func.functional_call(model, weights, (ids,)), dim=-1).flatten(0, 1)
    return F.kl_div(rounded, target, log_target=True, reduction="batchmean")
