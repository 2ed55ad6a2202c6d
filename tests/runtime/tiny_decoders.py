"""Tiny bundles with a key/value cache: one layer of grouped-query attention with random weights, and the same layer
without a cache as a full-sequence graph, both over the same initializers.

    B  batch    T  new tokens    N  tokens in all    L  cache length    K  kv heads    E  head_dim    D  width
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from cosmos_runtime import MANIFEST_NAME, GraphSpec, TensorSpec, describe_file

from .tiny_bundles import byte_tokenizer, make_manifest

VOCAB_SIZE, MAX_SEQUENCE_LENGTH = 257, 96
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WIDTH = HEADS * HEAD_DIM
CACHE_SHAPE = ("b", KV_HEADS, "l", HEAD_DIM)

FULL = GraphSpec(
    file="full.onnx",
    opset=20,
    inputs=(TensorSpec("ids", "tokens", "int64", ("b", "t")),),
    outputs=(TensorSpec("scores", "logits", "float32", ("b", "t", VOCAB_SIZE)),),
)
DECODER = GraphSpec(
    file="decoder.onnx",
    opset=20,
    inputs=(
        TensorSpec("ids", "tokens", "int64", ("b", "t")),
        TensorSpec("mask", "attention_mask", "int64", ("b", "n")),
        TensorSpec("back", "logit_offsets", "int64", ("wanted",)),
        TensorSpec("old.k", "past_key", "float32", CACHE_SHAPE),
        TensorSpec("old.v", "past_value", "float32", CACHE_SHAPE),
    ),
    outputs=(
        TensorSpec("scores", "logits", "float32", ("b", "wanted", VOCAB_SIZE)),
        TensorSpec("new.k", "present_key", "float32", CACHE_SHAPE),
        TensorSpec("new.v", "present_value", "float32", CACHE_SHAPE),
    ),
)


def write_decoder_bundle(
    folder: Path,
    *,
    graphs: Sequence[str] | Mapping[str, GraphSpec] = ("decoder",),
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a bundle with the named graphs into `folder`, with what the manifest says of them where that is to differ;
    `changes` replace sections of the manifest."""
    folder.mkdir()
    truth = {"decoder": DECODER, "full_sequence": FULL}
    specs = graphs if isinstance(graphs, Mapping) else {name: truth[name] for name in graphs}
    for name, spec in specs.items():
        onnx.save(_decoder(seed) if name == "decoder" else _full_sequence(seed), folder / spec.file)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    files = {path.name: describe_file(path) for path in sorted(folder.iterdir())}
    model = {
        "vocab_size": VOCAB_SIZE,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "causal": True,
        "head": "lm",
        "parameters": 1,
    }
    manifest = make_manifest(files, VOCAB_SIZE, **{"model": model, "graphs": specs, **changes})
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def _full_sequence(seed: int) -> onnx.ModelProto:
    nodes = [
        _node("Shape", ["ids"], "ids.shape"),
        helper.make_node(
            "ConstantOfShape", ["ids.shape"], ["mask"], value=helper.make_tensor("", TensorProto.INT64, [1], [1])
        ),
        *_layer(past=("", ""), present=("", "")),
        _node("MatMul", ["hidden", "head"], "scores"),
    ]
    return _model(nodes, FULL, seed, {})


def _decoder(seed: int) -> onnx.ModelProto:
    """The layer on top of a cache, then the rows of `hidden` that lie `back` before each row's last token."""
    nodes = [
        *_layer(past=("old.k", "old.v"), present=("new.k", "new.v")),
        _node("Shape", ["ids"], "ids.shape"),
        _node("Gather", ["ids.shape", "zero"], "batch"),
        _node("Gather", ["ids.shape", "one"], "length"),
        _node("Sub", ["total", "length"], "before"),
        _node("Sub", ["last_of_all", "before"], "last"),  # (B,)
        _node("Max", ["last", "zero"], "last.clamped"),
        _node("Unsqueeze", ["last.clamped", "axis1"], "last.column"),
        _node("Sub", ["last.column", "back"], "wanted"),  # (B, n)
        _node("Max", ["wanted", "zero"], "wanted.clamped"),
        _node("Range", ["zero", "batch", "one"], "rows"),
        _node("Mul", ["rows", "length"], "rows.first"),
        _node("Unsqueeze", ["rows.first", "axis1"], "rows.column"),
        _node("Add", ["wanted.clamped", "rows.column"], "places"),
        _node("Reshape", ["hidden", "flat"], "hidden.flat"),  # (B * T, D)
        _node("Gather", ["hidden.flat", "places"], "hidden.wanted"),
        _node("MatMul", ["hidden.wanted", "head"], "scores"),
    ]
    return _model(nodes, DECODER, seed, {"back": np.zeros(1, np.int64)})


def _layer(past: tuple[str, str], present: tuple[str, str]) -> list[NodeProto]:
    """ids and mask (B, N) to hidden (B, T, D): embedding, attention with rotary embedding, residual."""
    return [
        _node("Gather", ["embedding", "ids"], "embedded"),
        *(_node("MatMul", ["embedded", f"weight.{part}"], part) for part in "qkv"),
        _node("ReduceSum", ["mask", "axis1"], "tokens", keepdims=0),
        _node("Sub", ["tokens", "one"], "last_of_all"),
        _node("Cast", ["last_of_all"], "seqlens_k", to=TensorProto.INT32),
        _node("Shape", ["mask"], "mask.shape"),
        _node("Gather", ["mask.shape", "one"], "total"),
        _node("Cast", ["total"], "total_sequence_length", to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", *past, "seqlens_k", "total_sequence_length", "cos", "sin"],
            ["attended", *present],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        ),
        _node("Add", ["embedded", "attended"], "hidden"),
    ]


def _model(nodes: list[NodeProto], spec: GraphSpec, seed: int, defaults: dict[str, np.ndarray]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [_value(tensor) for tensor in spec.inputs],
        [_value(tensor) for tensor in spec.outputs],
        [numpy_helper.from_array(value, name) for name, value in {**_weights(seed), **defaults}.items()],
    )
    opsets = [helper.make_opsetid("", spec.opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return rng.normal(0, 1, shape).astype(np.float32) * np.float32(shape[0] ** -0.5)

    angles = np.arange(MAX_SEQUENCE_LENGTH)[:, None] / 100.0 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return {
        "embedding": random(VOCAB_SIZE, WIDTH) * np.float32(VOCAB_SIZE**0.5),
        "weight.q": 3 * random(WIDTH, WIDTH),
        "weight.k": random(WIDTH, KV_HEADS * HEAD_DIM),
        "weight.v": 3 * random(WIDTH, KV_HEADS * HEAD_DIM),
        "head": random(WIDTH, VOCAB_SIZE),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "axis1": np.array([1], np.int64),
        "flat": np.array([-1, WIDTH], np.int64),
    }


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, [output], **attributes)


def _value(tensor: TensorSpec) -> ValueInfoProto:
    dtype = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}[tensor.dtype]
    return helper.make_tensor_value_info(tensor.name, dtype, tensor.shape)
