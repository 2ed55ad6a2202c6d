"""What can be said of the one kernel for a whole step without a GPU: where it is chosen, its macros and its buffers."""

import dataclasses
import re
from pathlib import Path

import pytest

from cosmos_runtime import (
    CosmosRuntimeError,
    KernelSpec,
    LayerWeights,
    StoredMatrix,
    StoredTensor,
    decode_kernels,
    kernel_compiler,
)
from cosmos_runtime.cuda_graph import Device
from cosmos_runtime.decode_kernels import DecodeKernels, definitions, kernel_source
from cosmos_runtime.whole_step import SOURCES, _exchanged, whole_step

H100 = Device(capability=(9, 0), multiprocessors=132, shared=227 * 1024)


def tensor(*shape: int, dtype: str = "float16") -> StoredTensor:
    return StoredTensor("weight", dtype, shape, offset=0)


def matrix(rows: int, columns: int, bits: int) -> StoredMatrix:
    values = tensor(rows, columns * bits // 8, dtype="uint8" if bits < 16 else "float16")
    scales = tensor(rows, columns // 32) if bits < 16 else None
    return StoredMatrix(values, scales, bits=bits, block=32 if bits < 16 else 0)


def spec(bits: int = 4, dim: int = 2048, kv_heads: int = 8, head_dim: int = 64, hidden: int = 8192) -> KernelSpec:
    """Four query heads to a key/value head; the 1 B preset by default."""
    heads = 4 * kv_heads
    layer = LayerWeights(
        norm1=tensor(dim),
        qkv=matrix((heads + 2 * kv_heads) * head_dim, dim, bits),
        out=matrix(dim, heads * head_dim, bits),
        norm2=tensor(dim),
        gate_up=matrix(2 * hidden, dim, bits),
        down=matrix(dim, hidden, bits),
    )
    sizes = {"dim": dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "hidden_dim": hidden}
    return KernelSpec(
        file="model.onnx.data",
        dtype="float16",
        **sizes,
        vocab_size=32000,
        norm_eps=1e-5,
        embedding=matrix(32000, dim, 8 if bits < 16 else 16),
        norm=tensor(dim),
        cos=tensor(2048, head_dim // 2),
        sin=tensor(2048, head_dim // 2),
        layers=(layer,) * 16,
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_the_presets_steps_are_one_kernel(bits: int) -> None:
    billion, advanced = spec(bits), spec(bits, dim=1024, kv_heads=4, head_dim=128, hidden=4096)
    for given, parts in ((billion, 16), (advanced, 32)):
        plan = whole_step(given, 1, H100)
        assert plan is not None
        assert (plan.blocks, plan.parts) == (132, parts)
        assert plan.stages >= 2
        assert plan.shared <= H100.shared


def test_every_block_has_rows_of_what_all_blocks_wait_for() -> None:
    """Where there are few rows, there are fewer blocks than multiprocessors."""
    plan = whole_step(spec(dim=256, kv_heads=1, hidden=512), 1, H100)
    assert plan is not None
    assert plan.blocks == (4 + 2) * 64 // 8
    assert plan.parts <= plan.blocks


@pytest.mark.parametrize(
    ("given", "batch", "gpu"),
    [
        (spec(), 2, H100),
        (spec(16), 1, H100),
        (dataclasses.replace(spec(), dtype="bfloat16"), 1, H100),
        (dataclasses.replace(spec(), heads=64), 1, H100),
        (spec(), 1, H100._replace(capability=(8, 0))),
        (spec(), 1, H100._replace(shared=99 * 1024)),
        (spec(), 1, H100._replace(multiprocessors=4)),
        (spec(dim=2048 + 64), 1, H100),
        (spec(kv_heads=8, head_dim=96), 1, H100),
    ],
    ids=["rows", "16-bit", "bfloat16", "group", "older", "memory", "small", "columns", "heads"],
)
def test_elsewhere_kernels_are_separate(given: KernelSpec, batch: int, gpu: Device) -> None:
    assert whole_step(given, batch, gpu) is None


def test_every_macro_that_the_sources_read_is_given() -> None:
    """Words in capitals that the sources neither define nor have as a template's or a structure's own constant."""
    plan = whole_step(spec(), 1, H100)
    assert plan is not None
    given = definitions(spec(), 1, 132) | plan.definitions(16)
    code = re.sub(r'"[^"]*"', "", re.sub(r"//.*", "", kernel_source(whole=True)))
    words = set(re.findall(r"\b[A-Z][A-Z_]{2,}\b", code))
    own = set(re.findall(r"#define (\w+)", code)) | set(re.findall(r"\b([A-Z_]+) = ", code)) | {"TABLE", "BFLOAT16"}
    assert words - own <= given.keys()
    assert given.keys() <= words


def test_what_blocks_give_each_other_lies_on_bounds_of_16_bytes() -> None:
    for given in (spec(), spec(dim=256, kv_heads=1, hidden=1280)):
        plan = whole_step(given, 1, H100)
        assert plan is not None
        assert all(words % 4 == 0 for words in _exchanged(given, plan))


def test_the_sources_are_part_of_the_package() -> None:
    folder = Path(kernel_compiler.__file__).parent
    assert sorted(path.name for path in folder.glob("step_*.cu")) == sorted(SOURCES)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_compiler_too_old_for_it_leaves_separate_kernels(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = object.__new__(DecodeKernels)
    kernels.spec, kernels.stream, kernels._device = spec(), None, H100
    tried = []

    def compiled(source, macros, architecture):
        tried.append("GRID" in macros)
        if tried[-1]:
            raise CosmosRuntimeError("NVRTC cannot compile")
        return b"code"

    monkeypatch.setattr(decode_kernels, "compiled", compiled)
    monkeypatch.setattr(decode_kernels, "CudaModule", lambda stream, code: code)
    assert kernels._module(batch) == (b"code", None)
    assert tried == ([True, False] if batch == 1 else [False])


def test_a_compiler_that_fails_for_separate_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_):
        raise CosmosRuntimeError("NVRTC cannot compile")

    kernels = object.__new__(DecodeKernels)
    kernels.spec, kernels.stream, kernels._device = spec(), None, H100
    monkeypatch.setattr(decode_kernels, "compiled", fails)
    with pytest.raises(CosmosRuntimeError, match="NVRTC cannot compile"):
        kernels._module(1)
