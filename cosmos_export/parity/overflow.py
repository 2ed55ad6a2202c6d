"""Do a model's activations fit into float16, which ends at 65,504? Measured on the float32 model.

A value beyond it becomes infinite, and the next norm makes NaN of it; the logit gate sees that where it happens. This
says where it is near, before another text makes it happen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cosmos_export.parity.gates import OVERFLOW_SHARE

LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Activation:
    """The largest magnitude that went into or out of a module, by its name in the checkpoint."""

    where: str
    largest: float

    def __str__(self) -> str:
        return f"{self.where} reaches {self.largest:,.0f}, {self.largest / LARGEST:.0%} of float16's {LARGEST:,.0f}"


@torch.inference_mode()
def largest_activations(model: nn.Module, rows: Iterable[NDArray[np.int64]]) -> list[Activation]:
    """The largest inputs and outputs of every module of an eager model over ids (B, T), the largest first."""
    found: dict[str, float] = {}

    def see(where: str, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found[where] = max(found.get(where, 0.0), float(value.abs().max()))

    def hook(name: str) -> object:
        def after(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            see(f"input of {name}", inputs[0] if inputs else None)
            see(f"output of {name}", output)

        return after

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(hook(name)) for name, module in named]
    try:
        for ids in rows:
            model(torch.from_numpy(ids))
    finally:
        for handle in handles:
            handle.remove()
    return sorted((Activation(where, value) for where, value in found.items()), key=lambda a: -a.largest)


def near_overflow(model: nn.Module, rows: Iterable[NDArray[np.int64]], at_most: int = 5) -> list[Activation]:
    """Those beyond `OVERFLOW_SHARE` of what float16 holds; no more than `at_most`."""
    return [a for a in largest_activations(model, rows) if not a.largest <= OVERFLOW_SHARE * LARGEST][:at_most]
