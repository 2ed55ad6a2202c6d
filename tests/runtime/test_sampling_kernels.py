"""What can be said of the sampling kernels without a GPU; what they choose is in tests/export/test_samplers.py."""

import re
from types import SimpleNamespace

import pytest

import cosmos_runtime.sampling_kernels as kernels_module
from cosmos_runtime import GraphSpec, Role, TensorSpec
from cosmos_runtime.device_stream import DeviceArray, HostStream
from cosmos_runtime.kernel_compiler import joined_source
from cosmos_runtime.sampling_kernels import (
    _FUNCTIONS,
    SOURCES,
    SamplingKernels,
    _Buffers,
    definitions,
    sampling_kernels,
)

CODE = joined_source(*SOURCES)


def test_every_macro_that_the_source_reads_is_given() -> None:
    words = set(re.findall(r"\b[A-Z][A-Z_]{2,}\b", re.sub(r"//.*", "", CODE)))
    assert words - set(re.findall(r"#define (\w+)", CODE)) == definitions(1000, 64).keys()


def test_buffers_are_in_the_order_of_the_source() -> None:
    structure = re.search(r"struct Buffers \{(.*?)\n\};", CODE, re.DOTALL)
    assert structure is not None
    named = re.findall(r"^\s*[\w ]+?\*?\s(\w+);", structure[1], re.MULTILINE)
    assert named == [name for name, *_ in _Buffers._fields_]


def test_every_kernel_that_is_asked_for_is_in_the_source() -> None:
    kernels = re.findall(r'extern "C" __global__ .*?(\w+)\(const Buffers', CODE)
    assert sorted(kernels) == sorted(name for names in _FUNCTIONS.values() for name in names)


@pytest.mark.parametrize("choice", ["greedy", "nucleus"])
def test_a_program_has_the_kernels_that_are_launched(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of a nucleus, which take longest to compile, only where they are."""
    programs: list[str] = []

    class Module:
        def __init__(self, stream: object, code: str) -> None:
            programs.append(code)

        def function(self, name: str, shared: int) -> str:
            return name

    monkeypatch.setattr(kernels_module, "compiled", lambda source, macros, architecture: source)
    monkeypatch.setattr(kernels_module, "CudaModule", Module)
    monkeypatch.setattr(kernels_module, "device", lambda stream: SimpleNamespace(architecture="sm_90"))
    monkeypatch.setattr(kernels_module, "LaunchSequence", lambda stream, launches, kept: launches)
    arrays = {Role.HISTORY: DeviceArray((2, 8), "int64", "cpu")}
    kernels = SamplingKernels(HostStream(), 1000)  # type: ignore[arg-type]
    spec = GraphSpec(file="s.onnx", opset=18, inputs=(), outputs=())
    for _ in range(2):
        launches = kernels.sampler(f"sampler.{choice}.penalty", spec, arrays)
        assert tuple(launch.function for launch in launches) == _FUNCTIONS[f"sampler.{choice}"]  # type: ignore[union-attr,attr-defined]
    (program,) = programs
    assert all(f" {name}(const Buffers" in program for name in _FUNCTIONS[f"sampler.{choice}"])
    assert ("nucleus_border" in program) == (choice == "nucleus")


def test_on_the_host_there_are_none() -> None:
    assert sampling_kernels(HostStream(), 1000) is None


@pytest.mark.parametrize(("name", "candidates"), [("sampler.top_k", 65), ("sampler.of_a_later_version", 64)])
def test_what_they_cannot_do_is_left_to_the_graph(name: str, candidates: int) -> None:
    """More candidates than a warp draws from; a sampler that this runtime does not know."""
    spec = GraphSpec(
        file="s.onnx",
        opset=18,
        inputs=(TensorSpec("rank_bias", Role.RANK_BIAS, "float64", ("B", candidates)),),
        outputs=(),
    )
    arrays = {Role.HISTORY: DeviceArray((2, 8), "int64", "cpu")}
    assert SamplingKernels(HostStream(), 1000).sampler(name, spec, arrays) is None  # type: ignore[arg-type]
