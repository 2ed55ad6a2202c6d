"""The same bytes, computed with float32 activations: a quantised bundle's kernels held against the tight gate.

A graph whose products round their activations to 8 bits (MatMulNBits, accuracy_level 4) cannot be told from a slightly
wrong one by a tight tolerance. With `accuracy_level` 1 the same weights are read by the same operator and nothing else
is rounded: what is wrong then is wrong with the graph or the stored numbers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import torch

from cosmos_export.folders import PARITY_SCRATCH, claimed_folder, clear_abandoned
from cosmos_export.onnx.quantize import FLOAT32_ACTIVATIONS, INT8_ACTIVATIONS
from cosmos_export.parity.gates import Arithmetic
from cosmos_export.recipe import FBGEMM, ExportRecipe
from cosmos_runtime import MANIFEST_NAME, Bundle, describe_file


def arithmetic_of(recipe: ExportRecipe) -> Arithmetic:
    """What the products of a bundle of this recipe compute with."""
    if recipe.dialect == FBGEMM:
        return Arithmetic.INT8_ACTIVATIONS
    forms = (recipe.quantization, recipe.embedding, *recipe.overrides.values())
    if any(form is not None and form.accuracy_level == INT8_ACTIVATIONS for form in forms):
        return Arithmetic.INT8_ACTIVATIONS
    return Arithmetic(recipe.activations)


def arithmetics_of(recipe: ExportRecipe) -> list[Arithmetic]:
    """What a bundle is compared in: its own arithmetic, and before it the tighter one where there is."""
    arithmetic = arithmetic_of(recipe)
    return [Arithmetic.FLOAT32, arithmetic] if arithmetic is Arithmetic.INT8_ACTIVATIONS else [arithmetic]


def torch_type(arithmetic: Arithmetic) -> torch.dtype:
    """What the eager model computes with in this arithmetic."""
    return {Arithmetic.FLOAT16: torch.float16, Arithmetic.BFLOAT16: torch.bfloat16}.get(arithmetic, torch.float32)


@contextlib.contextmanager
def float32_activations(folder: Path) -> Iterator[Path]:
    """A copy of the bundle in `folder` that computes with float32 activations; gone when the block ends."""
    bundle = Bundle.open(folder)
    beside = folder.resolve().parent
    clear_abandoned(beside, PARITY_SCRATCH)
    with claimed_folder(beside, PARITY_SCRATCH) as scratch:
        copy = scratch / "bundle"
        copy.mkdir()
        for name in bundle.manifest.files:
            _link_or_copy(folder / name, copy / name)
        files = dict(bundle.manifest.files)
        for graph in {spec.file for spec in bundle.manifest.graphs.values()}:
            _rewrite(copy / graph)
            files[graph] = describe_file(copy / graph)
        (copy / MANIFEST_NAME).write_text(replace(bundle.manifest, files=files).to_json(), encoding="utf-8")
        yield copy


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _rewrite(graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    compute_in_float32(model.graph)
    graph.unlink()  # it may be a link to the bundle's own
    graph.write_bytes(model.SerializeToString())


def compute_in_float32(graph: onnx.GraphProto) -> None:
    """Quantised products of a graph and of its branches."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = FLOAT32_ACTIVATIONS
            if attribute.type == onnx.AttributeProto.GRAPH:
                compute_in_float32(attribute.g)


def in_arithmetic(model: onnx.ModelProto, arithmetic: Arithmetic) -> onnx.ModelProto:
    """The slice as it is, or for the tight gate of a quantised one with products that do not round their inputs."""
    if arithmetic is not Arithmetic.FLOAT32:
        return model
    exact = onnx.ModelProto()
    exact.CopyFrom(model)
    compute_in_float32(exact.graph)
    return exact
