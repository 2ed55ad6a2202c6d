"""Which of a bundle's weights the decoding kernels read, and where they lie: `decode_kernels.json`.

    D  dim    H  heads    K  key/value heads    E  head_dim    F  hidden_dim    V  vocab_size    S  max_sequence_length

The file lies beside the graph and its weights, in bundles for GPUs whose shape the kernels can take. Nothing is stored
twice: it says at which byte of the weights file a tensor begins.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cosmos_runtime.binding import item_size
from cosmos_runtime.errors import BundleError
from cosmos_runtime.json_fields import Fields, parse_object

KERNELS_NAME = "decode_kernels.json"
VERSION = 1
# Rows of a batch that the kernels take together.
MOST_ROWS = 8


@dataclass(frozen=True)
class StoredTensor:
    """An initializer of the graph, and the byte of the weights file at which it begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape)) * item_size(self.dtype)


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (N, C), row by row, of 16-bit numbers; or of 8- or 4-bit levels with a scale for every `block` columns,
    in the layout of com.microsoft::MatMulNBits (symmetric, so that there are no zero points)."""

    values: StoredTensor
    scales: StoredTensor | None
    bits: int
    block: int


@dataclass(frozen=True)
class LayerWeights:
    """Norms (D,); queries, keys and values one above the other ((H + 2 K) * E, D); the attention's output (D, H * E);
    gate above up (2 F, D); down (D, F)."""

    norm1: StoredTensor
    qkv: StoredMatrix
    out: StoredMatrix
    norm2: StoredTensor
    gate_up: StoredMatrix
    down: StoredMatrix


@dataclass(frozen=True)
class KernelSpec:
    """Everything that the kernels need to know of a bundle. `dtype` is the 16-bit type of activations and cache.

    embedding (V, D) is the output projection, too; cos and sin are (S, E / 2).
    """

    file: str
    dtype: str
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    embedding: StoredMatrix
    norm: StoredTensor
    cos: StoredTensor
    sin: StoredTensor
    layers: tuple[LayerWeights, ...]

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor, once."""
        yield from (self.norm, self.cos, self.sin)
        for layer in self.layers:
            yield from (layer.norm1, layer.norm2)
        matrices = [self.embedding]
        matrices += [m for layer in self.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        for matrix in matrices:
            yield matrix.values
            if matrix.scales is not None:
                yield matrix.scales

    def to_json(self) -> str:
        """The document of `from_json`."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "KernelSpec":
        """Raises: BundleError that names the first key that is wrong."""
        fields = parse_object(text, KERNELS_NAME)
        if fields.integer("version", minimum=1) > VERSION:
            raise BundleError(
                f"{KERNELS_NAME}: version: this runtime reads up to {VERSION}, got {fields.value('version')}; upgrade "
                f"it with: pip install --upgrade cosmos-export"
            )
        sizes = ("dim", "heads", "kv_heads", "head_dim", "hidden_dim", "vocab_size")
        return cls(
            file=fields.text("file"),
            dtype=fields.text("dtype", pattern="float16|bfloat16", expected="'float16' or 'bfloat16'"),
            norm_eps=_number(fields, "norm_eps"),
            embedding=_matrix(fields.object("embedding")),
            norm=_tensor(fields.object("norm")),
            cos=_tensor(fields.object("cos")),
            sin=_tensor(fields.object("sin")),
            layers=tuple(_layer(item) for item in fields.objects("layers")),
            **{size: fields.integer(size, minimum=1) for size in sizes},
        )


def _layer(fields: Fields) -> LayerWeights:
    return LayerWeights(
        norm1=_tensor(fields.object("norm1")),
        qkv=_matrix(fields.object("qkv")),
        out=_matrix(fields.object("out")),
        norm2=_tensor(fields.object("norm2")),
        gate_up=_matrix(fields.object("gate_up")),
        down=_matrix(fields.object("down")),
    )


def _matrix(fields: Fields) -> StoredMatrix:
    scales = fields.optional_object("scales")
    return StoredMatrix(
        values=_tensor(fields.object("values")),
        scales=None if scales is None else _tensor(scales),
        bits=fields.integer("bits", minimum=4),
        block=fields.integer("block", minimum=0),
    )


def _tensor(fields: Fields) -> StoredTensor:
    shape = fields.value("shape")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
        fields.fail("shape", "a list of sizes", shape)
    dtypes = "float16|bfloat16|uint8"
    return StoredTensor(
        name=fields.text("name"),
        dtype=fields.text("dtype", pattern=dtypes, expected="float16, bfloat16 or uint8"),
        shape=tuple(shape),
        offset=fields.integer("offset", minimum=0),
    )


def _number(fields: Fields, key: str) -> float:
    value: Any = fields.value(key)
    if not isinstance(value, float) or not 0 < value < 1:
        fields.fail(key, "a number between 0 and 1", value)
    return float(value)
