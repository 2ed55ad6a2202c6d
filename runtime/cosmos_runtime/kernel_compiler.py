"""Compiles CUDA source for the GPU at hand, with NVIDIA's runtime compiler (NVRTC, which comes with onnxruntime-gpu).

https://docs.nvidia.com/cuda/nvrtc/
"""

import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from cosmos_runtime.errors import CosmosRuntimeError, ProviderError

# Of the CUDA major versions that onnxruntime-gpu is built for, the newest first.
_LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_ELF = b"\x7fELF"  # what machine code for a GPU begins with
_WINDOWS_LIBRARIES = ("nvrtc64_130_0.dll", "nvrtc64_120_0.dll")


def joined_source(*names: str) -> str:
    """Files of this package as one CUDA program, behind what all of them begin with."""
    package = files("cosmos_runtime")
    return "\n".join(package.joinpath(name).read_text(encoding="utf-8") for name in ("kernel_basics.cu", *names))


def compiled(source: str, definitions: Mapping[str, object], architecture: str) -> bytes:
    """What `compile_kernels` gives, which takes seconds, kept for the next process in the user's cache folder."""
    path = _kept(source, definitions, architecture)
    with contextlib.suppress(OSError):
        code = path.read_bytes()
        if code.startswith(_ELF):
            return code
    code = compile_kernels(source, definitions, architecture)
    with contextlib.suppress(OSError):  # a cache that cannot be written to is none
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    return code


def compile_kernels(source: str, definitions: Mapping[str, object], architecture: str) -> bytes:
    """Machine code of `source` for an architecture such as "sm_90", with macros defined.

    Raises: ProviderError where there is no compiler, CosmosRuntimeError with the compiler's words where it fails.
    """
    compiler = _compiler()
    program = ctypes.c_void_p()
    created = compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    if created != 0:
        raise CosmosRuntimeError(f"NVRTC: {_words(compiler, created)}")
    try:
        options = [f"--gpu-architecture={architecture}", "--std=c++17"]
        options += [f"-D{name}={value}" for name, value in definitions.items()]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = compiler.nvrtcCompileProgram(program, len(options), array)
        if status != 0:
            log = _text(compiler, program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            raise CosmosRuntimeError(
                f"NVRTC cannot compile the kernels for {architecture}: {_words(compiler, status)}: "
                f"{log.decode(errors='replace')[:400]}; set COSMOS_DECODE_KERNELS=0 to decode with ONNX Runtime's"
            )
        return _text(compiler, program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _kept(source: str, definitions: Mapping[str, object], architecture: str) -> Path:
    """The file of one result: another source, macro or architecture has another name."""
    key = "\0".join([architecture, *(f"{name}={value}" for name, value in sorted(definitions.items())), source])
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "cosmos-runtime" / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"


def _compiler() -> ctypes.CDLL:
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise ProviderError(
        "provider 'cuda': NVRTC, which compiles this runtime's kernels, is not installed; install it with: "
        'pip install "cosmos-export[gpu]" (package nvidia-cuda-nvrtc), or set COSMOS_DECODE_KERNELS=0 to decode with '
        "ONNX Runtime's kernels"
    )


def _candidates() -> Iterator[str]:
    """Names that the system's loader may know (or a library that is loaded already), then where pip puts them."""
    names = _WINDOWS_LIBRARIES if sys.platform == "win32" else _LIBRARIES
    yield from names
    for folder in sys.path:
        for name in names:
            yield from (str(path) for path in sorted(Path(folder or ".").glob(f"nvidia/*/*/{name}")))


def _words(compiler: ctypes.CDLL, status: int) -> str:
    return (compiler.nvrtcGetErrorString(status) or b"unknown error").decode()


def _text(compiler: ctypes.CDLL, program: ctypes.c_void_p, size_of: str, get: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(compiler, size_of)(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(compiler, get)(program, buffer)
    return buffer.raw
