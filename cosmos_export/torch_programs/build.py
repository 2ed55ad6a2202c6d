"""A checkpoint becomes a program in a bundle's folder: the model with its weights, wrapped, traced, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.folders import require_room
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.model.loading import load_decoder, load_model
from cosmos_export.model.tensors_read import tensors_read
from cosmos_export.onnx.axes import COMPILED_SIZES, traced_shape
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.onnx.weights import WeightReader
from cosmos_export.recipe import FBGEMM, INDUCTOR, ONEDNN, ExportRecipe
from cosmos_export.torch_programs.calling import Argument, TorchProgram, arguments
from cosmos_export.torch_programs.compiled import compile_program
from cosmos_export.torch_programs.products import with_int8_products, with_packed_products
from cosmos_export.torch_programs.pt2 import export_program, write_program
from cosmos_export.torch_programs.torchscript import explained_once, write_torchscript
from cosmos_runtime import TORCHSCRIPT, GraphSpec, Role

# The file of a bundle, by its format.
FILES = {"torchscript": "model.pt", "pt2": "model.pt2"}

# What a program takes beside its weights: a few hundred kilobytes; more of heads and many layers.
_ROOM_FOR_CODE = 8 << 20


def write_torch_program(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    *,
    causal: bool = True,
    capabilities: Sequence[str] | None = None,
) -> dict[str, GraphSpec]:
    """Writes the one graph of a recipe into `folder`; its specification, by the graph's name.

    The whole model is in memory for that. Raises ExportError where it cannot be traced for all sizes.
    """
    (graph,) = recipe.graphs
    config = checkpoint.config
    spec = program_spec(graph, config, recipe, capabilities)
    model = load(checkpoint, recipe, causal=causal, capabilities=capabilities)
    require_room(folder, _room(model, recipe))
    with explained_once():
        model = _prepared(model, recipe)
    program = TorchProgram.around(model, graph, spec)
    examples = example_arguments(spec, config, COMPILED_SIZES if recipe.dialect == INDUCTOR else None)
    if recipe.format == TORCHSCRIPT:
        write_torchscript(program, examples, spec, folder / spec.file)
    else:
        exported = export_program(program, examples, spec, config)
        write_program(exported, folder / spec.file)
        if recipe.dialect == INDUCTOR:
            compile_program(exported, folder)
    return {graph: spec}


def _room(model: nn.Module, recipe: ExportRecipe) -> int:
    """About how many bytes the program of a model will take."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if recipe.quantization is not None:
        size = size * recipe.quantization.bits // 32
    return size * (2 if recipe.dialect == INDUCTOR else 1) + _ROOM_FOR_CODE


def program_spec(
    graph: str, config: CosmosAdvancedConfig, recipe: ExportRecipe, capabilities: Sequence[str] | None
) -> GraphSpec:
    """The signature of a recipe's program."""
    spec = graph_spec(graph, config, None, activations=recipe.activations, capabilities=capabilities)
    return replace(spec, file=FILES[recipe.format])


def load(
    checkpoint: Checkpoint, recipe: ExportRecipe, *, causal: bool, capabilities: Sequence[str] | None
) -> CosmosBackbone:
    """The eager model with the weights that a forward pass reads, in the type that a recipe computes with.

    Raises CheckpointError as `load_decoder` and `load_model` do, ExportError where a weight is beyond the type's range.
    """
    model: CosmosBackbone
    if capabilities is None:
        model = load_decoder(checkpoint, causal=causal)
    else:
        model = load_model(checkpoint, causal=causal, capabilities=capabilities)
        _forget_all_but(model, tensors_read(checkpoint.config, capabilities))
    _store(model, WeightReader(checkpoint, recipe))
    return model


def example_arguments(
    spec: GraphSpec, config: CosmosAdvancedConfig, sizes: Mapping[str, int] | None = None
) -> list[Argument]:
    """Arguments to trace with: of some sizes, or of these, every row as long as the longest."""
    values = {}
    for tensor in spec.inputs:
        make = torch.ones if tensor.role == Role.ATTENTION_MASK else torch.zeros
        shape = traced_shape(tensor, config.max_sequence_length, sizes)
        values[tensor.name] = make(shape, dtype=getattr(torch, tensor.dtype))
    return arguments(values, spec)


def _prepared(model: CosmosBackbone, recipe: ExportRecipe) -> CosmosBackbone:
    if recipe.dialect == FBGEMM:
        return with_int8_products(model)
    return with_packed_products(model) if recipe.dialect == ONEDNN else model


def _store(model: nn.Module, reader: WeightReader) -> None:
    """Puts into `model` what a bundle has to hold: rounded once, and each tensor in memory of its own. A view of more,
    as the queries' third of a packed projection is one, would be written with all of it."""
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        if not name.startswith("rope."):
            stored = reader.read(name)
            tensor.data = stored if stored.untyped_storage().nbytes() == stored.nbytes else stored.clone()


def _forget_all_but(model: nn.Module, read: set[str]) -> None:
    """A program would carry every weight of its module, whether it computes with it or not."""
    for name, _ in list(model.named_parameters()) + list(model.named_buffers()):
        if name not in read and not name.startswith("rope."):
            owner, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(owner), attribute)
