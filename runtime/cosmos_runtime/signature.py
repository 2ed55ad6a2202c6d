"""Does a loaded graph have the inputs and outputs that the manifest promises?"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from cosmos_runtime.errors import BundleError
from cosmos_runtime.manifest import GraphSpec, Role, TensorSpec

_ORT_DTYPES = {"float": "float32", "double": "float64"}


class _NodeArg(Protocol):
    """What ONNX Runtime tells about one input or output."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class _Session(Protocol):
    def get_inputs(self) -> Iterable[_NodeArg]: ...
    def get_outputs(self) -> Iterable[_NodeArg]: ...


def check_signature(session: _Session, graph: GraphSpec) -> None:
    """Compare names, types, ranks and fixed sizes. Raises: BundleError naming the tensor that differs."""
    _check_tensors(session.get_inputs(), graph.inputs, f"{graph.file}: inputs")
    _check_tensors(session.get_outputs(), graph.outputs, f"{graph.file}: outputs")


def check_full_sequence(graph: GraphSpec, vocab_size: int) -> None:
    """Check that this runtime can run `graph`: token ids (B, T) int64 in, logits (B, T, V) out, nothing else in.

    Raises: BundleError saying what differs.
    """
    unknown = [tensor.role for tensor in graph.inputs if tensor.role != Role.TOKENS]
    if unknown:
        raise BundleError(
            f"{graph.file}: this runtime feeds only {Role.TOKENS.value!r}, the graph also wants {', '.join(unknown)}; "
            f"upgrade it with: pip install --upgrade cosmos-export"
        )
    tokens, logits = graph.input(Role.TOKENS), graph.output(Role.LOGITS)
    _expect(graph, tokens, ("int64",), rank=2)
    _expect(graph, logits, ("float32", "float16"), rank=3)
    if isinstance(logits.shape[2], int) and logits.shape[2] != vocab_size:
        raise BundleError(f"{graph.file}: {logits.name}: expected {vocab_size} logits a token, got {logits.shape[2]}")


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
