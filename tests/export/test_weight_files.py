"""Weight files that nobody vouches for: what is wrong with one is said before or while it is read, and nothing in it
runs; what is read is mapped for as long as it is used."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import CheckpointError
from cosmos_export.onnx.weights import require_weights
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.weight_files import stored_tensors

NORM, W2 = "norm.weight", "layers.0.feed_forward.w2.weight"

State = dict[str, Tensor]


def write_pickle(folder: Path, state: Any) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def write_safetensors(folder: Path, state: State) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_shards(folder: Path, state: State) -> Path:
    names = list(state)
    weight_map = {name: f"model-{1 + names.index(name) % 2}.safetensors" for name in names}
    for shard in sorted(set(weight_map.values())):
        save_file({name: state[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / weight_map.get(W2, "model-1.safetensors")


WRITERS = pytest.mark.parametrize("write", [write_pickle, write_safetensors, write_shards])


# Values


@WRITERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_no_number_is_counted_and_named(
    folder: Path, state: State, write: Callable[[Path, State], Path], value: float, dtype: torch.dtype
) -> None:
    broken = state[W2].to(dtype)
    broken[0, 1] = broken[-1, -1] = broken[5, 3] = value
    path = write(folder, {**state, W2: broken})
    checkpoint = Checkpoint.open(folder)  # nothing has been read yet
    message = rf"{W2} has 3 of {broken.numel():,} values that are NaN or infinite"
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.tensor(W2)
    assert path.name in str(caught.value)
    assert torch.equal(checkpoint.tensor(NORM), state[NORM])


def test_opposite_infinities_do_not_hide_each_other(folder: Path, state: State) -> None:
    state[W2][0, 0], state[W2][0, 1] = float("inf"), float("-inf")
    write_safetensors(folder, state)
    with pytest.raises(CheckpointError, match="has 2 of"):
        Checkpoint.open(folder).tensor(W2)


def test_large_numbers_are_numbers(folder: Path, state: State) -> None:
    """Though their sum is none."""
    state[W2][:] = torch.finfo(torch.float32).max
    write_safetensors(folder, state)
    assert torch.equal(Checkpoint.open(folder).tensor(W2), state[W2])


def test_a_single_number_and_none_at_all(folder: Path, state: State) -> None:
    write_safetensors(folder, {**state, "step": torch.tensor(3.0), "nothing": torch.empty(0, 4)})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensor("step") == 3
    assert checkpoint.tensor("nothing").shape == (0, 4)


@pytest.mark.parametrize("recipe", ["cpu-fp32", "portable-fp32"])
def test_an_export_of_broken_weights_leaves_nothing(folder: Path, state: State, recipe: str) -> None:
    state[W2][3, 3] = float("nan")
    write_safetensors(folder, state)
    with pytest.raises(CheckpointError, match=f"{W2} has 1 of"):
        export_bundle(Checkpoint.open(folder), folder.parent / "out", ExportRecipe.load(recipe), effort=Effort.OFF)
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


@WRITERS
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.int64, torch.complex64])
def test_what_is_not_of_floating_point_is_refused(
    folder: Path, state: State, write: Callable[[Path, State], Path], dtype: torch.dtype
) -> None:
    write(folder, {**state, W2: state[W2].to(dtype)})
    with pytest.raises(CheckpointError, match=rf"{W2} has dtype .*, expected a floating-point one"):
        require_weights(Checkpoint.open(folder))


@WRITERS
def test_an_eight_bit_float_is_refused(folder: Path, state: State, write: Callable[[Path, State], Path]) -> None:
    """It wants a scale from somewhere, which a checkpoint of this model does not have."""
    write(folder, {**state, W2: state[W2].to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=rf"{W2} has dtype"):
        require_weights(Checkpoint.open(folder))


# Headers of safetensors


def safetensors_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LIES = {
    "nothing": b"",
    "a length that the file has not": safetensors_of({}, length=1 << 40),
    "a length beyond all numbers": safetensors_of({}, length=(1 << 64) - 1),
    "no JSON": safetensors_of(b"{{{{"),
    "no object": safetensors_of([1, 2]),
    "a depth without end": safetensors_of(b'{"a":' * 20_000),
    "no text": safetensors_of(b'{"\xff": 1}'),
    "data that is not there": safetensors_of({NORM: entry([1 << 20], 0, 4 << 20)}),
    "offsets that go backwards": safetensors_of({NORM: entry([2], 8, 0)}, bytes(8)),
    "a shape that is larger than its bytes": safetensors_of({NORM: entry([1 << 40], 0, 8)}, bytes(8)),
    "a shape whose product overflows": safetensors_of({NORM: entry([1 << 32, 1 << 32, 4], 0, 8)}, bytes(8)),
    "a negative shape": safetensors_of({NORM: entry([-1, -2], 0, 8)}, bytes(8)),
    "tensors on one another": safetensors_of({NORM: entry([2], 0, 8), W2: entry([2], 4, 12)}, bytes(12)),
    "a hole between tensors": safetensors_of({NORM: entry([2], 0, 8), W2: entry([2], 16, 24)}, bytes(24)),
    "more data than tensors": safetensors_of({NORM: entry([2], 0, 8)}, bytes(64)),
    "a type that there is not": safetensors_of({NORM: entry([2], 0, 8, "F33")}, bytes(8)),
    "a tensor without a place": safetensors_of({NORM: {"dtype": "F32", "shape": [2]}}, bytes(8)),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "shard"])
def test_a_header_that_lies_is_refused_by_name(folder: Path, content: bytes, shard: bool) -> None:
    name = "model-1.safetensors" if shard else "model.safetensors"
    (folder / name).write_bytes(content)
    if shard:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Checkpoint.open(folder)


@WRITERS
def test_a_file_that_changes_after_it_was_opened(
    folder: Path, state: State, write: Callable[[Path, State], Path]
) -> None:
    path = write(folder, state)
    checkpoint = Checkpoint.open(folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")):
        checkpoint.tensor(W2)


@WRITERS
def test_a_tensor_that_is_no_longer_there(folder: Path, state: State, write: Callable[[Path, State], Path]) -> None:
    write(folder, state)
    checkpoint = Checkpoint.open(folder)
    write(folder, {f"other.{name}": tensor for name, tensor in state.items()})
    with pytest.raises(CheckpointError, match=W2):
        checkpoint.tensor(W2)


# Pickles


def test_pickles_are_read_in_one_way(folder: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of torch.load, and there is no second try after a refusal."""
    asked: list[Any] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: (asked.append(options), load(*args, **options))[1])
    write_pickle(folder, {**state, "x": _Runs(folder / "it-ran")})
    with pytest.raises(CheckpointError, match="was refused"):
        Checkpoint.open(folder)
    assert len(asked) == 1
    write_pickle(folder, state)
    Checkpoint.open(folder).tensor(W2)
    assert all(options["weights_only"] is True for options in asked)
    assert not (folder / "it-ran").exists()


def test_a_payload_beside_good_safetensors_is_not_even_looked_at(folder: Path, state: State) -> None:
    write_safetensors(folder, state)
    write_pickle(folder, _Runs(folder / "it-ran"))
    assert torch.equal(Checkpoint.open(folder).tensor(W2), state[W2])
    assert not (folder / "it-ran").exists()


class _Runs:
    """Unpickling it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize(
    "odd", [torch.eye(4).to_sparse(), torch.empty(4, device="meta"), [1.0], 3], ids=["sparse", "meta", "list", "number"]
)
def test_a_pickle_of_other_things_than_plain_tensors_is_refused(folder: Path, state: State, odd: Any) -> None:
    write_pickle(folder, {**state, "odd": odd})
    with pytest.raises(CheckpointError, match="not a plain state dict|cannot be read"):
        Checkpoint.open(folder)


def test_names_of_a_pickle_are_texts(folder: Path, state: State) -> None:
    write_pickle(folder, {**state, 5: torch.ones(1)})
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        Checkpoint.open(folder)


def test_views_of_one_storage_are_read_as_they_were(folder: Path) -> None:
    """Transposed, overlapping, with gaps: a pickle keeps strides."""
    base = torch.randn(8, 6)
    views = {"whole": base, "turned": base.T, "columns": base[:, ::2], "row": base[3]}
    write_pickle(folder, views)
    stored = stored_tensors(folder)
    for name, view in views.items():
        assert stored[name].shape == tuple(view.shape)
        assert torch.equal(stored[name].read(), view)


# Links and indexes


@WRITERS
def test_links_that_leave_the_folder_are_refused(
    folder: Path, state: State, write: Callable[[Path, State], Path]
) -> None:
    path = write(folder, state)
    elsewhere = folder.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=rf"{path.name.replace('.', '[.]')} is a link to .*elsewhere"):
        Checkpoint.open(folder)


@WRITERS
def test_links_within_the_folder_and_to_it_are_fine(
    folder: Path, state: State, write: Callable[[Path, State], Path]
) -> None:
    path = write(folder, state)
    path.rename(folder / "real")
    path.symlink_to("real")
    (folder.parent / "link").symlink_to(folder)
    assert torch.equal(Checkpoint.open(folder.parent / "link").tensor(W2), state[W2])


def test_an_index_that_is_a_link_is_refused(folder: Path, state: State) -> None:
    write_shards(folder, state)
    index = folder / "model.safetensors.index.json"
    index.rename(folder.parent / "index.json")
    index.symlink_to(folder.parent / "index.json")
    with pytest.raises(CheckpointError, match=r"index\.json is a link"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ['{"weight_map": ' + "[" * 100_000, "\xff\xfe", '{"weight_map": {"a": "b\\u0000"}}'])
def test_an_index_of_nonsense_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(folder)


def test_an_index_without_measure_is_not_read(folder: Path) -> None:
    with (folder / "model.safetensors.index.json").open("wb") as file:
        file.truncate(1 << 34)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match=r"17,179,869,184 bytes, expected at most"):
        Checkpoint.open(folder)


# Memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc/self/maps")
@WRITERS
def test_a_file_is_mapped_as_long_as_a_tensor_of_it_is_used(
    folder: Path, state: State, write: Callable[[Path, State], Path]
) -> None:
    path = write(folder, {**state, W2: torch.randn(1 << 10, 1 << 10)})
    checkpoint = Checkpoint.open(folder)
    assert not mappings(path)
    tensor = checkpoint.tensor(W2)
    assert mappings(path)
    rows = tensor[5:7]
    del tensor
    assert mappings(path)
    del rows
    assert not mappings(path)


def mappings(path: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path.resolve()))]
