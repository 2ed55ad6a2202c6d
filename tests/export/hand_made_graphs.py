"""Small graphs for the tests of graph passes: written as text, given weights, run."""

import re
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import preset_checkpoint
from cosmos_export.onnx.weights import WeightReader
from cosmos_export.recipe import ExportRecipe

Arrays = Mapping[str, np.ndarray]


def build(
    body: str,
    weights: Arrays,
    *,
    valued: bool = True,
    inputs: str = "int64[B, T] ids",
    output: str = "[B, T, N]",
    opset: int = 20,
    names: Mapping[str, str] | None = None,
) -> ir.Model:
    """A graph that returns y; those of `weights` that it reads are initializers, valued or not.

    `names` gives weights another name than the one in the text, which knows no dots.
    """
    read = {name: array for name, array in weights.items() if re.search(rf"\b{name}\b", body)}
    declared = [inputs, *(f"float{list(array.shape)} {name}" for name, array in read.items())]
    model = ir.from_onnx_text(
        f"""<ir_version: 9, opset_import: ["" : {opset}, "other" : 1, "com.microsoft" : 1]>
        g ({", ".join(declared)}) => (float{output} y) {{ {body} }}"""
    )
    for value in [value for value in model.graph.inputs if value.name in read]:
        model.graph.inputs.remove(value)
        name = value.name or ""
        value.name = (names or {}).get(name, name)
        value.const_value = ir.tensor(read[name], name=value.name) if valued else None
        model.graph.initializers.add(value)
    for i, node in enumerate(model.graph):
        node.name = f"node_{i}"
    return model


def attach(model: ir.Model, tensors: Arrays, recipe: ExportRecipe) -> None:
    """Gives each valueless initializer what export writes for it; `tensors` are a checkpoint's, by name."""
    values = {name: torch.from_numpy(array) for name, array in tensors.items()}
    checkpoint = Checkpoint.from_tensors(preset_checkpoint("beginner").config, values, {})
    reader = WeightReader(checkpoint, recipe)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            array = reader.read(name).numpy()
            assert (value.shape, value.dtype) == (ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)), name
            value.const_value = ir.tensor(array, name=name)


_RNG = np.random.default_rng(0)
# Of graphs that choose rows by a score: g scores them, w and v make what may be chosen.
CHOOSING = {
    "g": _RNG.standard_normal((4, 1)).astype(np.float32),
    "w": _RNG.standard_normal((4, 4)).astype(np.float32),
    "v": _RNG.standard_normal((4, 4)).astype(np.float32),
    "z": np.zeros(1, np.float32),
}


def choosing(body: str) -> ir.Model:
    """A graph of rows x (B, 4) whose weights, those of `CHOOSING` but z, have no values."""
    model = build(body, CHOOSING, inputs="float[B, 4] x", output="[B, 4]")
    for value in model.graph.initializers.values():
        if value.name != "z":
            value.const_value = None
    return model


def with_values(model: ir.Model) -> ir.Model:
    """The same graph, its weights valued."""
    for name, value in model.graph.initializers.items():
        value.const_value = ir.tensor(CHOOSING[name], name=name)
    return model


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_left_alone(graph_pass: ir.passes.PassBase, model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString()
    assert graph_pass(model).modified is False
    assert ir.to_proto(model).SerializeToString() == before
