"""Tiny bundles whose greedy answer is known: a graph in which every token has one likeliest successor.

logits(token) = one_hot(token) @ table, with `table[token, successor]` far above the rest; the table is external data.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cosmos_runtime import MANIFEST_NAME, FileEntry, GraphSpec, Manifest, TensorSpec, describe_file

MAX_SEQUENCE_LENGTH = 32
END = "<|end|>"

BundleFactory = Callable[..., Path]


def byte_tokenizer() -> Tokenizer:
    """One token for each of the 256 bytes, and an end token (id 256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def chain(text: str) -> dict[int, int]:
    """Successors that make the model write `text` from its first byte on; no byte may occur twice."""
    ids = byte_tokenizer().encode(text).ids
    assert len(set(ids)) == len(ids), "each byte can have one successor only"
    return dict(itertools.pairwise(ids))


def successor_table(vocab_size: int, successors: Mapping[int, int]) -> np.ndarray:
    """Random logits below 1 with 10 at each successor (id + 1 where none is given): (V, V) float32."""
    table = np.random.default_rng(0).random((vocab_size, vocab_size), dtype=np.float32)
    for token in range(vocab_size):
        table[token, successors.get(token, (token + 1) % vocab_size)] = 10.0
    return table


def write_graph(
    path: Path, table: np.ndarray, dtype: int = TensorProto.FLOAT, sequence: int | str = "sequence"
) -> None:
    """ids (B, T) -> one-hot rows (B, T, V) -> logits (B, T, V), with odd names to show that roles are what counts."""
    vocab_size = len(table)
    numpy_dtype = helper.tensor_dtype_to_np_dtype(dtype)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["embedding", "some_ids"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "table"], ["some_logits"]),
        ],
        "successors",
        [helper.make_tensor_value_info("some_ids", TensorProto.INT64, ["batch", sequence])],
        [helper.make_tensor_value_info("some_logits", dtype, ["batch", sequence, vocab_size])],
        [
            numpy_helper.from_array(np.eye(vocab_size, dtype=numpy_dtype), "embedding"),
            numpy_helper.from_array(table.astype(numpy_dtype), "table"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=64)


def graph_spec(vocab_size: int, dtype: str = "float32", sequence: int | str = "sequence") -> GraphSpec:
    return GraphSpec(
        file="model.onnx",
        opset=20,
        inputs=(TensorSpec("some_ids", "tokens", "int64", ("batch", sequence)),),
        outputs=(TensorSpec("some_logits", "logits", dtype, ("batch", sequence, vocab_size)),),
    )


def make_manifest(files: Mapping[str, FileEntry], vocab_size: int, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "name": "tiny",
        "created": "2026-11-22T13:00:00Z",
        "tool": {"name": "cosmos-export", "version": "0.1.0"},
        "versions": {"onnx": onnx.__version__},
        "source": {"kind": "preset", "location": "tiny", "seed": 0},
        "recipe": {"name": "cpu-fp32", "precision": "fp32", "dialect": "portable"},
        "model": {
            "vocab_size": vocab_size,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "causal": True,
            "head": "lm",
            "parameters": vocab_size**2,
        },
        "generation": {},
        "graphs": {"full_sequence": graph_spec(vocab_size)},
        "tokenizer": "tokenizer.json" if "tokenizer.json" in files else None,
        "files": dict(files),
        "parity": {"passed": True, "max_abs": 0.0},
    }
    return Manifest(**{**values, **changes})


def encode(text: str) -> Sequence[int]:
    ids: list[int] = byte_tokenizer().encode(text).ids
    return ids


def write_bundle(
    folder: Path,
    successors: Mapping[int, int] | None = None,
    *,
    tokenizer: bool = True,
    vocab_size: int = 257,
    table: np.ndarray | None = None,
    onnx_dtype: int = TensorProto.FLOAT,
    sequence: int | str = "sequence",
    **changes: Any,
) -> Path:
    """Write a bundle into `folder`; `changes` replace sections of its manifest."""
    folder.mkdir()
    table = successor_table(vocab_size, successors or {}) if table is None else table
    write_graph(folder / "model.onnx", table, onnx_dtype, sequence)
    if tokenizer:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
    files = {path.name: describe_file(path) for path in sorted(folder.iterdir())}
    text = make_manifest(files, vocab_size, **changes).to_json()
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return folder
