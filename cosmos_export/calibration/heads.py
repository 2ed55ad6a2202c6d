"""The capability heads' matrices, rounded in one pass over text: each at the moment when its inputs are first known, so
that they are those that the matrices before it give when rounded.

R  rows of text    T  tokens a row    D  dim    N = R T calls, each of a token with those before it
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from cosmos_export.calibration.levels import Levels
from cosmos_export.calibration.rounding import round_with_feedback
from cosmos_export.model.capabilities import MemoryState
from cosmos_export.model.capabilities.semantic_memory import FrozenLinear
from cosmos_export.model.cosmos import CosmosAdvancedModel
from cosmos_export.onnx.head_matrices import is_wide
from cosmos_export.onnx.quantize import Quantization, QuantizedMatrix
from cosmos_export.recipe import ExportRecipe

# Calls that the heads' inputs are seen in: fifty skills make fifty vectors of each.
MOST_CALLS = 8192
# Moments of more inputs than this are taken in parts, which know nothing of each other: those of all skills at once
# would be 21 GB at dim 1024.
_MOST_COLUMNS = 4096
# Of the moments (see `rounding.DAMPING`). On the demo checkpoint 0.01 and 0.3 cost the same divergence; with more,
# weights stay nearer to the checkpoint's where the text has nothing to say, as of corrections that are seldom made.
_DAMPING = 0.3


@torch.no_grad()
def round_heads(
    model: CosmosAdvancedModel, recipe: ExportRecipe, ids: Tensor, update: Callable[[int, int], None]
) -> dict[str, QuantizedMatrix]:
    """Every matrix of the heads that `recipe` quantises, calibrated on token ids (R, T), by the model's names.

    The backbone is to have the weights that the heads will meet. Changes the model. `update(done, total)` hears of
    every matrix; one that no forward pass reads is left out.
    """
    forms = {name: form for name in _matrices(model) if (form := recipe.form_of(f"{name}.weight")) is not None}
    found: dict[str, QuantizedMatrix] = {}

    def round_now(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if f"{name}.weight" not in found:  # a layer may be used in several rounds
            levels = _rounded(_weight(layer), inputs[0], forms[name])
            found[f"{name}.weight"] = levels.packed()
            _replace_weight(layer, levels.values())
            update(len(found), len(forms))

    with _hooks(model, forms, round_now), _calls_along_rows(model, ids):
        hidden = model.hidden_states(ids)  # (R, T, D)
        queries = hidden[:, :1].expand_as(hidden).flatten(0, 1)
        none = hidden.new_zeros(1, 0, hidden.shape[-1]).expand(ids.numel(), -1, -1)
        memory = MemoryState(none, none, torch.zeros(ids.numel(), dtype=torch.int64))
        model.enhance(hidden.flatten(0, 1), queries, model.capabilities, memory)
    return found


def _matrices(model: CosmosAdvancedModel) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | FrozenLinear) and is_wide(f"{name}.weight"):
            yield name


@contextlib.contextmanager
def _hooks(
    model: CosmosAdvancedModel,
    forms: Mapping[str, Quantization],
    before: Callable[[str, nn.Module, tuple[Tensor]], None],
) -> Iterator[None]:
    """Within it, `before(name, layer, inputs)` is called before each of these layers computes."""
    handles = [model.get_submodule(name).register_forward_pre_hook(partial(before, name)) for name in forms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _calls_along_rows(model: CosmosAdvancedModel, ids: Tensor) -> Iterator[None]:
    """Within it, the calls of a batch (N,) are those of ids (R, T), one after another: each remembers those before."""
    if "memory" not in model.capabilities:
        yield
        return
    working = model.memory_system.working_memory

    def forward(x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        return working.along_rows(x.unflatten(0, tuple(ids.shape))).flatten(0, 1), state

    working.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del working.forward


def _rounded(matrix: Tensor, inputs: Tensor, form: Quantization) -> Levels:
    """The levels of a matrix (outputs, C) that meets inputs (..., C)."""
    rows = inputs.flatten(0, -2)
    parts = zip(matrix.split(_MOST_COLUMNS, dim=1), rows.split(_MOST_COLUMNS, dim=1), strict=True)
    levels = [round_with_feedback(part, seen.T @ seen, form, _DAMPING) for part, seen in parts]
    steps, scales = (torch.cat(tensors, dim=1) for tensors in ([e.steps for e in levels], [e.scales for e in levels]))
    return Levels(steps, scales, form)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Linear | FrozenLinear)
    return layer.weight


def _replace_weight(layer: nn.Module, values: Tensor) -> None:
    """A new tensor: the old one may be the checkpoint's own."""
    layer.weight = values if isinstance(layer, FrozenLinear) else nn.Parameter(values, requires_grad=False)
