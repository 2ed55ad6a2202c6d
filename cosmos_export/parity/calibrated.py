"""Calibrated weights in a bundle: they cannot be made a second time bit for bit, so verification takes the numbers that
are stored, asks whether each row is still near the checkpoint's, and then whether the graph computes with exactly them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.capabilities import weight_source
from cosmos_export.model.loading import model_skeleton, skeleton
from cosmos_export.model.tensors_read import tensors_read
from cosmos_export.onnx.quantize import Quantization, QuantizedMatrix, dequantize, quantize
from cosmos_export.onnx.signature import parts_of, quantized_name
from cosmos_export.parity.gates import CALIBRATION_GATES
from cosmos_export.recipe import ExportRecipe

# A row with its weights at other places is 1 of its length away and more. What makes up for the errors of other weights
# doubles a row's own, on the demo checkpoint; without large weights that is far within the gate.
_ANOTHER_ROW, _TIMES_ROUNDING = 0.9, 2.0


def with_stored_levels(
    checkpoint: Checkpoint, graph: Path, recipe: ExportRecipe, capabilities: Sequence[str] | None = None
) -> Checkpoint:
    """The checkpoint whose quantised matrices are those that a graph's file holds; what it lacks stays uncalibrated.

    `capabilities` are those of a model with heads, whose matrices are calibrated, too; None is the plain decoder.
    """
    initializers = ir.load(graph).graph.initializers
    shapes, found = _calibrated_shapes(checkpoint, recipe, capabilities), dict[str, QuantizedMatrix]()
    for blocks in [name for name in initializers if name.endswith(quantized_name("", "blocks"))]:
        source = blocks.removesuffix(quantized_name("", "blocks"))
        parts = parts_of(source)
        scales = initializers.get(quantized_name(source, "scales"))
        if scales is not None and shapes.keys() >= set(parts):
            matrix = QuantizedMatrix(_tensor(initializers[blocks]), _tensor(scales), None)
            rows = [shapes[part][0] for part in parts]
            if matrix.blocks.shape[:2] == matrix.scales.shape and sum(rows) == len(matrix.blocks):
                found |= zip(parts, _split_rows(matrix, rows), strict=True)
    return replace(checkpoint, calibrated=found)


def strayed(checkpoint: Checkpoint, recipe: ExportRecipe, capabilities: Sequence[str] | None = None) -> Iterator[str]:
    """What is wrong with each calibrated matrix of `checkpoint` that is further from its tensor than the gate says."""
    for name in _calibrated_shapes(checkpoint, recipe, capabilities):
        form = recipe.form_of(name)
        if name not in checkpoint.calibrated or form is None:
            continue  # that it is missing is for the comparison of stored tensors to say
        matrix = _matrix(checkpoint, name)
        error = _relative_row_errors(checkpoint.calibrated[name], matrix, form)
        allowed = _allowed_row_errors(error, matrix, form)
        worst = int((error - allowed).nan_to_num(torch.inf).argmax())
        if not float(error[worst]) <= float(allowed[worst]):  # so that NaN fails
            yield (
                f"row {worst} of {name} is {float(error[worst]):.2f} of its own length away from the checkpoint's; "
                f"calibrated to {form.bits} bits it may be {float(allowed[worst]):.2f}"
            )


def _allowed_row_errors(error: Tensor, matrix: Tensor, form: Quantization) -> Tensor:
    """How far each row (N,) may be: what the gate says, or as many times what rounding by itself does to a row that
    few large weights make hard to round, yet never so far as another row would be."""
    gate = CALIBRATION_GATES[form.bits].row_error
    allowed = torch.full_like(error, gate)
    far = error > gate
    if far.any():
        alone = _relative_row_errors(quantize(matrix[far], form), matrix[far], form)
        allowed[far] = (_TIMES_ROUNDING * alone).clamp(gate, _ANOTHER_ROW)
    return allowed


def _relative_row_errors(stored: QuantizedMatrix, matrix: Tensor, form: Quantization) -> Tensor:
    """How far each row (N,) lies from where it should, as a share of its length."""
    if stored.blocks.shape[1] * form.block_size < matrix.shape[1]:
        return torch.full((len(matrix),), float("nan"))
    away = dequantize(stored, matrix.shape[1], form) - matrix
    return away.norm(dim=1) / matrix.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)


def _calibrated_shapes(
    checkpoint: Checkpoint, recipe: ExportRecipe, capabilities: Sequence[str] | None
) -> dict[str, tuple[int, ...]]:
    """The shape of every matrix that a calibration makes, by its name in the model."""
    config = checkpoint.config
    if capabilities is None:
        tensors = dict(skeleton(config).state_dict())
    else:
        model, read = model_skeleton(config, capabilities=capabilities), tensors_read(config, capabilities)
        named = [*model.named_parameters(), *model.named_buffers()]
        tensors = {name: tensor for name, tensor in named if name in read}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if recipe.form_of(name) is not None}


def _matrix(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of the model in float32: the checkpoint's of that name, or made of several."""
    source = weight_source(name)
    if source is None:
        return checkpoint.tensor(name).to(torch.float32)
    return source.read(lambda part: checkpoint.tensor(part).to(torch.float32))


def _tensor(value: ir.Value) -> Tensor:
    if value.const_value is None:
        raise AssertionError("an initializer of a file has a value")
    return torch.from_numpy(value.const_value.numpy().copy())


def _split_rows(matrix: QuantizedMatrix, rows: list[int]) -> Iterator[QuantizedMatrix]:
    for blocks, scales in zip(matrix.blocks.split(rows), matrix.scales.split(rows), strict=True):
        yield QuantizedMatrix(blocks, scales, None)
