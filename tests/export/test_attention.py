"""Grouped-query attention against a naive loop; masks, blocks, precision and dropout."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError
from cosmos_export.model import CosmosDecoder
from cosmos_export.model.attention import FullSequenceAttention, grouped_query_attention
from cosmos_export.model.rope import RotaryTable

MakeConfig = Callable[..., CosmosAdvancedConfig]
HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 3), (8, 2), (4, 1), (1, 1), (4, 4)])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def naive(query: np.ndarray, key: np.ndarray, value: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Element by element; query head h reads key/value head h // G, which is repeat_interleave's order."""
    out = np.zeros(query.shape)
    batch, length, heads, width = query.shape
    for b, t, h in np.ndindex(batch, length, heads):
        kv = h // (heads // key.shape[2])
        scores = np.array([query[b, t, h] @ key[b, u, kv] for u in range(key.shape[1])]) / np.sqrt(width)
        if allowed is not None:
            scores[~allowed[t]] = -np.inf
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ value[b, :, kv]
    return out


@HEADS
@pytest.mark.parametrize(("length", "keys"), [(5, 5), (1, 7), (3, 4), (1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_naive_loop(heads: int, kv_heads: int, length: int, keys: int, masked: bool) -> None:
    query = random(2, length, heads, 6, seed=1)
    key, value = random(2, keys, kv_heads, 6, seed=2), random(2, keys, kv_heads, 6, seed=3)
    # Later queries see more keys; the last sees all.
    allowed = torch.arange(keys) <= torch.arange(keys - length, keys)[:, None] if masked else None
    result = grouped_query_attention(query, key, value, allowed)
    expected = naive(query.numpy(), key.numpy(), value.numpy(), None if allowed is None else allowed.numpy())
    assert result.shape == query.shape
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-14)


@torch.inference_mode()
def changed_positions(config: CosmosAdvancedConfig, causal: bool) -> list[bool]:
    """Which positions' logits differ after the token at position 3 of 6 is another one."""
    torch.manual_seed(0)
    model = CosmosDecoder(config, causal=causal).double().eval()
    ids = torch.arange(6)[None]
    other = ids.clone()
    other[0, 3] = 50
    return (model(ids) != model(other)).any(-1)[0].tolist()


def test_causal_attention_does_not_see_the_future(tiny_config: CosmosAdvancedConfig) -> None:
    assert changed_positions(tiny_config, causal=True) == [False] * 3 + [True] * 3


def test_bidirectional_attention_sees_both_ways(tiny_config: CosmosAdvancedConfig) -> None:
    assert changed_positions(tiny_config, causal=False) == [True] * 6


@HEADS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("limit", [1, 100, 250])
def test_blocks_of_queries_are_one_block(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, causal: bool, limit: int
) -> None:
    query, key, value = (random(2, 11, n * 8, seed=n) for n in (heads, kv_heads, kv_heads))
    attend = FullSequenceAttention(RotaryTable(8, 10000.0, 32).double(), 11, causal=causal)
    whole = attend(0, query, key, value)
    blocks: list[int] = []
    one = attend._attend
    monkeypatch.setattr("cosmos_export.model.attention._MAX_SCORES", limit)
    monkeypatch.setattr(attend, "_attend", lambda q, *rest: (blocks.append(q.shape[1]), one(q, *rest))[1])
    torch.testing.assert_close(attend(0, query, key, value), whole, rtol=0, atol=1e-14)
    assert sum(blocks) == 11
    assert all(rows == 1 or rows * 2 * heads * 11 <= limit for rows in blocks)


class _SoftmaxDtypes(TorchDispatchMode):
    """Records the dtype of what every softmax operator computes on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "softmax" in str(func):
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_softmax_is_at_least_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    query, key, value = (random(1, 3, n, 8).to(dtype) for n in (4, 2, 2))
    with _SoftmaxDtypes() as softmax:
        result = grouped_query_attention(query, key, value)
    assert softmax.seen == [wide]
    assert result.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_attends_to_its_own_rounding(dtype: torch.dtype) -> None:
    query, key, value = (random(1, 64, n, 16, seed=n).to(dtype) for n in (4, 2, 2))
    expected = grouped_query_attention(query.double(), key.double(), value.double())
    result = grouped_query_attention(query, key, value)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_large_half_products_do_not_overflow() -> None:
    """q.k is 128 * 32 * 32 = 131072 here, above float16's 65504; scaled by 1/sqrt(E) it is 11585 and fits."""
    query = torch.full((1, 2, 1, 128), 32.0, dtype=torch.float16)
    value = torch.ones(1, 2, 1, 128, dtype=torch.float16)
    assert torch.equal(grouped_query_attention(query, query.clone(), value), value)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dropout", "activation_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(make_config: MakeConfig, name: str) -> None:
    torch.manual_seed(0)
    off = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0)
    model = CosmosDecoder(make_config(**{**off, name: 0.5}))
    plain = CosmosDecoder(make_config(**off))
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(12)[None]
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), plain.eval()(ids))


@torch.inference_mode()
def test_ids_that_do_not_fit_are_refused(tiny_config: CosmosAdvancedConfig) -> None:
    model = CosmosDecoder(tiny_config).eval()
    assert model(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 64, 96)
    with pytest.raises(ConfigError, match=r"65 tokens.*max_sequence_length is 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"\(batch, sequence\), got shape \(5,\)"):
        model(torch.zeros(5, dtype=torch.int64))


def test_an_empty_sequence_is_refused(tiny_config: CosmosAdvancedConfig) -> None:
    with pytest.raises(ConfigError):
        CosmosDecoder(tiny_config).eval()(torch.zeros(1, 0, dtype=torch.int64))
