"""What the kernels compute that choose tokens and attend, without a GPU: on the host, a thread a fiber."""

import ctypes
import re

import numpy as np
import pytest

from cosmos_runtime import GraphSpec, Role, Sampling, TensorSpec
from cosmos_runtime.continuation import Continuation, Limits
from cosmos_runtime.device_sampling import parameters
from cosmos_runtime.sampling import keep_top_k, keep_top_p, sample, softmax
from cosmos_runtime.sampling_kernels import _FUNCTIONS, _ROLES, _SCRATCH, _Buffers, definitions

from .kernels_on_host import attention_library, needs_compiler, sampling_library

LENGTH, PROMPT, VOCAB = 16, 12, 40_000
CHOICES = {
    "greedy": Sampling(temperature=0, repetition_penalty=1.5),
    "top_k": Sampling(temperature=0.7, top_k=50, top_p=0.93, seed=4),
    "any": Sampling(temperature=1.1, repetition_penalty=1.2, seed=4),
    "nucleus": Sampling(temperature=0.9, top_p=0.87, seed=4),
    "nucleus, small": Sampling(temperature=0.2, top_p=0.3, seed=4),
    "nucleus, nearly all": Sampling(top_p=1 - 1e-6, repetition_penalty=1.2, seed=4),
    "nucleus, cold": Sampling(temperature=1e-9, top_p=0.9, seed=4),
    "nucleus, hot": Sampling(temperature=50, top_p=0.6, seed=4),
    "nucleus of a top k": Sampling(temperature=1.3, top_k=20_000, top_p=0.9, seed=4),
    "nucleus, top k alone": Sampling(top_k=1000, seed=4),
    "nucleus, greedy": Sampling.greedy(),
}


# What `parameters` asks a sampler's signature for.
SPEC = GraphSpec(
    file="sampler.onnx",
    opset=18,
    inputs=(
        TensorSpec("goes_on", Role.GOES_ON, "bool", (VOCAB,)),
        TensorSpec("penalty", Role.PENALTY, "float32", ("B", 1)),
        TensorSpec("sharpness", Role.SHARPNESS, "float64", ("B", 1)),
        TensorSpec("rank_bias", Role.RANK_BIAS, "float64", ("B", 64)),
        TensorSpec("top_p", Role.TOP_P, "float64", ("B", 1)),
        TensorSpec("top_k", Role.TOP_K, "int64", ("B", 1)),
        TensorSpec("earliest", Role.EARLIEST, "int32", ("B",)),
    ),
    outputs=(),
)


# A usual row, and rows that a search for the largest logits may stumble over: equal ones, and a thousand and more that
# reach every bound in few groups.
LOGITS = {
    "normal": lambda draw: np.round(draw.normal(0, 3, VOCAB) * 8) / 8,
    "two values": lambda draw: draw.random(VOCAB) < 0.5,
    "few groups": lambda draw: (np.arange(VOCAB) % 1024 < 90) * (1 + draw.random(VOCAB)),
}


@needs_compiler
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_kernel_chooses_as_the_function_does(choice: str, kind: str) -> None:
    """Two steps, of which the first may not choose a stop id, which every third token is."""
    draw, way = np.random.default_rng(3), CHOICES[choice]
    limits = Limits.checked(
        max_new_tokens=LENGTH - PROMPT,
        min_new_tokens=1,
        max_sequence_length=LENGTH,
        stop_ids=range(0, VOCAB, 3),
        vocab_size=VOCAB,
    )
    row = Continuation(draw.integers(0, VOCAB, PROMPT), limits, way)
    logits, by_hand = LOGITS[kind](draw).astype(np.float32), way.generator()
    arrays = arrays_of(row, logits)
    tokens: list[int] = []
    for _ in range(2):
        stop_ids = () if tokens else sorted(limits.stop_ids)
        tokens.append(sample(logits, [*row.prompt, *tokens], way, by_hand, stop_ids))
        assert next_token(choice, arrays) == tokens[-1]
        assert arrays[Role.CHOSEN_LOGIT].item() == logits[tokens[-1]]
    assert arrays[Role.HISTORY][0, PROMPT:].tolist() == [*tokens, 0, 0]
    assert arrays[Role.LAST_INDEX].item() == PROMPT + 1


@needs_compiler
@pytest.mark.parametrize("choice", ["top_k", "any", "nucleus"])
def test_the_smallest_number_draws_the_first_token_that_is_kept(choice: str) -> None:
    """Tokens before it have no share at all. As with a bundle of an earlier version: nothing is held back."""
    way, logits = CHOICES[choice], np.random.default_rng(4).normal(0, 3, VOCAB).astype(np.float32)
    logits[0] = -3000
    limits = Limits.checked(
        max_new_tokens=1, min_new_tokens=0, max_sequence_length=LENGTH, stop_ids=(), vocab_size=VOCAB
    )
    arrays = arrays_of(Continuation(np.array([5]), limits, way), logits)
    arrays[Role.UNIFORMS][:] = 0
    del arrays[Role.EARLIEST]
    kept = keep_top_p(keep_top_k(logits.astype(np.float64), way.top_k) / way.temperature, way.top_p)
    assert next_token(choice, arrays) == np.flatnonzero(softmax(kept))[0]


def arrays_of(row: Continuation, logits: np.ndarray) -> dict[Role, np.ndarray]:
    """All that the kernels read and write for a row with logits (V,)."""
    arrays = {role: np.ascontiguousarray(value) for role, value in parameters([row], SPEC, LENGTH).items()}
    return arrays | {Role.LOGITS: logits, Role.CHOSEN_LOGIT: np.zeros((1, 1), np.float32)}


def next_token(choice: str, arrays: dict[Role, np.ndarray]) -> int:
    """What the kernels choose; they leave their scratch as they found it."""
    between, done = np.zeros((1, _SCRATCH), np.int64), np.zeros(1, np.int32)
    places = [arrays[role].ctypes.data if role in arrays else 0 for role in _ROLES]
    at = _Buffers(*places, between.ctypes.data, done.ctypes.data, LENGTH)
    library = sampling_library(definitions(VOCAB, 64))
    for kernel in _FUNCTIONS[f"sampler.{re.split('[, ]', choice)[0]}"]:
        getattr(library, f"on_host_{kernel}")(32, ctypes.byref(at))
    assert done.item() == 0
    assert not between[0, 1024:].any()
    return int(arrays[Role.TOKENS].item())


def attended(qkv: np.ndarray, keys: np.ndarray, values: np.ndarray, last: np.ndarray, group: int) -> np.ndarray:
    """Attention (B, H, E) in float64 over the cache and the new token, without rotation."""
    batch, kv_heads, _, width = keys.shape
    heads = group * kv_heads
    new = qkv.reshape(batch, -1, width).astype(np.float16).astype(np.float64)
    out = np.zeros((batch, heads, width))
    for b, position in enumerate(last):
        for head in range(heads):
            own = head // group
            k = np.vstack([keys[b, own, :position], new[b, heads + own]]).astype(np.float64)
            v = np.vstack([values[b, own, :position], new[b, heads + kv_heads + own]]).astype(np.float64)
            scores = k @ new[b, head] * width**-0.5
            weights = np.exp(scores - scores.max())
            out[b, head] = weights @ v / weights.sum()
    return out


@needs_compiler
@pytest.mark.parametrize(("batch", "splits"), [(1, 32), (3, 2), (6, 22), (7, 18)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 64), (4, 1, 128)])
def test_attention_of_single_tokens(batch: int, splits: int, heads: int, kv_heads: int, width: int) -> None:
    """Rows of unequal length, from the first position on, over one part and several; the new keys and values come into
    the cache. Angles are zero: rotation is as in the whole step's tests."""
    draw, length = np.random.default_rng(5), 700
    last = np.array([699, 0, 255, 256, 1, 610, 301][:batch], np.int32)
    rows = heads + 2 * kv_heads
    qkv = draw.normal(0, 1, (batch, rows * width)).astype(np.float32)
    keys, values = (draw.normal(0, 1, (batch, kv_heads, length, width)).astype(np.float16) for _ in range(2))
    exact = attended(qkv, keys, values, last, heads // kv_heads)
    cos, sin = np.ones((length, width // 2), np.float16), np.zeros((length, width // 2), np.float16)
    parts = np.full((batch * kv_heads * splits * (heads // kv_heads), width + 4), np.nan, np.float32)
    done, out = np.zeros((batch, kv_heads), np.int32), np.full((batch, heads * width), np.nan, np.float16)
    macros = {
        "BATCH": batch,
        "DIM": 256,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": width,
        "HIDDEN": 512,
        "SCALE": f"{width**-0.5}f",
        "SPLITS": splits,
        "BITS": 16,
    }
    arrays = (keys, values, cos, sin, parts, done, out)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (qkv, last, *arrays)]
    attention_library(macros).on_host_attend(*pointers[:2], ctypes.c_int(length), *pointers[2:])
    assert np.abs(out.reshape(exact.shape) - exact).max() < 2e-3
    assert not done.any()
    new = qkv.reshape(batch, rows, width).astype(np.float16)
    for b, position in enumerate(last):
        assert np.array_equal(keys[b, :, position], new[b, heads : heads + kv_heads])
        assert np.array_equal(values[b, :, position], new[b, heads + kv_heads :])
