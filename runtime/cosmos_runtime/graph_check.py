"""What a bundle's graphs may ask of ONNX Runtime, checked before it loads anything.

The bounds are the runtime's own: operators of ONNX and a few of ONNX Runtime's, weights in files of the bundle. What
the manifest lists comes on top. Who alters a graph can alter the manifest, but not what this module says.
"""

import re
from pathlib import Path

from cosmos_runtime.errors import BundleError
from cosmos_runtime.graph_file import ONNX_DOMAIN, ExternalData, read_graph
from cosmos_runtime.graph_sizes import check_sizes
from cosmos_runtime.manifest import MANIFEST_NAME, ONNX, FileEntry, Manifest

CONTRIB_DOMAIN = "com.microsoft"

# Of ONNX Runtime's operators, those that `cosmos-export` writes: computation alone. Others read files (EPContext) or
# call into other programs.
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
CONTRIB_OPERATORS = frozenset(
    {
        "FusedMatMul",
        "GatherBlockQuantized",
        "GroupQueryAttention",
        "MatMulNBits",
        "SkipSimplifiedLayerNormalization",
    }
)

_GRAPH_SUFFIX = ".onnx"
_LIBRARY = re.compile(r"\.(so(\.\d+)*|dll|dylib|pyd)$", re.IGNORECASE)
_ALTERED = "the bundle was altered, or made by another tool: copy it again or export it again"


def check_files(manifest: Manifest) -> None:
    """Refuse a bundle of ONNX graphs that brings code along. Raises: BundleError."""
    if manifest.graph_format != ONNX:  # a PyTorch program is code; this runtime loads none
        return
    for name in manifest.files:
        if _LIBRARY.search(name):
            raise BundleError(
                f"{MANIFEST_NAME}: files: {name!r} is a library of native code; custom operators are never loaded. "
                f"Export with the recipes of cosmos-export"
            )


def check_graphs(folder: Path, manifest: Manifest) -> None:
    """Check every ONNX graph that a manifest names; see `check_graph`. Raises: BundleError."""
    if manifest.graph_format == ONNX:
        for file in dict.fromkeys(graph.file for graph in manifest.graphs.values()):
            check_graph(folder, manifest, file)


def check_graph(folder: Path, manifest: Manifest, file: str) -> None:
    """Refuse operators beyond the lists, weights beyond the bundle's files, and tables of other sizes than the manifest
    promises, in one graph of a bundle.

    Raises: BundleError naming the graph, the operator or tensor, and what was expected.
    """
    path = folder / file
    if not file.endswith(_GRAPH_SUFFIX):  # ONNX Runtime tells its formats by the name
        raise BundleError(f"{path}: expected an ONNX graph with a name in {_GRAPH_SUFFIX}; export the bundle again")
    contents = read_graph(path)
    for domain, operator in sorted(contents.operators):
        _check_operator(path, manifest, domain, operator)
    beside = file[: file.rfind("/") + 1]
    for tensor in contents.external:
        _check_external(path, manifest, beside, tensor)
    for graph in manifest.graphs.values():
        if graph.file == file:
            check_sizes(path, contents, graph, manifest)


def graph_operators(paths: list[Path]) -> dict[str, tuple[str, ...]]:
    """The operators of graph files by domain, as a manifest lists them. Raises: BundleError for what is no graph."""
    by_domain: dict[str, set[str]] = {}
    for path in paths:
        for domain, operator in read_graph(path).operators:
            by_domain.setdefault(domain, set()).add(operator)
    return {domain: tuple(sorted(by_domain[domain])) for domain in sorted(by_domain)}


def _check_operator(path: Path, manifest: Manifest, domain: str, operator: str) -> None:
    name = f"{domain}::{operator}"
    if domain != ONNX_DOMAIN and not (domain == CONTRIB_DOMAIN and operator in CONTRIB_OPERATORS):
        raise BundleError(
            f"{path}: uses the operator {name}; this runtime takes those of {ONNX_DOMAIN}, and of {CONTRIB_DOMAIN} "
            f"{', '.join(sorted(CONTRIB_OPERATORS))}; custom operators are never loaded. If a newer cosmos-export made "
            f"the bundle: pip install --upgrade cosmos-export"
        )
    if manifest.operators is not None and operator not in manifest.operators.get(domain, ()):
        raise BundleError(f"{path}: uses the operator {name}, which {MANIFEST_NAME} does not list; {_ALTERED}")


def _check_external(path: Path, manifest: Manifest, beside: str, tensor: ExternalData) -> None:
    what, location = f"{path}: the weights of {tensor.tensor!r}", tensor.location
    if location in ("", ".", "..") or "/" in location or "\\" in location:
        raise BundleError(
            f"{what}: expected the name of a file beside the graph (no path, no '..'), got {location!r}; {_ALTERED}"
        )
    entry = manifest.files.get(beside + location)
    if entry is None:
        raise BundleError(
            f"{what} lie in {location!r}, which {MANIFEST_NAME} does not list among its files; {_ALTERED}"
        )
    _check_extent(what, tensor, entry)


def _check_extent(what: str, tensor: ExternalData, entry: FileEntry) -> None:
    end = tensor.offset + (tensor.length or 0)
    if end > entry.size:
        raise BundleError(f"{what} end at byte {end:,} of {tensor.location!r}, which has {entry.size:,}; {_ALTERED}")
