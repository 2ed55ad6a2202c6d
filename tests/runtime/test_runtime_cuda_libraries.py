"""A provider's library that does not load is explained by what the loader says."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest

from cosmos_runtime import cuda_libraries
from cosmos_runtime.cuda_libraries import explain, why_no_cuda


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("libcudnn.so.9: cannot open shared object file: No such file", r"cuDNN is not found.*nvidia-cudnn-cu13"),
        ("libcudnn_graph.so.9: cannot open shared object file", "cuDNN is not found"),
        ("libcurand.so.10: cannot open shared object file", "cuRAND is not found.*nvidia-curand"),
        ("libcublasLt.so.99: cannot open shared object file", r"cuBLAS is not found: libcublasLt\.so\.99"),
        ("libcuda.so.1: cannot open shared object file", "the NVIDIA driver is not found"),
        ("libother.so.3: cannot open shared object file", "libother.so.3 is not found"),
        ("invalid ELF header", r"does not load \(invalid ELF header\)"),
    ],
)
def test_words_of_the_loader(words: str, said: str) -> None:
    import re

    assert re.search(said, explain(words))


def test_another_major_version_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **_: object) -> object:
        if name == "libcudart.so.12":
            return object()
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert "there is one of CUDA 12, and this ONNX Runtime is built for CUDA 13" in explain(
        "libcudart.so.13: cannot open shared object file"
    )


def test_a_provider_that_is_not_there_or_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(cuda_libraries, "find_spec", lambda name: origin)
    assert why_no_cuda() == "this ONNX Runtime has no CUDA provider"
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"no library")
    (tmp_path / "capi" / "libonnxruntime_providers_shared.so").write_bytes(b"no library")
    reason = why_no_cuda()
    assert reason is not None
    assert "does not load" in reason
