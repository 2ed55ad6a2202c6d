"""Weight files of a checkpoint folder: safetensors (one file, or shards with an index) or a PyTorch pickle.

Opening a folder reads names, shapes and dtypes. A tensor is mapped when it is asked for, from a file that is opened for
it alone: its pages leave memory with the tensor, so a file larger than memory can be read from end to end.

The files are not trusted. A pickle is read with `weights_only=True` and in no other way; a safetensors header is
checked against its file; a shard lies in the checkpoint's folder; and what is read is made of finite numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosmos_export.errors import CheckpointError

SAFETENSORS, SAFETENSORS_INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"

# An index is names and shards: 100,000 tensors with long names are a fifth of this.
_LARGEST_INDEX = 64 << 20
# Values that are looked at together, so that the check needs no memory of a tensor's size.
_CHECKED_AT_ONCE = 1 << 22
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What weights may be. Numbers of 8 bits mean something only with a scale that is kept elsewhere.
FLOATING_POINT = tuple(_DTYPES.values())


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that has not been read: its shape, its dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    place: object = None
    """Where its bytes lie, if that is known: tensors of equal places are the same bytes, read in the same way."""

    def announce(self) -> None:
        """Tells the system that the tensor will be read soon, so that the disk may begin. That may take as long as the
        disk does: it is work for a thread of its own."""
        if isinstance(self.place, _Extent):
            self.place.announce()


@dataclass(frozen=True)
class _Extent:
    """Bytes of a file."""

    path: Path
    start: int
    length: int

    def announce(self) -> None:
        if not hasattr(os, "posix_fadvise"):  # not on this system
            return
        with contextlib.suppress(OSError):  # whoever reads it will say what is wrong with the file
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, self.start, self.length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by name, none of them read yet.

    Raises CheckpointError when there are none, or a file is unreadable, unsafe or leads out of the folder.
    """
    if (folder / SAFETENSORS).is_file():
        return _read_safetensors(folder / SAFETENSORS)
    if (folder / SAFETENSORS_INDEX).is_file():
        return _read_shards(folder)
    if (folder / PICKLE).is_file():
        return _read_pickle(folder / PICKLE)
    raise CheckpointError(f"{folder}: no weights; expected {SAFETENSORS}, {SAFETENSORS_INDEX} or {PICKLE}")


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    _refuse_links_outside(path)
    try:
        with safe_open(path, framework="pt") as file:
            places = _extents(path)
            return {name: _described(path, file, name, places[name]) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _extents(path: Path) -> dict[str, _Extent]:
    """Where the tensors of a safetensors file lie, by its header, which `safe_open` has found in order.

    https://github.com/huggingface/safetensors#format
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: _Extent(path, 8 + length + start, stop - start) for name, (start, stop) in spans.items()}


def _described(path: Path, file: Any, name: str, place: _Extent) -> StoredTensor:
    view = file.get_slice(name)
    dtype = _DTYPES.get(view.get_dtype(), torch.uint8)  # not of numbers for us: `require` names it
    return StoredTensor(tuple(view.get_shape()), dtype, partial(_mapped, path, name), place)


def _mapped(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, mapped by a handle of its own, which goes when the tensor goes."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {error}. Has the file changed?") from None
    return _finite(path, name, tensor)


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    path = folder / SAFETENSORS_INDEX
    weight_map = _weight_map(path)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:8])}")
    stored = {shard: _read_safetensors(folder / shard) for shard in shards}
    absent = [name for name, shard in weight_map.items() if name not in stored[shard]]
    if absent:
        raise CheckpointError(f"{folder}: {SAFETENSORS_INDEX} places {absent[0]!r} in a shard that does not hold it")
    return {name: stored[shard][name] for name, shard in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    """The shard of each tensor, by the index at `path`: a file name, never a path."""
    _refuse_links_outside(path)
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, expected at most {_LARGEST_INDEX:,}")
        weight_map = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors index with a weight_map: {error!r}") from None
    outside = [s for s in weight_map.values() if not isinstance(s, str) or Path(s).name != s or "\0" in s]
    if outside:
        raise CheckpointError(f"{path}: shards must be files of the same folder, got {outside[0]!r}")
    return weight_map


def _refuse_links_outside(path: Path) -> None:
    """Raises CheckpointError where `path` is a link to a file that is not in its folder: not what the folder's owner
    gave, but whatever lies at that place on this machine."""
    if path.resolve().parent != path.parent.resolve():
        raise CheckpointError(
            f"{path} is a link to {path.resolve()}, outside its folder. Weights are read from the checkpoint's own "
            f"folder: copy the file there (cp -L copies what links lead to)"
        )


def _read_pickle(path: Path) -> dict[str, StoredTensor]:
    _refuse_links_outside(path)
    state = _unpickled(path)
    return {
        name: StoredTensor(
            tuple(tensor.shape),
            tensor.dtype,
            partial(_mapped_pickle, path, name),
            (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()),
        )
        for name, tensor in state.items()
    }


def _mapped_pickle(path: Path, name: str) -> Tensor:
    """One tensor of a pickle, in a mapping of its own, which goes when the tensor goes."""
    tensor = _unpickled(path).get(name)
    if tensor is None:
        raise CheckpointError(f"{path} holds {name} no longer. Has the file changed?")
    return _finite(path, name, tensor.detach())


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        # weights_only without exception: a pickle is a program, and this flag is what keeps it from running.
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and was refused ({_first_line(error)}). Save a plain state dict: "
            f"torch.save(model.state_dict(), ...) or, better, safetensors"
        ) from None
    except Exception as error:  # damaged pickles fail in as many ways as they can be damaged
        raise CheckpointError(f"{path} cannot be read as a PyTorch state dict: {_first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(n, str) and _is_plain(t) for n, t in state.items()):
        raise CheckpointError(f"{path} is not a plain state dict: expected tensor names and tensors only")
    return state


def _is_plain(value: object) -> bool:
    """Whether `value` is a tensor with its numbers in it, one beside the other."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """`tensor`, all of whose values are numbers. Raises CheckpointError that counts those that are not."""
    if tensor.dtype not in FLOATING_POINT or not tensor.numel():
        return tensor
    parts = torch.atleast_1d(tensor).split(_rows_at_once(tensor))
    broken = sum(int((~part.isfinite()).sum()) for part in parts if not _sums_up(part))
    if broken:
        raise CheckpointError(
            f"{path}: {name} has {broken:,} of {tensor.numel():,} values that are NaN or infinite. A model with such "
            f"weights computes nothing: export an earlier checkpoint of the training"
        )
    return tensor


def _rows_at_once(tensor: Tensor) -> int:
    return max(1, _CHECKED_AT_ONCE * len(tensor) // tensor.numel()) if tensor.dim() else 1


def _sums_up(part: Tensor) -> bool:
    """Whether the sum is a number, and so every value: what is none stays in a sum. Large numbers may overflow it."""
    wide = torch.float32 if part.dtype == torch.float16 else None  # 16 bits of this kind overflow at 65,504
    return bool(part.sum(dtype=wide).isfinite())
