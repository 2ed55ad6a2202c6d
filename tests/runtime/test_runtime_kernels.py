"""What can be said of the decoding kernels without a GPU: their description, their macros, the cache of their code."""

import json
import re
from pathlib import Path

import pytest

from cosmos_runtime import (
    BundleError,
    CosmosRuntimeError,
    KernelSpec,
    LayerWeights,
    ProviderError,
    StoredMatrix,
    StoredTensor,
    kernel_compiler,
)
from cosmos_runtime.decode_kernels import definitions, shared_bytes, splits, tiles

SOURCE = Path(kernel_compiler.__file__).with_name("decode_kernels.cu").read_text(encoding="utf-8")


def tensor(name: str, *shape: int, dtype: str = "float16") -> StoredTensor:
    return StoredTensor(name, dtype, shape, offset=64)


def matrix(name: str, rows: int, columns: int, bits: int = 16) -> StoredMatrix:
    if bits == 16:
        return StoredMatrix(tensor(name, rows, columns), None, bits=16, block=0)
    values = tensor(f"{name}.blocks", rows, columns // 32, 4 * bits, dtype="uint8")
    return StoredMatrix(values, tensor(f"{name}.scales", rows, columns // 32), bits=bits, block=32)


def spec(bits: int = 16) -> KernelSpec:
    layer = LayerWeights(
        norm1=tensor("norm1", 256),
        qkv=matrix("qkv", 512, 256, bits),
        out=matrix("out", 256, 256, bits),
        norm2=tensor("norm2", 256),
        gate_up=matrix("gate_up", 1024, 256, bits),
        down=matrix("down", 256, 512, bits),
    )
    return KernelSpec(
        file="model.onnx.data",
        dtype="float16",
        dim=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        hidden_dim=512,
        vocab_size=320,
        norm_eps=1e-5,
        embedding=matrix("embedding", 320, 256, 8 if bits < 16 else 16),
        norm=tensor("norm", 256),
        cos=tensor("cos", 128, 32),
        sin=tensor("sin", 128, 32),
        layers=(layer, layer),
    )


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_description_is_read_as_it_was_written(bits: int) -> None:
    assert KernelSpec.from_json(spec(bits).to_json()) == spec(bits)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("version",), 2, "reads up to 1, got 2; upgrade"),
        (("dtype",), "float32", "dtype"),
        (("dim",), 0, "dim"),
        (("norm_eps",), "small", "norm_eps"),
        (("norm", "shape"), [0], "shape"),
        (("layers", 1, "down", "values", "offset"), -1, "offset"),
    ],
)
def test_a_description_that_is_wrong_names_the_key(path: tuple[str | int, ...], value: object, said: str) -> None:
    document = json.loads(spec().to_json())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(BundleError, match=said):
        KernelSpec.from_json(json.dumps(document))


@pytest.mark.parametrize("bits", [16, 4])
def test_every_macro_that_the_source_reads_is_given(bits: int) -> None:
    """Words in capitals that the source neither defines nor has as a template's or a structure's own constant."""
    given = definitions(spec(bits), 2, 132)
    code = re.sub(r"//.*", "", SOURCE)
    words = set(re.findall(r"\b[A-Z][A-Z_]{2,}\b", re.sub(r'"[^"]*"', "", code)))
    own = set(re.findall(r"#define (\w+)", code)) | set(re.findall(r"static constexpr int (\w+)", code))
    own |= set(re.findall(r"constexpr int (\w+)", code)) | {"TABLE", "BFLOAT16"}
    assert words - own <= given.keys()
    assert given.keys() <= words


def test_blocks_have_room_on_the_oldest_gpu() -> None:
    """An 8.0 device gives a block 163 KiB of shared memory; at most 8 rows of the 1 B preset's widest input."""
    for bits in (16, 8, 4):
        widest = matrix("down", 2048, 8192, bits)
        assert shared_bytes(8, 8192, widest, sets=1) <= 227 * 1024
        assert shared_bytes(1, 8192, widest, sets=1) <= 99 * 1024
    assert all(count in (1, 2) for count in tiles(spec(4)).values())


def test_parts_of_an_attention_are_on_the_device_together() -> None:
    """Two blocks a multiprocessor where there are several rows; at most 32 parts, and at least one."""
    for batch in range(2, 9):
        assert splits(spec(), batch, 132) * batch * spec().kv_heads <= 2 * 132
    assert splits(spec(), 1, 132) == 32
    assert splits(spec(), 8, 4) == 1


def test_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def compile_kernels(source: str, definitions: object, architecture: str) -> bytes:
        made.append(architecture)
        return b"\x7fELF" + source.encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_compiler, "compile_kernels", compile_kernels)
    for _ in range(2):
        assert kernel_compiler.compiled("code", {"A": 1}, "sm_90") == b"\x7fELFcode"
    kernel_compiler.compiled("code", {"A": 2}, "sm_90")
    kernel_compiler.compiled("code", {"A": 1}, "sm_80")
    assert made == ["sm_90", "sm_90", "sm_80"]
    for file in (tmp_path / "cosmos-runtime").iterdir():
        file.write_bytes(b"half a file")
    kernel_compiler.compiled("code", {"A": 1}, "sm_90")
    assert len(made) == 4


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cosmos-runtime").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_compiler, "compile_kernels", lambda *_: b"\x7fELF")
    assert kernel_compiler.compiled("code", {}, "sm_90") == b"\x7fELF"


def test_without_a_compiler_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_compiler, "_candidates", lambda: iter(["libno_such_compiler.so.0"]))
    with pytest.raises(ProviderError, match=r"NVRTC.*nvidia-cuda-nvrtc.*COSMOS_DECODE_KERNELS=0"):
        kernel_compiler.compile_kernels("", {}, "sm_90")


def test_a_compilers_words_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiler:
        """NVRTC's functions, failing to compile."""

        def __getattr__(self, name: str) -> object:
            return lambda *arguments: 6 if name == "nvrtcCompileProgram" else 0

        def nvrtcGetErrorString(self, status: int) -> bytes:  # noqa: N802
            return b"NVRTC_ERROR_COMPILATION"

        def nvrtcGetProgramLogSize(self, program: object, size: object) -> int:  # noqa: N802
            size._obj.value = 14  # type: ignore[attr-defined]
            return 0

        def nvrtcGetProgramLog(self, program: object, buffer: object) -> int:  # noqa: N802
            buffer.value = b"line 3: error"  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(kernel_compiler, "_compiler", Compiler)
    with pytest.raises(CosmosRuntimeError, match=r"sm_90: NVRTC_ERROR_COMPILATION: line 3: error"):
        kernel_compiler.compile_kernels("", {}, "sm_90")
