"""Weight files of a checkpoint folder: safetensors (one file, or shards with an index) or a PyTorch pickle.

Opening one reads names and shapes; a tensor's bytes are mapped when it is asked for.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosmos_export.errors import CheckpointError

SAFETENSORS, SAFETENSORS_INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that has not been read: its shape, its dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by name, none of them read yet.

    Raises CheckpointError when there are none, or a file is unreadable or unsafe.
    """
    if (folder / SAFETENSORS).is_file():
        return _read_safetensors(folder / SAFETENSORS)
    if (folder / SAFETENSORS_INDEX).is_file():
        return _read_shards(folder)
    if (folder / PICKLE).is_file():
        return _read_pickle(folder / PICKLE)
    raise CheckpointError(f"{folder}: no weights; expected {SAFETENSORS}, {SAFETENSORS_INDEX} or {PICKLE}")


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        handle = safe_open(path, framework="pt")
        names = list(handle.keys())
        return {name: _slice(handle, name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _slice(handle: Any, name: str) -> StoredTensor:
    view = handle.get_slice(name)
    dtype = _SAFETENSORS_DTYPES.get(view.get_dtype(), torch.uint8)  # not of numbers for us: `require` names it
    return StoredTensor(tuple(view.get_shape()), dtype, lambda: handle.get_tensor(name))


_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    path = folder / SAFETENSORS_INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors index with a weight_map: {error!r}") from None
    outside = [s for s in shards if not isinstance(s, str) or Path(s).name != s]
    if outside:
        raise CheckpointError(f"{path}: shards must be files of the same folder, got {outside[0]!r}")
    missing = [s for s in shards if not (folder / s).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}")
    stored = {s: _read_safetensors(folder / s) for s in shards}
    absent = [n for n, s in weight_map.items() if n not in stored[s]]
    if absent:
        raise CheckpointError(f"{folder}: {SAFETENSORS_INDEX} places {absent[0]!r} in a shard that does not hold it")
    return {name: stored[shard][name] for name, shard in weight_map.items()}


def _read_pickle(path: Path) -> dict[str, StoredTensor]:
    try:
        # weights_only without exception: a pickle is a program, and this flag is what keeps it from running.
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors and was refused ({reason}). Save a plain state dict: "
            f"torch.save(model.state_dict(), ...) or, better, safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a PyTorch state dict: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path} is not a plain state dict: expected tensor names and tensors only")
    return {n: StoredTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in state.items()}  # type: ignore[misc]
