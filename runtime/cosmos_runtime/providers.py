"""Make an ONNX Runtime session on the provider that was asked for, or say why not.

ONNX Runtime answers a missing or misspelt provider with a CPU session and a warning; here it is an error.
"""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_runtime.cuda_libraries import why_no_cuda
from cosmos_runtime.device_stream import CudaStream, HostStream, Stream
from cosmos_runtime.errors import BundleError, ProviderError, first_line

if TYPE_CHECKING:
    import onnxruntime

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TensorFloat-32 would round the operands of every float32 product to 11 bits: fp32 has to mean fp32.
_OPTIONS: dict[str, dict[str, str]] = {"CPUExecutionProvider": {}, "CUDAExecutionProvider": {"use_tf32": "0"}}
# For graphs that are captured and replayed: time the kernels of small products once and take the fastest (5 % of a
# step of a 175 M model on an H200).
_REPLAYED = {"ep.cuda.enable_gemm_auto_tune": "1"}
# Decoding attention on CUDA: the kernels behind this one were faster at every batch and length that was measured, by 2
# to 12 %. Who sets the variable, decides.
_CUDA_ENVIRONMENT = {"ORT_ENABLE_XQA": "0"}
_LOG_ERRORS_ONLY = 3
_CUDA_CURE = (
    'install it with: pip install "cosmos-export[gpu]", check the NVIDIA driver, CUDA and cuDNN, or use provider="cpu"'
)
_NO_MEMORY = "out of memory|Failed to allocate memory|Available memory of"
_MEMORY_CURE = (
    "the model does not fit into the GPU's memory, or into gpu_mem_limit: free memory there, export with a recipe of "
    "fewer bits (cuda-int4), or use provider='cpu'"
)


def open_stream(provider: str, memory_limit: int | None = None) -> Stream:
    """What sessions on `provider` compute on; weights and caches on a GPU may have `memory_limit` bytes.

    Raises: ProviderError where the provider is unknown or not available.
    """
    _provider_name(provider)
    if provider != "cuda":
        return HostStream()
    _prepare_cuda(_import_onnxruntime())
    return CudaStream(memory_limit)


def create_inference_session(
    graph: Path,
    provider: str,
    threads: int,
    stream: Stream | None = None,
    *,
    replays: bool = False,
    initializers: "Mapping[str, onnxruntime.OrtValue] | None" = None,
) -> "onnxruntime.InferenceSession":
    """An ONNX Runtime session of `graph` that runs on `provider` ("cpu" or "cuda"), on a stream of `open_stream`.

    With `replays` its runs can be captured and replayed (see `binding.device_run_options`), which wants every operator
    to be one of the device's. `initializers` are weights that lie on the device already, by name.
    Raises: ProviderError where the provider is unknown or not available, BundleError where the graph does not load.
    """
    wanted = _provider_name(provider)
    ort = _import_onnxruntime()
    if provider == "cuda":
        _prepare_cuda(ort)
    options = dict(_OPTIONS[wanted])
    if isinstance(stream, CudaStream):
        if stream.memory_left is not None:
            options["gpu_mem_limit"] = str(stream.memory_left)
        options |= {"user_compute_stream": str(stream.handle), "enable_cuda_graph": str(int(replays))}
    session_options = _session_options(ort, threads, _REPLAYED if replays else {}, initializers or {})
    # A pattern is a plan to take all buffers of a run as one block, for one combination of lengths. On the CPU it saves
    # no time, and 32 threads with requests of their own lengths keep half as much memory again, more in every round.
    session_options.enable_mem_pattern = provider != "cpu"
    session = _create(ort, graph, wanted, options, session_options)
    _check_provider(session, provider)
    return session


def _provider_name(provider: str) -> str:
    if provider in _PROVIDERS:
        return _PROVIDERS[provider]
    close = difflib.get_close_matches(str(provider).lower(), _PROVIDERS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ProviderError(f"provider: expected one of {', '.join(_PROVIDERS)}, got {provider!r}{hint}")


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderError(
            f'ONNX Runtime cannot be imported ({first_line(error)}); install it with: pip install "cosmos-export[cpu]"'
        ) from error
    return onnxruntime


def _prepare_cuda(ort: Any) -> None:
    available = ort.get_available_providers()
    if _PROVIDERS["cuda"] not in available:
        raise ProviderError(
            f"provider 'cuda': this ONNX Runtime {ort.__version__} is built for {', '.join(available)}; {_CUDA_CURE}"
        )
    for name, value in _CUDA_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if hasattr(ort, "preload_dlls"):
        # Finds the CUDA libraries that pip installed; what it prints must not mix with a program's output.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()


def _session_options(
    ort: Any, threads: int, entries: dict[str, str], initializers: "Mapping[str, onnxruntime.OrtValue]"
) -> "onnxruntime.SessionOptions":
    options = ort.SessionOptions()
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    for name, weight in initializers.items():
        options.add_initializer(name, weight)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS_ONLY
    return options


def _create(
    ort: Any, graph: Path, provider: str, provider_options: dict[str, str], options: "onnxruntime.SessionOptions"
) -> "onnxruntime.InferenceSession":
    try:
        # enable_fallback=0 keeps ONNX Runtime from retrying on the CPU after a failure.
        return ort.InferenceSession(graph, options, providers=[(provider, provider_options)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors have no common base class
        if provider == _PROVIDERS["cuda"] and re.search(_NO_MEMORY, str(error)):
            raise ProviderError(f"provider 'cuda': {_cuda_cause(error)}; {_MEMORY_CURE}") from error
        if provider == _PROVIDERS["cuda"] and ("CUDA" in str(error) or "CUDNN" in str(error)):
            raise ProviderError(f"provider 'cuda': {_cuda_cause(error)}; {_CUDA_CURE}") from error
        raise BundleError(
            f"{graph}: ONNX Runtime cannot load it: {first_line(error)}; export the bundle again"
        ) from error


def _cuda_cause(error: BaseException) -> str:
    """ "CUDA failure 100: no CUDA-capable device is detected" without the source lines around it."""
    cause = re.search(r"(CUDA|CUDNN|CUBLAS) failure \d+: [^;]+", str(error))
    return cause.group().strip() if cause else first_line(error)


def _check_provider(session: "onnxruntime.InferenceSession", provider: str) -> None:
    active = session.get_providers()
    if not active or active[0] != _PROVIDERS[provider]:
        started = f"ONNX Runtime could only start {', '.join(active)}"
        reason = why_no_cuda() if provider == "cuda" else None
        said = started if reason is None else f"{reason}: {started}"
        raise ProviderError(f"provider {provider!r}: {said}; {_CUDA_CURE}")
