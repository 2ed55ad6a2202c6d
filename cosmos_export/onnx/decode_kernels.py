"""Tells the runtime's decoding kernels where a graph's weights lie, if the model has a shape that they can take."""

from __future__ import annotations

from pathlib import Path

import onnx

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.onnx.quantize import Quantization
from cosmos_export.onnx.signature import ROTARY_COS, ROTARY_SIN, quantized_name, weights_file
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import DECODER, KERNELS_NAME, KernelSpec, LayerWeights, StoredMatrix, StoredTensor

# Initializers from this size on lie in the weights file: norms of the smallest models, too, but no shapes.
EXTERNAL_FROM_BYTES = 64

_DTYPES = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16", onnx.TensorProto.UINT8: "uint8"}
_HEAD_DIMS, _MOST_HEADS_OF_ONE = (32, 64, 128, 256), 8
# What quantised matrices may be: blocks for each number of bits, so that a lane's 16 bytes share one scale.
_BLOCKS = {8: (32,), 4: (32, 64)}
_WARP_LANES, _LANE_BITS, _TILE_ROWS = 4, 128, 8


def why_not(config: CosmosAdvancedConfig, recipe: ExportRecipe) -> str | None:
    """What keeps the kernels from decoding a model exported by a recipe; None where nothing does."""
    if recipe.activations not in ("float16", "bfloat16"):
        return f"activations are {recipe.activations}"
    if config.head_dim not in _HEAD_DIMS:
        return f"head_dim {config.head_dim} is none of {', '.join(map(str, _HEAD_DIMS))}"
    if config.n_heads // config.n_kv_heads > _MOST_HEADS_OF_ONE:
        return f"more than {_MOST_HEADS_OF_ONE} heads share a key/value head"
    for name, (rows, columns) in _matrices(config).items():
        form = recipe.embedding if name == "embedding" else recipe.quantization
        reason = _misfit(rows, columns, form, recipe.activations)
        if reason is not None:
            return f"{name} ({rows}, {columns}): {reason}"
    return "single projections are quantised in other ways" if recipe.overrides else None


def write_decode_kernels(folder: Path, graph_file: str, config: CosmosAdvancedConfig, recipe: ExportRecipe) -> None:
    """Writes `KERNELS_NAME` beside a decoder graph that has been written. Precondition: `why_not` has no reason."""
    stored = _stored(folder / graph_file)
    layers = tuple(_layer(stored, f"layers.{index}", recipe.quantization) for index in range(config.n_layers))
    spec = KernelSpec(
        file=weights_file(DECODER),
        dtype=recipe.activations,
        dim=config.dim,
        heads=config.n_heads,
        kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        hidden_dim=config.hidden_dim,
        vocab_size=config.vocab_size,
        norm_eps=config.norm_eps,
        embedding=_matrix(stored, "tok_embeddings.weight", recipe.embedding),
        norm=stored["norm.weight"],
        cos=stored[ROTARY_COS],
        sin=stored[ROTARY_SIN],
        layers=layers,
    )
    (folder / KERNELS_NAME).write_text(spec.to_json(), encoding="utf-8")


def _matrices(config: CosmosAdvancedConfig) -> dict[str, tuple[int, int]]:
    width = config.n_heads * config.head_dim
    return {
        "embedding": (config.vocab_size, config.dim),
        "qkv": (width + 2 * config.n_kv_heads * config.head_dim, config.dim),
        "out": (config.dim, width),
        "gate_up": (config.hidden_dim, config.dim),
        "down": (config.dim, config.hidden_dim),
    }


def _misfit(rows: int, columns: int, form: Quantization | None, activations: str) -> str | None:
    bits = 16 if form is None else form.bits
    multiple = _WARP_LANES * _LANE_BITS // bits
    if rows % _TILE_ROWS or columns % multiple:
        return f"rows are no multiple of {_TILE_ROWS}, or columns none of {multiple}"
    if form is None:
        return None
    if activations != "float16" or not form.symmetric or form.block_size not in _BLOCKS.get(bits, ()):
        return f"{bits} bits in blocks of {form.block_size} with {activations} activations"
    return None


def _stored(graph: Path) -> dict[str, StoredTensor]:
    """Every initializer in the weights file, by name."""
    found = {}
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.data_type in _DTYPES:
            place = {entry.key: entry.value for entry in tensor.external_data}
            dtype = _DTYPES[tensor.data_type]
            found[tensor.name] = StoredTensor(tensor.name, dtype, tuple(tensor.dims), int(place.get("offset", 0)))
    return found


def _layer(stored: dict[str, StoredTensor], layer: str, form: Quantization | None) -> LayerWeights:
    return LayerWeights(
        norm1=stored[f"{layer}.norm1.weight"],
        qkv=_matrix(stored, f"{layer}.attention.qkv_proj.weight", form),
        out=_matrix(stored, f"{layer}.attention.o_proj.weight", form),
        norm2=stored[f"{layer}.norm2.weight"],
        gate_up=_matrix(stored, f"{layer}.feed_forward.w1_w3.weight", form),
        down=_matrix(stored, f"{layer}.feed_forward.w2.weight", form),
    )


def _matrix(stored: dict[str, StoredTensor], name: str, form: Quantization | None) -> StoredMatrix:
    if form is None:
        return StoredMatrix(stored[name], None, bits=16, block=0)
    values, scales = stored[quantized_name(name, "blocks")], stored[quantized_name(name, "scales")]
    return StoredMatrix(values, scales, bits=form.bits, block=form.block_size)
