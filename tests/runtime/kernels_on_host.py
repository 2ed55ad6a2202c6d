"""Kernels of the runtime compiled for the host (see cuda_on_host.h): what they compute is tested without a GPU."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from cosmos_runtime import kernel_compiler
from cosmos_runtime.kernel_compiler import joined_source
from cosmos_runtime.sampling_kernels import SOURCES

PACKAGE, HERE = Path(kernel_compiler.__file__).parent, Path(__file__).parent / "cuda_on_host"
COMPILER = next((found for name in (os.environ.get("CXX", "c++"), "g++") if (found := shutil.which(name))), None)
needs_compiler = pytest.mark.skipif(
    COMPILER is None or os.name == "nt", reason="there is no C++ compiler, or no fibers as the tests use them"
)

# What a library exports: a launch over a grid, for each kernel.
_CHOOSE = """
#define LAUNCH(name) extern "C" void on_host_##name(unsigned blocks, const Buffers* at) { \\
    host::launch({blocks, 1, 1}, SIZE, [=] { name(*at); }); }
LAUNCH(choose_greedy) LAUNCH(choose_top_k) LAUNCH(choose_any)
LAUNCH(nucleus_extent) LAUNCH(nucleus_border) LAUNCH(choose_nucleus)
"""
_ATTEND = """
extern "C" void on_host_attend(const float* qkv, const int* last, int length, u16* keys, u16* values, const u16* cos,
                               const u16* sin, float* parts, u32* done, u16* out) {
  host::launch({KV_HEADS, SPLITS, BATCH}, ATTENTION_THREADS,
               [=] { attend(qkv, last, length, keys, values, cos, sin, parts, done, out); });
}
"""


def sampling_library(macros: Mapping[str, object]) -> ctypes.CDLL:
    """The kernels that choose tokens."""
    return _library("\n".join([joined_source(*SOURCES), _CHOOSE]), tuple(macros.items()))


def attention_library(macros: Mapping[str, object]) -> ctypes.CDLL:
    """The attention of single tokens."""
    source = _file("decode_kernels.cu")
    before, behind = source.index("// ---- 16-bit numbers ----"), source.index("// ---- attention ----")
    parts = [_file("kernel_basics.cu"), source[:before], (HERE / "half.h").read_text(), source[behind:], _ATTEND]
    return _library("\n".join(parts), tuple(macros.items()))


def _file(name: str) -> str:
    return (PACKAGE / name).read_text(encoding="utf-8")


@functools.cache
def _library(source: str, macros: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        program, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
        program.write_text(f'#include "cuda_on_host.h"\n{source}', encoding="utf-8")
        command = [str(COMPILER), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{HERE}"]
        command += [f"-D{name}={value}" for name, value in macros]
        done = subprocess.run([*command, str(program), "-o", str(library)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        return ctypes.CDLL(str(library))
