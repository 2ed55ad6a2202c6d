"""Every name in an exported graph: inputs, outputs, axes, initializers. They reach the runtime through the manifest.

batch B    sequence T    V  vocab_size
"""

from __future__ import annotations

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ExportError
from cosmos_runtime import FULL_SEQUENCE, GraphSpec, Role, TensorSpec

BATCH, SEQUENCE = "batch", "sequence"
INPUT_IDS, LOGITS = "input_ids", "logits"

# Initializers carry the name of the checkpoint tensor that they hold. One that is stored transposed, (in, out) instead
# of torch's (out, in), says so in its name.
TRANSPOSED = ".transposed"
ROTARY_COS, ROTARY_SIN = "rope.cos", "rope.sin"


def graph_file(graph: str) -> str:
    """The ONNX file of a graph within its bundle."""
    return {FULL_SEQUENCE: "model.onnx"}[graph]


def weights_file(graph: str) -> str:
    """The external-data file of a graph within its bundle."""
    return f"{graph_file(graph)}.data"


def graph_spec(graph: str, config: CosmosAdvancedConfig, opset: int) -> GraphSpec:
    """Signature of one of a recipe's graphs. Raises ExportError for a graph that this version does not know."""
    if graph != FULL_SEQUENCE:
        raise ExportError(f"no signature for a graph {graph!r}; there is: {FULL_SEQUENCE}")
    length = SEQUENCE if config.max_sequence_length > 1 else 1  # torch.export has no axis of one possible size
    return GraphSpec(
        file=graph_file(graph),
        opset=opset,
        inputs=(TensorSpec(INPUT_IDS, Role.TOKENS, "int64", (BATCH, length)),),
        outputs=(TensorSpec(LOGITS, Role.LOGITS, "float32", (BATCH, length, config.vocab_size)),),
    )


def stored_transposed(name: str) -> str:
    """Name of the initializer that holds the checkpoint tensor `name` transposed."""
    return name + TRANSPOSED


def source_of(initializer: str) -> tuple[str, bool]:
    """The tensor that an initializer holds (a checkpoint name or a rotary table), and whether it is transposed."""
    return initializer.removesuffix(TRANSPOSED), initializer.endswith(TRANSPOSED)
