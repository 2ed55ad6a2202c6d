"""The eager model becomes an ONNX graph: torch.export, then torch.onnx's dynamo translation, then constant folding.

The model is traced as a skeleton (meta device): the graph's weights are names and shapes until they are written. Of
its layers one is traced, and copied for the others (`repeat_layers`). So a trace takes the same seconds and the same
memory whatever the model's size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ExportError
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.model.loading import model_skeleton, skeleton
from cosmos_export.onnx.axes import dynamic_axes, dynamic_shape, traced_shape
from cosmos_export.onnx.head_programs import program_of
from cosmos_export.onnx.repeat_layers import LayerNotFoundError, first_layer, repeat_layer, spec_of_first_layer
from cosmos_export.onnx.signature import DEFAULT_INPUTS
from cosmos_export.quiet import quiet
from cosmos_runtime import GraphSpec

# What they say: absent torchvision, initializers without values.
_TALKERS = ("torch.onnx", "onnx_ir", "onnxscript")

_WITHIN_PROGRAM = "model."  # what a program's wrapping puts before the checkpoint's names


def trace(model: CosmosBackbone, graph: str, spec: GraphSpec, *, fused_attention: bool = False) -> ir.Model:
    """One of a recipe's graphs, traced from a skeleton model, with the names, axes and opset of `spec`.

    `fused_attention` lets the decoder use ONNX Runtime's own attention operator.
    Initializers are left without values; `cosmos_export.onnx.weights` gives them theirs.
    Raises ExportError when the model cannot be traced with its axes dynamic.
    """
    layers = model.config.n_layers
    if layers == 1:
        return trace_whole(model, graph, spec, fused_attention=fused_attention)
    traced = trace_whole(first_layer(model), graph, spec_of_first_layer(spec), fused_attention=fused_attention)
    try:
        repeat_layer(traced, spec, layers)
    except LayerNotFoundError as error:
        warnings.warn(f"all {layers} layers are traced, which takes longer: {error}", stacklevel=2)
        return trace_whole(model, graph, spec, fused_attention=fused_attention)
    return traced


def trace_whole(model: CosmosBackbone, graph: str, spec: GraphSpec, *, fused_attention: bool = False) -> ir.Model:
    """What `trace` gives, with every layer traced."""
    program = _export(program_of(model, graph, spec, "fused" if fused_attention else "standard"), spec, model.config)
    with quiet(*_TALKERS):
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=spec.opset,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            optimize=False,
            verbose=False,
        )
    if onnx_program is None:
        raise ExportError("torch.onnx.export returned no program")
    traced = onnx_program.model
    _forget_values(traced)
    with quiet(*_TALKERS):
        onnxscript.optimizer.optimize_ir(traced)
    _name_initializers(traced)
    _name_axes(traced, spec)
    _add_defaults(traced)
    return traced


def traceable(
    config: CosmosAdvancedConfig,
    activations: str,
    *,
    causal: bool = True,
    fused_attention: bool = False,
    capabilities: Sequence[str] | None = None,
) -> CosmosBackbone:
    """A skeleton that computes in the type `activations`, for `trace`: with the heads of `capabilities`, or with
    None a plain decoder."""
    dtype = getattr(torch, activations)
    model: CosmosBackbone
    if capabilities is None:
        model = skeleton(config, causal=causal).to(dtype)
    else:
        model = model_skeleton(config, causal=causal, capabilities=capabilities).to(dtype)
    if fused_attention:  # which wants the rotary tables in the type of its queries
        model.rope.rebuild(torch.device("meta"), dtype)
    return model


def _export(program: nn.Module, spec: GraphSpec, config: CosmosAdvancedConfig) -> torch.export.ExportedProgram:
    limit = config.max_sequence_length
    examples = tuple(
        torch.empty(traced_shape(tensor, limit), dtype=getattr(torch, tensor.dtype), device="meta")
        for tensor in spec.inputs
    )
    dims = dynamic_axes(spec, config)
    shapes = tuple(dynamic_shape(tensor, dims) for tensor in spec.inputs)
    try:
        with quiet(*_TALKERS):
            return torch.export.export(program, (examples,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # torch raises many types here, none of them public
        raise ExportError(f"torch.export could not trace with dynamic {', '.join(dims)}: {error}") from error


def _forget_values(model: ir.Model) -> None:
    """Meta tensors have no data to fold; without a value the optimizer leaves an initializer alone."""
    for value in model.graph.initializers.values():
        value.const_value = None


def _name_initializers(model: ir.Model) -> None:
    """Initializers are called what the checkpoint calls their tensors."""
    for value in list(model.graph.initializers.values()):
        if value.name and value.name.startswith(_WITHIN_PROGRAM):
            value.name = value.name.removeprefix(_WITHIN_PROGRAM)


def _name_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Replaces torch's symbols (s72, s70) by the axes' names, in inputs, outputs and every value in between."""
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True):
        for dim, axis in zip(value.shape or (), tensor.shape, strict=True):
            if isinstance(axis, str):
                names[str(dim)] = axis
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _add_defaults(model: ir.Model) -> None:
    """Inputs that may be left out are initializers, too (ONNX IR specification, "initializers": default values)."""
    for value in model.graph.inputs:
        if value.name in DEFAULT_INPUTS:
            value.const_value = ir.tensor(DEFAULT_INPUTS[value.name], dtype=value.dtype, name=value.name)
            model.graph.initializers.add(value)


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    # Expressions such as "2*s70" say nothing to a reader and are not needed: ORT infers them from the inputs.
    return names.get(str(dim))
