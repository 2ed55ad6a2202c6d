"""A bundle loaded onto a device, ready to compute logits."""

import os
import threading
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import TokenIds
from cosmos_runtime.binding import LoadedGraph, OnnxGraph
from cosmos_runtime.bundle import Bundle
from cosmos_runtime.decode_kernels import load_decode_kernels
from cosmos_runtime.decoder_graph import DecoderGraph
from cosmos_runtime.device_stream import CudaStream, Stream
from cosmos_runtime.errors import BundleError, InputError, ProviderError, TokenizerError
from cosmos_runtime.full_sequence_graph import FullSequenceGraph
from cosmos_runtime.head_signature import check_heads
from cosmos_runtime.heads import Diagnosis, MemoryBank, has_heads
from cosmos_runtime.kernel_graph import KernelGraph
from cosmos_runtime.manifest import DECODER, FULL_SEQUENCE, MANIFEST_NAME, ONNX, SAMPLER, GraphSpec, Manifest, Role
from cosmos_runtime.providers import create_inference_session, open_stream
from cosmos_runtime.quoting import quoted
from cosmos_runtime.signature import check_decoder, check_full_sequence, check_signature
from cosmos_runtime.threads import runs_at_once, thread_count
from cosmos_runtime.tokenizer import Tokenizer
from cosmos_runtime.validation import check_fixed_axes, token_batch, token_count

if TYPE_CHECKING:
    from cosmos_runtime.device_loop import DeviceLoops


def load(
    bundle: Bundle | str | os.PathLike[str],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    graph: str | None = None,
    gpu_mem_limit: int | None = None,
) -> "Session":
    """Load a bundle (opened, or the path of its folder) onto `provider`, "cpu" or "cuda".

    `threads` defaults to the physical cores that this process may use, `graph` to the bundle's `DECODER`, or its
    `FULL_SEQUENCE` where it has no decoder. Contents are not hashed here: call `check_bundle` after a copy or
    download. The weights are memory-mapped: never write into the files of a bundle in use; replace it with a new
    folder. `gpu_mem_limit` bounds the bytes that weights and caches have together on a GPU, and what ONNX Runtime takes
    for its own work to what the weights leave of it; without it, there is what the GPU has.

    Raises: BundleError, ProviderError (never another device instead, nor without room for the weights), InputError for
    `threads`, `graph` or `gpu_mem_limit`.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    _refuse_torch_programs(opened.manifest)
    name, spec = choose_graph(opened.manifest, graph)
    check_device(opened.manifest, spec, provider)
    if gpu_mem_limit is not None:
        token_count("gpu_mem_limit", gpu_mem_limit, minimum=1)
    stream = open_stream(provider, gpu_mem_limit) if name == DECODER else None
    replays = stream is not None and has_device_loop(opened.manifest)
    file = opened.file(spec.file)
    kernels = load_decode_kernels(opened, stream) if replays and isinstance(stream, CudaStream) else None
    inference = create_inference_session(
        file,
        provider,
        thread_count(threads),
        stream,
        replays=replays,
        initializers=None if kernels is None else kernels.initializers,
    )
    opened.check_in_place()
    check_signature(inference, spec)
    loaded = OnnxGraph(inference) if kernels is None else KernelGraph(inference, spec, kernels)
    return session_on(loaded, opened, name, provider=provider, stream=stream, threads=threads)


def choose_graph(manifest: Manifest, name: str | None = None) -> tuple[str, GraphSpec]:
    """A bundle's graph called `name`, or the one that runs fastest, checked to be one that a `Session` can run.

    Raises: InputError for a name that no session knows, BundleError where the bundle has it not, or not as it should.
    """
    name = _default_graph(manifest) if name is None else _known_graph(name)
    spec = manifest.graph(name)
    _CHECKS[name](spec, manifest.vocab_size)
    check_heads(spec, manifest)
    return name, spec


def session_on(
    graph: LoadedGraph,
    bundle: Bundle,
    name: str,
    *,
    provider: str = "cpu",
    stream: Stream | None = None,
    threads: int | None = None,
) -> "Session":
    """A session over a bundle's graph `name` that some engine has loaded.

    `load` is this with ONNX Runtime, and whatever generates or scores with a session does so with any engine. `threads`
    are those that one run of the engine computes with, None for all.
    """
    make = DecoderGraph if name == DECODER else FullSequenceGraph
    at_once = runs_at_once(threads)
    return Session(bundle, provider, make(graph, bundle.manifest.graph(name), bundle, stream, at_once=at_once))


class Output(NamedTuple):
    """Logits (B, T, V), and what the capability heads found of each row; nothing in a plain decoder."""

    logits: npt.NDArray[np.float32]
    diagnoses: list[Diagnosis]

    @property
    def diagnostics(self) -> dict[str, Any] | list[dict[str, Any]] | None:
        """The nested report of the row, or a list with one a row; None from a plain decoder."""
        reports = [diagnosis.report() for diagnosis in self.diagnoses]
        return (reports[0] if len(reports) == 1 else reports) if reports else None


class Session:
    """A loaded model; made by `load`. Logits depend on the arguments alone: a session keeps no state between calls.

    Any number of threads may use it at once (see docs/UNDER_LOAD.md).
    """

    def __init__(self, bundle: Bundle, provider: str, graph: DecoderGraph | FullSequenceGraph) -> None:
        self.bundle = bundle
        self.provider = provider
        self.graph = graph
        self._making = threading.RLock()  # `cached_property` has no lock of its own

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, read on first use. Raises: TokenizerError where the bundle has none that fits it."""
        with self._making:
            return self._tokenizer

    @property
    def device_loops(self) -> "DeviceLoops | None":
        """What decodes without asking the host at every token; None where the bundle has nothing for that."""
        with self._making:
            return self._device_loops

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        name = self.manifest.tokenizer
        if name is None:
            raise TokenizerError(
                f"{self.bundle.path}: this bundle has no tokenizer; give token ids to Session.logits or generate, "
                f"or export it again with a tokenizer"
            )
        return Tokenizer.from_file(self.bundle.file(name), vocab_size=self.manifest.vocab_size)

    @cached_property
    def _device_loops(self) -> "DeviceLoops | None":
        if not isinstance(self.graph, DecoderGraph) or not has_device_loop(self.manifest):
            return None
        from cosmos_runtime.device_loop import DeviceLoops

        return DeviceLoops(self.graph, self.bundle, self.provider)

    def logits(self, input_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Logits (B, T, V) of integer token ids (B, T), or of one row (T,) as a batch of one.

        Raises: InputError for ids that the model cannot take, CosmosRuntimeError where the computation fails.
        """
        return self.graph.all_logits(self._checked(input_ids)).astype(np.float32, copy=False)

    def call(self, input_ids: npt.ArrayLike, *, memory: MemoryBank | None = None) -> Output:
        """What the model makes of ids (B, T) or (T,): logits, and what its capability heads found of each row.

        `memory` (see `new_memory`) carries what earlier calls stored, and is updated; without it a call starts from an
        empty one. A plain decoder has no heads, finds nothing and remembers nothing. Calls of several threads with one
        memory are made one after another, in an order that is theirs to keep.

        Raises: InputError for ids or a memory that do not fit, CosmosRuntimeError where the computation fails.
        """
        ids = self._checked(input_ids)
        bank = self.graph.new_memory(len(ids), calls=1) if memory is None else self._fitting(memory, len(ids))
        with nullcontext() if bank is None else bank.turn:
            logits, diagnoses = self.graph.call(ids, bank)
        return Output(logits.astype(np.float32, copy=False), diagnoses)

    def new_memory(self, batch: int, calls: int | None = None) -> MemoryBank:
        """An empty memory for a sequence of calls with `batch` rows.

        A sequence of at most `calls` calls needs less room than the whole memory of the model, which is the default.

        Raises: InputError where the bundle's model has no capability heads.
        """
        calls = None if calls is None else token_count("calls", calls, minimum=1)
        bank = self.graph.new_memory(token_count("batch", batch, minimum=1), calls)
        if bank is None:
            raise InputError(
                f"new_memory: {self.manifest.name} is a plain decoder and remembers nothing; export it with "
                f"--capabilities"
            )
        return bank

    def _checked(self, input_ids: npt.ArrayLike) -> TokenIds:
        ids = token_batch(
            input_ids,
            vocab_size=self.manifest.vocab_size,
            max_sequence_length=self.manifest.max_sequence_length,
        )
        check_fixed_axes(ids, self.graph.spec.input(Role.TOKENS))
        return ids

    def _fitting(self, memory: MemoryBank, batch: int) -> MemoryBank:
        if not isinstance(memory, MemoryBank):
            raise InputError(f"memory: expected one that `new_memory` made, or None, got {quoted(memory)}")
        if not has_heads(self.manifest) or memory.batch != batch:
            expected = f"one of {batch} rows" if has_heads(self.manifest) else "none: this is a plain decoder"
            raise InputError(f"memory: expected {expected}, got one of {memory.batch} rows")
        return memory


def _refuse_torch_programs(manifest: Manifest) -> None:
    if manifest.graph_format != ONNX:
        raise BundleError(
            f"{manifest.name} is a {manifest.graph_format} bundle, which needs PyTorch; this runtime runs ONNX. Export "
            f"the checkpoint with `cosmos-export onnx`, or open it where torch is: cosmos_export.load_session(...)"
        )


def has_device_loop(manifest: Manifest) -> bool:
    """Whether a bundle has graphs that choose the next tokens where they are computed."""
    return any(name.startswith(f"{SAMPLER}.") for name in manifest.graphs)


_CHECKS = {FULL_SEQUENCE: check_full_sequence, DECODER: check_decoder}


def _known_graph(name: str) -> str:
    if name not in _CHECKS:
        raise InputError(f"graph: expected {DECODER!r} or {FULL_SEQUENCE!r}, got {name!r}")
    return name


def check_device(manifest: Manifest, graph: GraphSpec, provider: str) -> None:
    """Refuse a graph whose attention would not run where it was asked to.

    ONNX Runtime's GroupQueryAttention has no float32 kernel on CUDA; it would take that operator to the CPU in silence.

    Raises: ProviderError.
    """
    float32_cache = any(t.role == Role.PAST_KEY and t.dtype == "float32" for t in graph.inputs)
    if provider == "cuda" and float32_cache and manifest.recipe["dialect"] == "ort":
        raise ProviderError(
            f"provider 'cuda': {manifest.name} was exported for CPUs (recipe {manifest.recipe['name']!r}): its fused "
            f"attention has no float32 kernel on CUDA; export with --recipe portable-fp32, or use provider='cpu'"
        )


def _default_graph(manifest: Manifest) -> str:
    """The graph that this runtime runs fastest. Raises: BundleError where it knows none of the bundle's."""
    for name in (DECODER, FULL_SEQUENCE):
        if name in manifest.graphs:
            return name
    raise BundleError(
        f"{MANIFEST_NAME}: graphs: expected {DECODER!r} or {FULL_SEQUENCE!r}, got {', '.join(manifest.graphs)}; "
        f"upgrade this runtime with: pip install --upgrade cosmos-export"
    )
