"""Which sampler graph chooses as a request wants, and what it is given for that.

    B  batch    L  cache length    V  vocabulary    C  candidates

A sampler chooses what `sampling.sample` chooses from the same logits and uniform numbers; only where equal logits lie
on both sides of the top k's border, ONNX Runtime's operator on CUDA may keep another of them. What no sampler can do is
left to the host: a top-k of more than C tokens, a nucleus of the whole vocabulary, stop ids that may not come early.
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
# Below this a temperature is as good as none, and its inverse would not be finite.
_COLDEST = 1e-30


def sampler_for(rows: Sequence[Continuation], specs: Mapping[str, GraphSpec], vocab_size: int) -> str | None:
    """The name of the sampler among `specs` that can choose for all rows; None where there is none."""
    if any(row.limits.min_new_tokens and row.limits.stop_ids for row in rows):
        return None
    if len(frozenset().union(*(row.limits.stop_ids for row in rows))) >= vocab_size:
        return None
    penalises = any(row.sampling.repetition_penalty != 1 for row in rows)
    for choice in ("greedy", "top_k", "any"):
        name = f"{SAMPLER}.{choice}{'.penalty' if penalises else ''}"
        if name in specs and all(_serves(choice, row.sampling, specs[name], vocab_size) for row in rows):
            return name
    return None


def most_candidates(specs: Mapping[str, GraphSpec]) -> int:
    """C: the largest top-k that one of the samplers `specs` chooses from; 0 where none does."""
    tensors = (tensor for spec in specs.values() for tensor in spec.inputs)
    return max((int(tensor.shape[1]) for tensor in tensors if tensor.role == Role.RANK_BIAS), default=0)


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
    wanted = {tensor.role for tensor in spec.inputs}
    if Role.PENALTY in wanted:
        values |= _penalties(rows, vocab_size)
    if Role.SHARPNESS in wanted:
        values |= _draws(rows, length)
    if Role.RANK_BIAS in wanted:
        values |= _cuts(rows, int(spec.input(Role.RANK_BIAS).shape[1]))
    return values


def _serves(choice: str, sampling: Sampling, spec: GraphSpec, vocab_size: int) -> bool:
    everything = not 0 < sampling.top_k < vocab_size
    if choice == "greedy":
        return sampling.is_greedy
    if choice == "any":
        return not sampling.is_greedy and everything and sampling.top_p == 1
    candidates = int(spec.input(Role.RANK_BIAS).shape[1])
    return sampling.is_greedy or candidates >= (vocab_size if everything else sampling.top_k)


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


def _cuts(rows: Sequence[Continuation], candidates: int) -> dict[Role, npt.NDArray[Any]]:
    """0 for the ranks that are kept and -inf for the others (B, C), and how far the nucleus reaches (B, 1)."""
    kept = [1 if row.sampling.is_greedy else row.sampling.top_k or candidates for row in rows]
    bias = np.where(np.arange(candidates) < np.array(kept)[:, None], 0.0, -np.inf)
    nucleus = [_NO_NUCLEUS if row.sampling.top_p == 1 else row.sampling.top_p for row in rows]
    return {Role.RANK_BIAS: bias, Role.TOP_P: np.array(nucleus)[:, None]}
