"""Which library keeps ONNX Runtime's CUDA provider from loading: the system's loader is asked, which knows."""

import ctypes
import re
import sys
from importlib.util import find_spec
from pathlib import Path

# What a library belongs to, and the package that brings it, by the beginning of its name.
_PACKAGES = {
    "cudnn": ("cuDNN", "nvidia-cudnn-cu{major}"),
    "cublas": ("CUDA's cuBLAS", "nvidia-cublas"),
    "cudart": ("the CUDA runtime", "nvidia-cuda-runtime"),
    "curand": ("CUDA's cuRAND", "nvidia-curand"),
    "cufft": ("CUDA's cuFFT", "nvidia-cufft"),
    "nvrtc": ("CUDA's NVRTC", "nvidia-cuda-nvrtc"),
    "cuda": ("the NVIDIA driver", ""),
}
_MISSING = re.compile(r"lib(?P<name>[A-Za-z]+)\w*\.so\.?(?P<version>[\d.]*): cannot open shared object file")
# Other major versions of the same library, to tell a wrong CUDA from none.
_MAJORS = range(11, 15)


def why_no_cuda() -> str | None:
    """What the loader says is missing, in words, with what brings it; None where the provider's library loads."""
    if sys.platform == "win32":
        return None  # its loader does not say which library it misses
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "capi"
    if not (folder / "libonnxruntime_providers_cuda.so").is_file():
        return "this ONNX Runtime has no CUDA provider"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return explain(str(error))
    return None


def explain(words: str) -> str:
    """The loader's words about a library, as a cause and its cure."""
    found = _MISSING.search(words)
    if found is None:
        return f"ONNX Runtime's CUDA provider does not load ({words})"
    name, version = found["name"], found["version"]
    beginnings = [beginning for beginning in _PACKAGES if name.lower().startswith(beginning)]
    if not beginnings:
        return f"lib{name}.so.{version} is not found"
    what, package = _PACKAGES[beginnings[0]]
    cure = f" (pip install {package.format(major=13)})" if package else ""
    other = _other_major(name, version) if what != "cuDNN" else None
    wrong = f"; there is one of CUDA {other}, and this ONNX Runtime is built for CUDA {version}" if other else ""
    return f"{what} is not found: lib{name}.so.{version}{cure}{wrong}"


def _other_major(name: str, version: str) -> int | None:
    """Another major version of a library that the loader does find."""
    for major in _MAJORS:
        if str(major) != version.split(".")[0]:
            try:
                ctypes.CDLL(f"lib{name}.so.{major}")
            except OSError:
                continue
            return major
    return None
