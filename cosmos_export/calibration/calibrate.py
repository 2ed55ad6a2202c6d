"""A checkpoint's matrices, calibrated for a recipe: layer by layer through the model, then together.

R  rows of text    T  tokens a row    D  dim
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos_export.calibration.heads import MOST_CALLS, round_heads
from cosmos_export.calibration.learning import learn_levels
from cosmos_export.calibration.levels import Levels
from cosmos_export.calibration.plan import CalibrationPlan
from cosmos_export.calibration.rounding import round_with_feedback
from cosmos_export.calibration.text import sampled_text, text_from_file
from cosmos_export.checkpoint import EMBEDDING, Checkpoint
from cosmos_export.model.attention import FullSequenceAttention
from cosmos_export.model.decoder import CosmosDecoder
from cosmos_export.model.loading import load_decoder, load_model
from cosmos_export.onnx.quantize import Quantization, QuantizedMatrix
from cosmos_export.progress import Progress
from cosmos_export.recipe import ExportRecipe

_ROWS_A_PASS = 16
# The embedding is read as rows, too, where every channel counts alike: an equal share of its inputs' moments. One tenth
# gave the least divergence on the demo checkpoint, of 0, 0.1 and 1.
_LOOKUP_SHARE = 0.1


def calibrate(
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    plan: CalibrationPlan,
    text: Path | None,
    progress: Progress,
    capabilities: Sequence[str] | None = None,
) -> dict[str, QuantizedMatrix]:
    """The quantised form of every matrix that `recipe` quantises, by the model's names: of the plain decoder and, with
    `capabilities`, of these heads.

    The text is `text`, a UTF-8 file, or what the model writes itself. Raises CheckpointError when it is unusable.
    """
    model = load_decoder(checkpoint)
    rows, length = plan.rows(sum(p.numel() for p in model.parameters()), checkpoint.config.max_sequence_length)
    progress.stage(f"Calibrating: {rows * length:,} tokens of text")
    ids = text_from_file(text, checkpoint.tokenizer, rows, length) if text else sampled_text(model, rows, length)
    progress.stage("Calibrating: rounding layer by layer")
    levels = _rounded(load_decoder(checkpoint), recipe, ids, progress)
    if plan.epochs:
        progress.stage("Calibrating: learning levels and scales")
        levels = learn_levels(model, levels, ids, plan.epochs, progress.update)
    matrices = {name: level.packed() for name, level in levels.items()}
    if capabilities is not None:
        progress.stage("Calibrating: rounding the capability heads")
        matrices |= _heads(checkpoint, capabilities, levels, recipe, ids, progress)
    return matrices


def _heads(
    checkpoint: Checkpoint,
    capabilities: Sequence[str],
    levels: Mapping[str, Levels],
    recipe: ExportRecipe,
    ids: Tensor,
    progress: Progress,
) -> dict[str, QuantizedMatrix]:
    """The heads behind the backbone as it is rounded, on as many rows of the text as there is time and room for."""
    model = load_model(checkpoint, capabilities=capabilities)
    for name, level in levels.items():
        model.get_parameter(name).data = level.values()
    plan = CalibrationPlan(tokens=MOST_CALLS, epochs=0)
    rows, _ = plan.rows(sum(p.numel() for p in model.parameters()), ids.shape[1])
    return round_heads(model, recipe, ids[:rows], progress.update)


@torch.no_grad()
def _rounded(model: CosmosDecoder, recipe: ExportRecipe, ids: Tensor, progress: Progress) -> dict[str, Levels]:
    """Every matrix rounded, its inputs being those that the layers before it give when rounded; changes the model."""
    levels: dict[str, Levels] = {}
    hidden = model.tok_embeddings(ids)  # (R, T, D)
    attend = model.full_sequence_attention(ids)
    for index, layer in enumerate(model.layers):
        progress.update(index, len(model.layers))
        moments = _input_moments(layer, hidden, attend)
        for name, linear in _linears(layer):
            form = recipe.form_of(f"layers.{index}.{name}.weight")
            if form is not None:
                rounded = round_with_feedback(linear.weight, moments[name], form)
                levels[f"layers.{index}.{name}.weight"] = rounded
                linear.weight = nn.Parameter(rounded.values(), requires_grad=False)  # the old one may be the caller's
        hidden = torch.cat([layer(part, attend) for part in hidden.split(_ROWS_A_PASS)])
    if recipe.embedding is not None:
        levels[EMBEDDING] = _round_embedding(model, hidden, recipe.embedding)
    progress.update(len(model.layers), len(model.layers))
    return levels


def _round_embedding(model: CosmosDecoder, hidden: Tensor, form: Quantization) -> Levels:
    inputs = model.norm(hidden).flatten(0, 1)  # (R * T, D)
    moments = inputs.T @ inputs
    moments = moments / moments.diagonal().mean() + _LOOKUP_SHARE * torch.eye(len(moments))
    return round_with_feedback(model.tok_embeddings.weight, moments, form)


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _input_moments(layer: nn.Module, hidden: Tensor, attend: FullSequenceAttention) -> Mapping[str, Tensor]:
    """The second moments (C, C) of what each of a layer's products reads, by the product's name."""
    moments: dict[str, Tensor] = {}

    def add(name: str, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].flatten(0, -2)
        moments[name] = moments.get(name, 0) + rows.T @ rows

    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs))
        for name, linear in _linears(layer)
    ]
    for part in hidden.split(_ROWS_A_PASS):
        layer(part, attend)
    for hook in hooks:
        hook.remove()
    return moments
