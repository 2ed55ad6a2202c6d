"""Faults made in bundles: a graph is changed and sealed again, or numbers in the stored tensors are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, helper, numpy_helper

from cosmos_export.pipeline import ExportedBundle
from cosmos_runtime import MANIFEST_NAME, Manifest, describe_file, graph_operators

GraphFault = Callable[[GraphProto], None]
TensorFault = Callable[[np.ndarray], None]


def nodes_of(graph: GraphProto, operator: str) -> list[NodeProto]:
    nodes = [node for node in graph.node if node.op_type == operator]
    assert nodes
    return nodes


def attribute_of(node: NodeProto, name: str) -> AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def _copy(bundle: ExportedBundle, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the bundle's folder, and its graph's file."""
    folder = tmp_path / "faulty"
    shutil.copytree(bundle.path, folder)
    return folder, folder / next(iter(bundle.manifest.graphs.values())).file


def with_graph_fault(bundle: ExportedBundle, tmp_path: Path, fault: GraphFault) -> Path:
    """A copy of the bundle whose graph was changed, sealed again."""
    folder, path = _copy(bundle, tmp_path)
    model = onnx.load(path, load_external_data=False)
    fault(model.graph)
    path.write_bytes(model.SerializeToString())
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    files = {**manifest.files, path.name: describe_file(path)}
    sealed = replace(manifest, files=files, operators=graph_operators([path]))
    (folder / MANIFEST_NAME).write_text(sealed.to_json(), encoding="utf-8")
    return folder


def with_tensor_fault(bundle: ExportedBundle, tmp_path: Path, name: str, perturb: TensorFault) -> Path:
    """A copy of the bundle in which one initializer was changed, in the external data or in the graph's file."""
    folder, path = _copy(bundle, tmp_path)
    model = onnx.load(path, load_external_data=False)
    initializer = next(i for i in model.graph.initializer if i.name == name)
    dtype = helper.tensor_dtype_to_np_dtype(initializer.data_type)
    if not initializer.external_data:
        values = numpy_helper.to_array(initializer).copy()
        perturb(values)
        initializer.CopyFrom(numpy_helper.from_array(values, name))
        path.write_bytes(model.SerializeToString())
        return folder
    entry = {e.key: e.value for e in initializer.external_data}
    place = folder / entry["location"]
    mapped = np.memmap(place, dtype, "r+", offset=int(entry["offset"]), shape=tuple(initializer.dims))
    perturb(mapped)
    mapped.flush()
    return folder
