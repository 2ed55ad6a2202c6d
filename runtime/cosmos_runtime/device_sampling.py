"""Which sampler graph chooses as a request wants, and what it is given for that.

    B  batch    L  cache length    V  vocabulary    C  candidates

A sampler chooses what `sampling.sample` chooses from the same logits and uniform numbers; only where equal logits lie
on both sides of the top k's border, ONNX Runtime's operator on CUDA may keep another of them. A bundle of an earlier
version has fewer samplers: what none of them can do is left to the host.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos_runtime.continuation import Continuation
from cosmos_runtime.manifest import SAMPLER, GraphSpec, Role
from cosmos_runtime.sampling import Sampling

# For a row that draws from its top k without a nucleus: no running sum of probabilities reaches it.
_NO_NUCLEUS = 2.0
# A top-k that no vocabulary reaches.
_EVERY = 2**31
# Below this a temperature is as good as none, and its inverse would not be finite.
_COLDEST = 1e-30


def sampler_for(rows: Sequence[Continuation], specs: Mapping[str, GraphSpec], vocab_size: int) -> str | None:
    """The name of the sampler among `specs` that can choose for all rows; None where there is none."""
    if len(frozenset().union(*(row.limits.stop_ids for row in rows))) >= vocab_size:
        return None
    penalises = any(row.sampling.repetition_penalty != 1 for row in rows)
    holds = any(_held_until(row) for row in rows)
    for choice in ("greedy", "top_k", "any", "nucleus"):
        name = f"{SAMPLER}.{choice}{'.penalty' if penalises else ''}"
        if name not in specs or (holds and not specs[name].takes(Role.EARLIEST)):
            continue
        if all(_serves(choice, row.sampling, specs[name], vocab_size) for row in rows):
            return name
    return None


def parameters(rows: Sequence[Continuation], spec: GraphSpec, length: int) -> dict[Role, npt.NDArray[Any]]:
    """Everything that a request sets in the buffers of a sampler of `spec`, for rows of up to `length` tokens."""
    stop_ids = sorted(frozenset().union(*(row.limits.stop_ids for row in rows)))
    vocab_size = int(spec.input(Role.GOES_ON).shape[0])
    goes_on = np.ones(vocab_size, np.bool_)
    goes_on[stop_ids] = False
    values: dict[Role, npt.NDArray[Any]] = {
        Role.TOKENS: np.full((len(rows), 1), int(goes_on.argmax())),  # any that is not the end
        Role.LAST_INDEX: np.array([row.length - 1 for row in rows], np.int32),
        Role.LIMIT: np.array([row.capacity - 1 for row in rows], np.int32),
        Role.GOES_ON: goes_on,
        Role.HISTORY: np.zeros((len(rows), length), np.int64),
    }
    if spec.takes(Role.EARLIEST):
        values[Role.EARLIEST] = np.array([_held_until(row) for row in rows], np.int32)
    if spec.takes(Role.PENALTY):
        values |= _penalties(rows, vocab_size)
    if spec.takes(Role.SHARPNESS):
        values |= _draws(rows, length)
    if spec.takes(Role.TOP_P):
        nucleus = [_NO_NUCLEUS if row.sampling.top_p == 1 else row.sampling.top_p for row in rows]
        values[Role.TOP_P] = np.array(nucleus)[:, None]
    if spec.takes(Role.RANK_BIAS):
        candidates = int(spec.input(Role.RANK_BIAS).shape[1])
        kept = _kept_ranks(rows, candidates)
        values[Role.RANK_BIAS] = np.where(np.arange(candidates) < kept, 0.0, -np.inf)
    if spec.takes(Role.TOP_K):
        values[Role.TOP_K] = _kept_ranks(rows, _EVERY)
    return values


def _serves(choice: str, sampling: Sampling, spec: GraphSpec, vocab_size: int) -> bool:
    everything = not 0 < sampling.top_k < vocab_size
    if choice == "greedy":
        return sampling.is_greedy
    if choice == "any":
        return not sampling.is_greedy and everything and sampling.top_p == 1
    if choice == "nucleus":
        return True
    candidates = int(spec.input(Role.RANK_BIAS).shape[1])
    return sampling.is_greedy or candidates >= (vocab_size if everything else sampling.top_k)


def _held_until(row: Continuation) -> int:
    """The first position at which a stop id may end a row; 0 where any may."""
    limits = row.limits
    return row.length + limits.min_new_tokens if limits.min_new_tokens and limits.stop_ids else 0


def _penalties(rows: Sequence[Continuation], vocab_size: int) -> dict[Role, npt.NDArray[Any]]:
    penalty = np.array([[row.sampling.repetition_penalty] for row in rows], np.float32)
    seen = np.ones((len(rows), vocab_size), np.float32)
    for row, continuation in enumerate(rows):
        seen[row, continuation.prompt_ids] = penalty[row]
    return {Role.PENALTY: penalty, Role.SEEN: seen}


def _draws(rows: Sequence[Continuation], length: int) -> dict[Role, npt.NDArray[Any]]:
    """What divides logits, inverted; and a uniform number for each position that will be filled."""
    uniforms = np.zeros((len(rows), length))
    for row, continuation in enumerate(rows):
        uniforms[row, continuation.length : continuation.capacity] = continuation.uniforms()
    temperatures = [1.0 if row.sampling.is_greedy else max(row.sampling.temperature, _COLDEST) for row in rows]
    return {Role.SHARPNESS: 1 / np.array(temperatures)[:, None], Role.UNIFORMS: uniforms}


def _kept_ranks(rows: Sequence[Continuation], every: int) -> npt.NDArray[np.int64]:
    """How many of the likeliest tokens each row draws from (B, 1), `every` where it has no top-k."""
    return np.array([[1 if row.sampling.is_greedy else min(row.sampling.top_k or every, every)] for row in rows])
