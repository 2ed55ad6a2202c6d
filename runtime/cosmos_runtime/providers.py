"""Make an ONNX Runtime session on the provider that was asked for, or say why not.

ONNX Runtime answers a missing or misspelt provider with a CPU session and a warning; here it is an error.
"""

import contextlib
import difflib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def open_stream(provider: str) -> Stream:
    """What sessions on `provider` compute on. Raises: ProviderError where the provider is unknown or not available."""
    _provider_name(provider)
    if provider != "cuda":
        return HostStream()
    _prepare_cuda(_import_onnxruntime())
    return CudaStream()


def create_inference_session(
    graph: Path, provider: str, threads: int, stream: Stream | None = None, *, replays: bool = False
) -> "onnxruntime.InferenceSession":
    """An ONNX Runtime session of `graph` that runs on `provider` ("cpu" or "cuda"), on a stream of `open_stream`.

    With `replays` its runs can be captured and replayed (see `binding.device_run_options`), which wants every operator
    to be one of the device's.
    Raises: ProviderError where the provider is unknown or not available, BundleError where the graph does not load.
    """
    wanted = _provider_name(provider)
    ort = _import_onnxruntime()
    if provider == "cuda":
        _prepare_cuda(ort)
    options = dict(_OPTIONS[wanted])
    if isinstance(stream, CudaStream):
        options |= {"user_compute_stream": str(stream.handle), "enable_cuda_graph": str(int(replays))}
    session = _create(ort, graph, wanted, options, threads, _REPLAYED if replays else {})
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


def _create(
    ort: Any, graph: Path, provider: str, provider_options: dict[str, str], threads: int, entries: dict[str, str]
) -> "onnxruntime.InferenceSession":
    options = ort.SessionOptions()
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS_ONLY
    try:
        # enable_fallback=0 keeps ONNX Runtime from retrying on the CPU after a failure.
        return ort.InferenceSession(graph, options, providers=[(provider, provider_options)], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors have no common base class
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
        raise ProviderError(f"provider {provider!r}: ONNX Runtime could only start {', '.join(active)}; {_CUDA_CURE}")
