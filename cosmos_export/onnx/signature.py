"""Every name in an exported graph: inputs, outputs, axes, initializers. They reach the runtime through the manifest.

batch B    sequence T    total_sequence N    cache_length L    num_logits n    V  vocab_size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ExportError
from cosmos_export.onnx.head_signature import ENDS_CALL, WANTS_SCORES, head_tensors
from cosmos_runtime import DECODER, FULL_SEQUENCE, GraphSpec, Role, TensorSpec

# Axes.
BATCH, SEQUENCE, TOTAL_SEQUENCE, CACHE_LENGTH, NUM_LOGITS = (
    "batch",
    "sequence",
    "total_sequence",
    "cache_length",
    "num_logits",
)

# Inputs and outputs; the decoder's are those that onnxruntime-genai looks for.
INPUT_IDS, ATTENTION_MASK, LOGIT_OFFSETS, LOGITS = "input_ids", "attention_mask", "logit_offsets", "logits"
LAST_INDEX, TOTAL_LENGTH, LOGIT_ROWS = "last_index", "total_length", "logit_rows"
PAST, PRESENT = "past_key_values.{layer}.{part}", "present.{layer}.{part}"

# Inputs that may be left out, and what they are then. The decoder's logits are those of the last position, and with
# capability heads a run is a call, of which all is told.
DEFAULT_INPUTS: dict[str, list[int] | list[bool]] = {LOGIT_OFFSETS: [0], ENDS_CALL: [True], WANTS_SCORES: [True]}

# Initializers carry the name of the checkpoint tensor that they hold. One that is stored transposed, (in, out) instead
# of torch's (out, in), says so in its name.
TRANSPOSED = ".transposed"
ROTARY_COS, ROTARY_SIN = "rope.cos", "rope.sin"

# Matrices of capability heads that are read together are called what they hold, with this between.
STACKED = "+"

# A quantised matrix is these initializers (see `quantize.QuantizedMatrix`).
QuantizedPart = Literal["blocks", "scales", "zero_points"]

# Projections that one product can do together, by the name of the matrix that holds theirs side by side.
PACKED_PROJECTIONS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "w1_w3": ("w1", "w3")}


def graph_file(graph: str) -> str:
    """The ONNX file of a graph within its bundle."""
    return {FULL_SEQUENCE: "model.onnx", DECODER: "model.onnx"}[graph]


def weights_file(graph: str) -> str:
    """The external-data file of a graph within its bundle."""
    return f"{graph_file(graph)}.data"


def graph_spec(
    graph: str,
    config: CosmosAdvancedConfig,
    opset: int | None,
    *,
    activations: str = "float32",
    by_lengths: bool = False,
    capabilities: Sequence[str] | None = None,
    on_demand: bool = False,
) -> GraphSpec:
    """Signature of one of a recipe's graphs, whose cache has the type `activations`.

    `by_lengths` is the decoder of a device loop: told lengths instead of a mask, logits (n, V) of chosen rows.
    `capabilities` are those of a model with heads, perhaps none; None is the plain decoder. With `on_demand`, a decoder
    with heads computes scores that nothing but a report reads where a run wants them.
    Raises ExportError for a graph that this version does not know.
    """
    if graph not in (FULL_SEQUENCE, DECODER):
        raise ExportError(f"no signature for a graph {graph!r}; there is: {FULL_SEQUENCE}, {DECODER}")
    inputs, outputs = _full_sequence(config)
    if graph == DECODER:
        inputs, outputs = _decoder_by_lengths(config) if by_lengths else _decoder(config)
        past, present = _cache(config, activations)
        inputs, outputs = [*inputs, *past], [*outputs, *present]
    if capabilities is not None:
        decoder = graph == DECODER
        given, kept = head_tensors(
            config,
            capabilities,
            batch=BATCH,
            activations=activations,
            with_query=decoder,
            on_demand=on_demand and decoder and bool(capabilities),
        )
        inputs, outputs = [*inputs, *given], [*outputs, *kept]
    return GraphSpec(file=graph_file(graph), opset=opset, inputs=tuple(inputs), outputs=tuple(outputs))


def _full_sequence(config: CosmosAdvancedConfig) -> tuple[list[TensorSpec], list[TensorSpec]]:
    length = SEQUENCE if config.max_sequence_length > 1 else 1  # torch.export has no axis of one possible size
    return (
        [TensorSpec(INPUT_IDS, Role.TOKENS, "int64", (BATCH, length))],
        [TensorSpec(LOGITS, Role.LOGITS, "float32", (BATCH, length, config.vocab_size))],
    )


def _decoder(config: CosmosAdvancedConfig) -> tuple[list[TensorSpec], list[TensorSpec]]:
    inputs = [
        TensorSpec(INPUT_IDS, Role.TOKENS, "int64", (BATCH, SEQUENCE)),
        TensorSpec(ATTENTION_MASK, Role.ATTENTION_MASK, "int64", (BATCH, TOTAL_SEQUENCE)),
        TensorSpec(LOGIT_OFFSETS, Role.LOGIT_OFFSETS, "int64", (NUM_LOGITS,)),
    ]
    return inputs, [TensorSpec(LOGITS, Role.LOGITS, "float32", (BATCH, NUM_LOGITS, config.vocab_size))]


def _decoder_by_lengths(config: CosmosAdvancedConfig) -> tuple[list[TensorSpec], list[TensorSpec]]:
    inputs = [
        TensorSpec(INPUT_IDS, Role.TOKENS, "int64", (BATCH, SEQUENCE)),
        TensorSpec(LAST_INDEX, Role.LAST_INDEX, "int32", (BATCH,)),
        TensorSpec(TOTAL_LENGTH, Role.TOTAL_LENGTH, "int32", ()),
        TensorSpec(LOGIT_ROWS, Role.LOGIT_ROWS, "int64", (NUM_LOGITS,)),
    ]
    return inputs, [TensorSpec(LOGITS, Role.LOGITS, "float32", (NUM_LOGITS, config.vocab_size))]


def _cache(config: CosmosAdvancedConfig, dtype: str) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Past and present, key and value, of every layer."""
    shape = (BATCH, config.n_kv_heads, CACHE_LENGTH, config.head_dim)
    past, present = [], []
    for layer in range(config.n_layers):
        for part, old, new in (
            ("key", Role.PAST_KEY, Role.PRESENT_KEY),
            ("value", Role.PAST_VALUE, Role.PRESENT_VALUE),
        ):
            past.append(TensorSpec(PAST.format(layer=layer, part=part), old, dtype, shape))
            present.append(TensorSpec(PRESENT.format(layer=layer, part=part), new, dtype, shape))
    return past, present


def stored_transposed(name: str) -> str:
    """Name of the initializer that holds the checkpoint tensor `name` transposed."""
    return name + TRANSPOSED


def source_of(initializer: str) -> tuple[str, bool]:
    """The tensor that an initializer holds (a checkpoint name or a rotary table), and whether it is transposed."""
    return initializer.removesuffix(TRANSPOSED), initializer.endswith(TRANSPOSED)


def quantized_name(source: str, part: QuantizedPart) -> str:
    """Name of the initializer that holds one part of the quantised form of `source`."""
    return f"{source}.{part}"


def quantized_part(initializer: str) -> tuple[str, QuantizedPart | None]:
    """The matrix that an initializer holds a part of in quantised form, and which; (itself, None) for any other."""
    for part in get_args(QuantizedPart):
        if initializer.endswith(f".{part}"):
            return initializer.removesuffix(f".{part}"), part
    return initializer, None


def stacked(sources: Sequence[str]) -> str:
    """Name of what holds several tensors one above the other."""
    return STACKED.join(sources)


def parts_of(source: str) -> tuple[str, ...]:
    """The tensors of the model that `source` holds one above the other: itself, unless it is packed or stacked."""
    if STACKED in source:
        return tuple(source.split(STACKED))
    for packed, parts in PACKED_PROJECTIONS.items():
        if f".{packed}." in source:
            return tuple(source.replace(f".{packed}.", f".{part}.") for part in parts)
    return (source,)
