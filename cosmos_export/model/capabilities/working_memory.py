"""Working memory (cosmos_reference, section 5): a bank of what earlier calls stored, explicit like a key/value cache.

    B  batch    D  dim    M  slots of the bank    k  entries that are read, at most 5

The bank is a ring: a row's call n (from 0) writes slot n mod M, so a full bank loses its oldest entry. With M =
`working_memory_size` that is the model; a caller that makes fewer calls may use as many slots as calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.errors import ConfigError
from cosmos_export.model.capabilities.layers import distribution, in_score_precision
from cosmos_runtime import quoted

ENTRIES_READ = 5
_MIN_NORM = 1e-8  # torch.nn.functional.cosine_similarity's
_EMPTY = -1e4  # below every cosine by so much that its softmax weight is exactly 0 in any precision


class MemoryState(NamedTuple):
    """The bank as tensors: keys (B, M, D) of unit length, values (B, M, D), calls (B,) int64, the calls so far.

    Slots that no call has written may hold any finite numbers; zeros, usually.
    """

    keys: Tensor
    values: Tensor
    calls: Tensor


@dataclass
class MemoryBank:
    """The working memory of a sequence of calls: pass it as `memory=` to each of them, and each updates it.

    Raises: ConfigError for a `state` that is none: tensors of other ranks, or that do not belong together.
    """

    state: MemoryState

    def __post_init__(self) -> None:
        _check_state(self.state)

    @classmethod
    def empty(cls, batch: int, capacity: int, dim: int, *, dtype: torch.dtype, device: torch.device) -> MemoryBank:
        """A bank of `capacity` slots that no call has seen. Raises: ConfigError where there is no room for it."""
        if batch < 1 or capacity < 0:
            raise ConfigError(f"memory: expected at least one row and no negative capacity, got {batch} and {capacity}")
        try:
            keys, values = (torch.zeros(batch, capacity, dim, dtype=dtype, device=device) for _ in range(2))
        except (RuntimeError, TypeError, OverflowError) as error:  # torch has no room, or takes no such number
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"memory: no room for {batch} rows of {capacity} entries of dim {dim}: {reason}; ask for fewer rows, "
                f"or give a capacity"
            ) from error
        return cls(MemoryState(keys, values, torch.zeros(batch, dtype=torch.int64, device=device)))

    @property
    def batch(self) -> int:
        """Rows, each with entries of its own."""
        return self.state.keys.shape[0]

    @property
    def capacity(self) -> int:
        """Entries that a row can hold."""
        return self.state.keys.shape[1]

    @property
    def calls(self) -> Tensor:
        """Calls of each row so far, (B,) int64."""
        return self.state.calls


def _check_state(state: MemoryState) -> None:
    """Shapes and types alone: what the tensors hold is not looked at, which would wait for their device."""
    if not isinstance(state, MemoryState):
        raise ConfigError(f"memory: expected a MemoryState, got {quoted(state)}; see new_memory")
    kinds = [type(part).__name__ for part in state]
    if not all(isinstance(part, Tensor) for part in state):
        raise ConfigError(f"memory: expected a MemoryState of three tensors, got {', '.join(kinds)}; see new_memory")
    keys, values, calls = state
    if keys.dim() != 3 or values.shape != keys.shape or calls.shape != keys.shape[:1]:
        raise ConfigError(
            f"memory: expected keys and values (B, M, D) and calls (B,), got shapes {tuple(keys.shape)}, "
            f"{tuple(values.shape)} and {tuple(calls.shape)}; see new_memory"
        )
    if values.dtype != keys.dtype or calls.dtype != torch.int64 or not keys.device == values.device == calls.device:
        raise ConfigError(
            f"memory: expected keys and values of one type, calls in int64, all on one device, got "
            f"{', '.join(f'{part.dtype} on {part.device}' for part in state)}; see new_memory"
        )


def entries_read(working_memory_size: int) -> int:
    """How many entries a call reads, at most; a bank needs as many slots, filled or not."""
    return min(ENTRIES_READ, working_memory_size)


class WorkingMemory(nn.Module):
    """Reads the entries most like the input, then stores the input."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.entries_read = entries_read(size)
        self.query_proj = nn.Linear(dim, dim)
        self.key_proj = nn.Linear(dim, dim)
        self.value_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """x (B, D) to what is remembered (B, D), zeros for a row without entries, and the bank with x in it."""
        if not self.entries_read:
            return torch.zeros_like(x), state._replace(calls=state.calls + 1)
        return self._read(x, state), self._store(x, state)

    def _read(self, x: Tensor, state: MemoryState) -> Tensor:
        slots = torch.arange(state.keys.shape[1], device=x.device)
        filled = slots < state.calls[:, None, None]  # (B, 1, M): all, once the ring has come round
        query = _unit(self.query_proj(x))
        similarity = (state.keys @ query[..., None]).transpose(1, 2)  # (B, 1, M)
        best = torch.where(filled, in_score_precision(similarity), _EMPTY).topk(self.entries_read, dim=-1)
        weights = distribution(best.values).to(x.dtype)  # (B, 1, k)
        places = best.indices.squeeze(1) + state.values.shape[1] * _rows(x)[:, None]  # in all rows' entries
        found = F.embedding(places, state.values.flatten(0, 1))  # (B, k, D)
        remembered = (weights @ found).squeeze(1)
        return torch.where(state.calls[:, None] > 0, remembered, 0.0)

    def along_rows(self, x: Tensor) -> Tensor:
        """What each call remembers (B, T, D), where x (B, T, D) are a row's calls one after another, from an empty
        bank that loses none of them."""
        if not self.entries_read:
            return torch.zeros_like(x)
        calls = torch.arange(x.shape[1], device=x.device)
        before = calls < calls[:, None]  # (T, T)
        similarity = in_score_precision(_unit(self.query_proj(x)) @ _unit(self.key_proj(x)).transpose(1, 2))
        read = min(self.entries_read, x.shape[1])
        best = torch.where(before, similarity, _EMPTY).topk(read, dim=-1)  # (B, T, k)
        weights = distribution(best.values).to(x.dtype)
        values = self.value_proj(x)
        chosen = torch.zeros_like(similarity, dtype=x.dtype).scatter(-1, best.indices, weights)  # (B, T, T)
        return torch.where(calls[:, None] > 0, chosen @ values, 0.0)

    def _store(self, x: Tensor, state: MemoryState) -> MemoryState:
        # A tensor: ONNX has no modulo by a dynamic axis.
        capacity = torch.full((), state.keys.shape[1], dtype=torch.int64, device=x.device)
        slots = (_rows(x), state.calls % capacity)  # one of each row
        keys = state.keys.index_put(slots, _unit(self.key_proj(x)))
        values = state.values.index_put(slots, self.value_proj(x))
        return MemoryState(keys, values, state.calls + 1)


def _rows(x: Tensor) -> Tensor:
    """The numbers of the rows of x (B, D): (B,)."""
    return torch.arange(x.shape[0], device=x.device)


def _unit(x: Tensor) -> Tensor:
    """(..., D) of length 1. The length is measured in at least float32, where the smallest one is not zero."""
    exact = in_score_precision(x)
    return (exact / torch.linalg.vector_norm(exact, dim=-1, keepdim=True).clamp_min(_MIN_NORM)).to(x.dtype)
