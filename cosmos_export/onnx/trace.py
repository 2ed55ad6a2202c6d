"""The eager model becomes an ONNX graph: torch.export, then torch.onnx's dynamo translation, then constant folding.

The model is traced as a skeleton (meta device): the graph's weights are names and shapes until they are written, so a
trace takes the same seconds and the same memory whatever the model's size.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch.export import Dim

from cosmos_export.errors import ExportError
from cosmos_export.model.decoder import CosmosDecoder
from cosmos_export.onnx.signature import BATCH, INPUT_IDS, LOGITS, SEQUENCE
from cosmos_runtime import FULL_SEQUENCE

# Sizes to trace with. Neither may equal 1, which torch.export would take for a constant, nor each other.
_EXAMPLE_BATCH, _EXAMPLE_SEQUENCE = 2, 3


def trace(model: CosmosDecoder, graph: str, opset: int) -> ir.Model:
    """One of a recipe's graphs, traced from a skeleton model.

    full_sequence: input_ids (batch, sequence) to logits (batch, sequence, V).

    Initializers are left without values; `cosmos_export.onnx.weights` gives them theirs.
    Raises ExportError when the model cannot be traced with both axes dynamic.
    """
    if graph != FULL_SEQUENCE:
        raise ExportError(f"no trace for a graph {graph!r}; there is: {FULL_SEQUENCE}")
    program = _export(model)
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT_IDS],
            output_names=[LOGITS],
            optimize=False,
            verbose=False,
        )
    if onnx_program is None:
        raise ExportError("torch.onnx.export returned no program")
    traced = onnx_program.model
    _forget_values(traced)
    with _quiet():
        onnxscript.optimizer.optimize_ir(traced)
    _name_axes(traced)
    return traced


def _export(model: CosmosDecoder) -> torch.export.ExportedProgram:
    limit = model.config.max_sequence_length
    # A model of one or two positions has no dynamic length to speak of, but must still trace.
    example = torch.zeros(_EXAMPLE_BATCH, min(_EXAMPLE_SEQUENCE, limit), dtype=torch.int64, device="meta")
    axes = {0: Dim(BATCH, min=1), 1: Dim(SEQUENCE, min=1, max=limit) if limit > 1 else Dim.STATIC}
    try:
        return torch.export.export(model, (example,), dynamic_shapes=(axes,), strict=False)
    except Exception as error:  # torch raises many types here, none of them public
        raise ExportError(
            f"torch.export could not trace the model with dynamic {BATCH} and {SEQUENCE}: {error}"
        ) from error


def _forget_values(model: ir.Model) -> None:
    """Meta tensors have no data to fold; without a value the optimizer leaves an initializer alone."""
    for value in model.graph.initializers.values():
        value.const_value = None


def _name_axes(model: ir.Model) -> None:
    """Replaces torch's symbols (s72, s70) by the axes' names, in inputs, outputs and every value in between."""
    tokens = model.graph.inputs[0]
    if tokens.shape is None:
        raise ExportError(f"the traced graph has no shape for {tokens.name}")
    names = {
        str(dim): axis for dim, axis in zip(tokens.shape, (BATCH, SEQUENCE), strict=True) if not isinstance(dim, int)
    }
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    # Expressions such as "2*s70" say nothing to a reader and are not needed: ORT infers them from the inputs.
    return names.get(str(dim))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what torch and onnxscript say about themselves: absent torchvision, initializers without values."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
