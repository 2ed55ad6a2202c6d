"""Run exported Cosmos bundles with numpy and ONNX Runtime; no PyTorch needed.

    import cosmos_runtime as cosmos

    session = cosmos.load("path/to/bundle", provider="cpu")
    for piece in cosmos.generate_text(session, "Once upon a time", max_new_tokens=50):
        print(piece, end="", flush=True)

Names are imported on first use, so `import cosmos_runtime` itself costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_runtime.batch_decoding import BatchDecoder, new_batch_decoder
    from cosmos_runtime.batch_generation import BatchGeneration, generate_batch
    from cosmos_runtime.binding import Binding, LoadedGraph, Memory
    from cosmos_runtime.bounds import LARGEST_MEMORY, LARGEST_VOCABULARY, LONGEST_SEQUENCE, MOST_MODULES
    from cosmos_runtime.bundle import Bundle
    from cosmos_runtime.checking import CheckedBundle, Finding, check_bundle
    from cosmos_runtime.cli.generate import new_generate_command
    from cosmos_runtime.continuation import Continuation
    from cosmos_runtime.decoding import Decoder, RewindingDecoder, new_decoder
    from cosmos_runtime.diagnostics import nested_diagnostics
    from cosmos_runtime.errors import BundleError, CosmosRuntimeError, InputError, ProviderError, TokenizerError
    from cosmos_runtime.files import describe_file
    from cosmos_runtime.generation import Generation, TextGeneration, generate, generate_text
    from cosmos_runtime.graph_check import check_graphs, graph_operators
    from cosmos_runtime.heads import Diagnosis, MemoryBank
    from cosmos_runtime.json_fields import strict_json
    from cosmos_runtime.kernel_spec import KERNELS_NAME, KernelSpec, LayerWeights, StoredMatrix, StoredTensor
    from cosmos_runtime.manifest import (
        DECODER,
        DEVICE_LOOP,
        FULL_SEQUENCE,
        GRAPH_FORMATS,
        MANIFEST_NAME,
        ONNX,
        PT2,
        SAMPLER,
        TORCHSCRIPT,
        FileEntry,
        GraphSpec,
        Manifest,
        Role,
        TensorSpec,
    )
    from cosmos_runtime.quoting import quoted, shown
    from cosmos_runtime.sampling import Sampling, sample
    from cosmos_runtime.scores import (
        BLOCKING_LEVELS,
        CAPABILITIES,
        EVALUATION_CHECKS,
        LABELS,
        SAFETY_CHECKS,
        SAFETY_LEVELS,
        THRESHOLDS,
        ScoreSpec,
        score_specs,
    )
    from cosmos_runtime.scoring import Score, score
    from cosmos_runtime.session import Output, Session, choose_graph, load, session_on
    from cosmos_runtime.signatures import sign_bundle
    from cosmos_runtime.tokenizer import TextStream, Tokenizer

    __version__: str

__all__ = [
    "BLOCKING_LEVELS",
    "CAPABILITIES",
    "DECODER",
    "DEVICE_LOOP",
    "EVALUATION_CHECKS",
    "FULL_SEQUENCE",
    "GRAPH_FORMATS",
    "KERNELS_NAME",
    "LABELS",
    "LARGEST_MEMORY",
    "LARGEST_VOCABULARY",
    "LONGEST_SEQUENCE",
    "MANIFEST_NAME",
    "MOST_MODULES",
    "ONNX",
    "PT2",
    "SAFETY_CHECKS",
    "SAFETY_LEVELS",
    "SAMPLER",
    "THRESHOLDS",
    "TORCHSCRIPT",
    "BatchDecoder",
    "BatchGeneration",
    "Binding",
    "Bundle",
    "BundleError",
    "CheckedBundle",
    "Continuation",
    "CosmosRuntimeError",
    "Decoder",
    "Diagnosis",
    "FileEntry",
    "Finding",
    "Generation",
    "GraphSpec",
    "InputError",
    "KernelSpec",
    "LayerWeights",
    "LoadedGraph",
    "Manifest",
    "Memory",
    "MemoryBank",
    "Output",
    "ProviderError",
    "RewindingDecoder",
    "Role",
    "Sampling",
    "Score",
    "ScoreSpec",
    "Session",
    "StoredMatrix",
    "StoredTensor",
    "TensorSpec",
    "TextGeneration",
    "TextStream",
    "Tokenizer",
    "TokenizerError",
    "__version__",
    "check_bundle",
    "check_graphs",
    "choose_graph",
    "describe_file",
    "generate",
    "generate_batch",
    "generate_text",
    "graph_operators",
    "load",
    "nested_diagnostics",
    "new_batch_decoder",
    "new_decoder",
    "new_generate_command",
    "quoted",
    "sample",
    "score",
    "score_specs",
    "session_on",
    "shown",
    "sign_bundle",
    "strict_json",
]

_PUBLIC_NAMES = {
    "batch_generation": ("BatchGeneration", "generate_batch"),
    "batch_decoding": ("BatchDecoder", "new_batch_decoder"),
    "binding": ("Binding", "LoadedGraph", "Memory"),
    "bounds": ("LARGEST_MEMORY", "LARGEST_VOCABULARY", "LONGEST_SEQUENCE", "MOST_MODULES"),
    "bundle": ("Bundle",),
    "checking": ("CheckedBundle", "Finding", "check_bundle"),
    "cli.generate": ("new_generate_command",),
    "continuation": ("Continuation",),
    "decoding": ("Decoder", "RewindingDecoder", "new_decoder"),
    "diagnostics": ("nested_diagnostics",),
    "errors": ("BundleError", "CosmosRuntimeError", "InputError", "ProviderError", "TokenizerError"),
    "files": ("describe_file",),
    "generation": ("Generation", "TextGeneration", "generate", "generate_text"),
    "graph_check": ("check_graphs", "graph_operators"),
    "heads": ("Diagnosis", "MemoryBank"),
    "json_fields": ("strict_json",),
    "kernel_spec": ("KERNELS_NAME", "KernelSpec", "LayerWeights", "StoredMatrix", "StoredTensor"),
    "manifest": (
        "DECODER",
        "DEVICE_LOOP",
        "FULL_SEQUENCE",
        "GRAPH_FORMATS",
        "MANIFEST_NAME",
        "ONNX",
        "PT2",
        "SAMPLER",
        "TORCHSCRIPT",
        "FileEntry",
        "GraphSpec",
        "Manifest",
        "Role",
        "TensorSpec",
    ),
    "quoting": ("quoted", "shown"),
    "sampling": ("Sampling", "sample"),
    "scores": (
        "BLOCKING_LEVELS",
        "CAPABILITIES",
        "EVALUATION_CHECKS",
        "LABELS",
        "SAFETY_CHECKS",
        "SAFETY_LEVELS",
        "THRESHOLDS",
        "ScoreSpec",
        "score_specs",
    ),
    "scoring": ("Score", "score"),
    "session": ("Output", "Session", "choose_graph", "load", "session_on"),
    "signatures": ("sign_bundle",),
    "tokenizer": ("TextStream", "Tokenizer"),
}
_HOME = {name: module for module, names in _PUBLIC_NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        value: Any = _installed_version()
    elif name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cosmos-export")
    except PackageNotFoundError:  # a source tree on PYTHONPATH
        return "0+unknown"
