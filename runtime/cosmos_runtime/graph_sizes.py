"""Does a graph hold what its manifest's numbers promise? Shapes tell; no weights are read, nothing is loaded.

    S  max_sequence_length    V  vocab_size    B  batch    K  key/value heads    L  cache length    E  head_dim

A manifest that says more than its graph has would only be found out by the request that goes that far.
"""

from collections.abc import Iterator
from pathlib import Path

from cosmos_runtime.errors import BundleError
from cosmos_runtime.graph_file import GraphContents
from cosmos_runtime.manifest import MANIFEST_NAME, GraphSpec, Manifest, Role

# The rotary tables (S, E/2) by the names that exports give them, and where ONNX Runtime's attention reads them.
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
_ROTARY_TABLES = ("rope.cos", "rope.sin")
_ROTARY_INPUTS = slice(7, 9)

_CURE = "the bundle was altered, or its parts are of two exports: copy it again or export it again"


def check_sizes(path: Path, contents: GraphContents, graph: GraphSpec, manifest: Manifest) -> None:
    """Compare the manifest's `model` with the tables of the graph at `path`, and with the caches that `graph` has.

    Raises: BundleError naming the number, what the manifest says and what the graph has.
    """
    for name in sorted(_position_tables(contents)):
        rows = contents.initializers[name][0]
        if rows < manifest.max_sequence_length:
            _fail(path, "max_sequence_length", manifest.max_sequence_length, f"{name!r} has {rows:,} positions")
    for name in sorted(_token_tables(contents, graph)):
        rows = contents.initializers[name][0]
        if rows != manifest.vocab_size:
            _fail(path, "vocab_size", manifest.vocab_size, f"{name!r} has {rows:,} tokens")
    for key, has in _sizes_of_states(graph):
        promised = manifest.model.get(key)
        if promised is not None and promised != has:
            _fail(path, key, promised, f"its caches or memory have {has:,}")


def _position_tables(contents: GraphContents) -> set[str]:
    """Initializers with a row a position."""
    read = (inputs[_ROTARY_INPUTS] for operator, inputs in contents.readers if operator == "GroupQueryAttention")
    names = {*_ROTARY_TABLES, *(name for both in read for name in both)}
    return {name for name in names if contents.initializers.get(name)}


def _token_tables(contents: GraphContents, graph: GraphSpec) -> set[str]:
    """Initializers of which the tokens that the graph is given pick rows: the embedding."""
    tokens = {tensor.name for tensor in graph.inputs if tensor.role == Role.TOKENS}
    picked = (inputs for operator, inputs in contents.readers if operator in ("Gather", "GatherBlockQuantized"))
    return {
        inputs[0] for inputs in picked if inputs[1:2] and inputs[1] in tokens and contents.initializers.get(inputs[0])
    }


def _sizes_of_states(graph: GraphSpec) -> Iterator[tuple[str, int]]:
    """Keys of the manifest's `model`, and what the inputs (B, K, L, E) and (B, slots, dim) say they are."""
    keys = [tensor.shape for tensor in graph.inputs if tensor.role == Role.PAST_KEY]
    if keys:
        yield "n_layers", len(keys)
    axes = [("n_kv_heads", shape[1:2]) for shape in keys] + [("head_dim", shape[3:4]) for shape in keys]
    axes += [("dim", tensor.shape[2:3]) for tensor in graph.inputs if tensor.role == Role.PAST_MEMORY_KEYS]
    for key, sizes in axes:
        for size in sizes:
            if isinstance(size, int):
                yield key, size


def _fail(path: Path, key: str, promised: object, has: str) -> None:
    raise BundleError(f"{path}: {MANIFEST_NAME} says model.{key} {promised}, and {has}; {_CURE}")
