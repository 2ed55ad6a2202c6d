"""Does a loaded graph have the inputs and outputs that the manifest promises?"""

from collections.abc import Iterable, Sequence, Set
from typing import Protocol

from cosmos_runtime.cache import CACHE_PARTS, cache_pairs
from cosmos_runtime.errors import BundleError
from cosmos_runtime.head_signature import HEAD_INPUTS
from cosmos_runtime.manifest import GraphSpec, Role, TensorSpec

_ORT_DTYPES = {"float": "float32", "double": "float64"}

_CACHE_INPUTS = {Role.PAST_KEY, Role.PAST_VALUE}
_BY_MASK = {Role.TOKENS, Role.ATTENTION_MASK, Role.LOGIT_OFFSETS}
_BY_LENGTHS = {Role.TOKENS, Role.LAST_INDEX, Role.TOTAL_LENGTH, Role.LOGIT_ROWS}
_CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8", "uint8")


class _NodeArg(Protocol):
    """What ONNX Runtime tells about one input or output."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class _Session(Protocol):
    def get_inputs(self) -> Iterable[_NodeArg]: ...
    def get_overridable_initializers(self) -> Iterable[_NodeArg]: ...
    def get_outputs(self) -> Iterable[_NodeArg]: ...


def check_signature(session: _Session, graph: GraphSpec) -> None:
    """Compare names, types, ranks and fixed sizes. Raises: BundleError naming the tensor that differs."""
    try:
        _check_tensors(_inputs(session, graph), graph.inputs, f"{graph.file}: inputs")
        _check_tensors(session.get_outputs(), graph.outputs, f"{graph.file}: outputs")
    except UnicodeDecodeError as error:  # ONNX Runtime takes any bytes for a name
        raise BundleError(f"{graph.file}: a name in it is not UTF-8: {error}; export the bundle again") from error


def check_full_sequence(graph: GraphSpec, vocab_size: int) -> None:
    """Check that this runtime can run `graph`: token ids (B, T) int64 in, logits (B, T, V) out, nothing else in but
    what capability heads keep (see `check_heads`).

    Raises: BundleError saying what differs.
    """
    _expect_roles(graph, {Role.TOKENS} | HEAD_INPUTS)
    _check_tokens_and_logits(graph, vocab_size)


def check_decoder(graph: GraphSpec, vocab_size: int) -> None:
    """Check that this runtime can run `graph`: also mask and logit offsets, or lengths and logit rows, and a cache
    (B, K, L, E) a layer and part, which the graph continues without a change of type or shape, for any number of
    tokens.

    Raises: BundleError saying what differs.
    """
    by_lengths = any(tensor.role == Role.LAST_INDEX for tensor in graph.inputs)
    _expect_roles(graph, (_BY_LENGTHS if by_lengths else _BY_MASK | HEAD_INPUTS) | _CACHE_INPUTS)
    _check_tokens_and_logits(graph, vocab_size, rank=2 if by_lengths else 3)
    _check_lengths(graph) if by_lengths else _check_mask(graph)
    _check_cache(graph)
    _expect_dynamic_length(graph, graph.input(Role.TOKENS))


def _check_mask(graph: GraphSpec) -> None:
    _expect(graph, graph.input(Role.ATTENTION_MASK), ("int64",), rank=2)
    _expect(graph, graph.input(Role.LOGIT_OFFSETS), ("int64",), rank=1)
    _expect_dynamic_length(graph, graph.input(Role.ATTENTION_MASK))


def _check_lengths(graph: GraphSpec) -> None:
    _expect(graph, graph.input(Role.LAST_INDEX), ("int32",), rank=1)
    _expect(graph, graph.input(Role.TOTAL_LENGTH), ("int32",), rank=0)
    _expect(graph, graph.input(Role.LOGIT_ROWS), ("int64",), rank=1)


def _expect_dynamic_length(graph: GraphSpec, tensor: TensorSpec) -> None:
    if isinstance(tensor.shape[1], int):
        raise BundleError(f"{graph.file}: {tensor.name}: expected a dynamic length, got {list(tensor.shape)}")


def _check_cache(graph: GraphSpec) -> None:
    counts = [
        sum(tensor.role == role for tensor in tensors)
        for past, present in CACHE_PARTS
        for role, tensors in ((past, graph.inputs), (present, graph.outputs))
    ]
    if len(set(counts)) != 1:
        raise BundleError(
            f"{graph.file}: expected past and present, key and value of every layer, got {counts} of them; "
            f"export the bundle again"
        )
    for past, present in cache_pairs(graph):
        if (present.dtype, present.shape) != (past.dtype, past.shape):
            raise BundleError(
                f"{graph.file}: {present.name}: expected {past.dtype} {list(past.shape)} as {past.name} is, "
                f"got {present.dtype} {list(present.shape)}; export the bundle again"
            )
        _expect(graph, past, _CACHE_DTYPES, rank=4)
        if [isinstance(axis, int) for axis in past.shape[1:]] != [True, False, True]:
            raise BundleError(
                f"{graph.file}: {past.name}: expected fixed heads and channels and a dynamic length (B, K, L, E), "
                f"got {list(past.shape)}; export the bundle again"
            )


def _check_tokens_and_logits(graph: GraphSpec, vocab_size: int, rank: int = 3) -> None:
    tokens, logits = graph.input(Role.TOKENS), graph.output(Role.LOGITS)
    _expect(graph, tokens, ("int64",), rank=2)
    _expect(graph, logits, ("float32", "float16"), rank=rank)
    if isinstance(logits.shape[-1], int) and logits.shape[-1] != vocab_size:
        raise BundleError(f"{graph.file}: {logits.name}: expected {vocab_size} logits a token, got {logits.shape[-1]}")


def _expect_roles(graph: GraphSpec, known: Set[Role]) -> None:
    unknown = sorted({tensor.role for tensor in graph.inputs} - known)
    if unknown:
        raise BundleError(
            f"{graph.file}: this runtime feeds only {', '.join(sorted(known))}; the graph also wants "
            f"{', '.join(unknown)}; upgrade it with: pip install --upgrade cosmos-export"
        )


def _inputs(session: _Session, graph: GraphSpec) -> list[_NodeArg]:
    """What a graph wants to be fed, with the inputs that have a default value as far as the manifest names them."""
    named = {tensor.name for tensor in graph.inputs}
    return [*session.get_inputs(), *(arg for arg in session.get_overridable_initializers() if arg.name in named)]


def _expect(graph: GraphSpec, tensor: TensorSpec, dtypes: tuple[str, ...], rank: int) -> None:
    if tensor.dtype not in dtypes or len(tensor.shape) != rank:
        raise BundleError(
            f"{graph.file}: {tensor.name}: expected {' or '.join(dtypes)} of rank {rank}, "
            f"got {tensor.dtype} of shape {list(tensor.shape)}; export the bundle again"
        )


def _check_tensors(actual: Iterable[_NodeArg], promised: Iterable[TensorSpec], where: str) -> None:
    found = {arg.name: arg for arg in actual}
    specs = {spec.name: spec for spec in promised}
    if found.keys() != specs.keys():
        raise BundleError(f"{where}: the manifest lists {sorted(specs)}, the graph has {sorted(found)}")
    for name, spec in specs.items():
        _check_tensor(found[name], spec, f"{where}: {name}")


def _check_tensor(arg: _NodeArg, spec: TensorSpec, where: str) -> None:
    dtype = _dtype(arg.type)
    if dtype != spec.dtype:
        raise BundleError(f"{where}: the manifest says {spec.dtype}, the graph {dtype}; export the bundle again")
    if len(arg.shape) != len(spec.shape) or not all(map(_axes_agree, arg.shape, spec.shape)):
        raise BundleError(
            f"{where}: the manifest says shape {list(spec.shape)}, the graph {list(arg.shape)}; export the bundle again"
        )


def _dtype(ort_type: str) -> str:
    """The manifest's name of an ONNX Runtime type: "tensor(float)" is float32."""
    name = ort_type.removeprefix("tensor(").removesuffix(")")
    return _ORT_DTYPES.get(name, name)


def _axes_agree(actual: int | str | None, promised: int | str) -> bool:
    """Two fixed sizes must be equal; names of dynamic axes carry no contract."""
    return not (isinstance(actual, int) and isinstance(promised, int)) or actual == promised
