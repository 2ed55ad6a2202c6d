"""Query-head order: a "tile" checkpoint becomes the same model, and comes back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError
from cosmos_export.model.attention import GroupedQueryAttention, grouped_query_attention
from cosmos_export.model.head_layout import check_head_layout, tile_to_interleave

Q_PROJ, O_PROJ = "layers.0.attention.q_proj.weight", "layers.0.attention.o_proj.weight"
GEOMETRIES = pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 3), (4, 4), (4, 1), (12, 4)])


def geometry(heads: int, kv_heads: int, head_dim: int = 4, dim: int = 8) -> CosmosAdvancedConfig:
    return CosmosAdvancedConfig(n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, dim=dim)


def tile_attention(x: np.ndarray, weights: dict[str, np.ndarray], config: CosmosAdvancedConfig) -> np.ndarray:
    """One attention layer, x (T, D), as the published order has it: query head h reads key/value head h % K."""
    width = config.head_dim
    query, key, value = (x @ weights[name].T for name in "qkv")
    heads = []
    for h in range(config.n_heads):
        kv = h % config.n_kv_heads
        mine, theirs = slice(h * width, (h + 1) * width), slice(kv * width, (kv + 1) * width)
        scores = np.exp(query[:, mine] @ key[:, theirs].T / np.sqrt(width))
        heads.append(scores / scores.sum(-1, keepdims=True) @ value[:, theirs])
    return np.concatenate(heads, -1) @ weights["o"].T


@torch.no_grad()
@GEOMETRIES
def test_a_tile_checkpoint_is_the_same_model(heads: int, kv_heads: int) -> None:
    config, generator = geometry(heads, kv_heads), np.random.default_rng(heads)
    layer = GroupedQueryAttention(config, 0).double()
    weights = {n: generator.standard_normal(getattr(layer, f"{n}_proj").weight.shape) for n in "qkvo"}
    for n, weight in weights.items():
        name = f"layers.0.attention.{n}_proj.weight"
        getattr(layer, f"{n}_proj").weight.copy_(tile_to_interleave(name, torch.from_numpy(weight), config))
    x = generator.standard_normal((5, config.dim))

    def attend(_: int, *projected: torch.Tensor) -> torch.Tensor:
        return grouped_query_attention(*(p.unflatten(-1, (-1, config.head_dim)) for p in projected)).flatten(-2)

    result = layer(torch.from_numpy(x)[None], attend)
    np.testing.assert_allclose(result[0].numpy(), tile_attention(x, weights, config), rtol=1e-12, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_order_comes_back(group: int, kv_heads: int, pairs: int) -> None:
    """Undone by hand: (K, G) heads put back as (G, K)."""
    heads, width = group * kv_heads, 2 * pairs
    config = geometry(heads, kv_heads, width, dim=3)
    q = torch.arange(heads * width * 3).reshape(heads * width, 3)
    converted = tile_to_interleave(Q_PROJ, q, config)
    assert converted.shape == q.shape
    order = [(h % kv_heads) * group + h // kv_heads for h in range(heads)]  # where tile's head h now is
    assert torch.equal(converted.view(heads, width, 3)[order].reshape(q.shape), q)
    assert torch.equal(tile_to_interleave(O_PROJ, q.T.contiguous(), config), converted.T)


@GEOMETRIES
def test_orders_agree_only_without_groups_or_with_one(heads: int, kv_heads: int) -> None:
    q = torch.arange(heads * 4 * 8).reshape(heads * 4, 8)
    unchanged = torch.equal(tile_to_interleave(Q_PROJ, q, geometry(heads, kv_heads)), q)
    assert unchanged == (kv_heads in (1, heads))


def test_other_tensors_stay_as_they_are() -> None:
    tensor = torch.arange(64).reshape(8, 8)
    for name in ("attention.k_proj", "attention.v_proj", "feed_forward.w1"):
        assert torch.equal(tile_to_interleave(f"layers.0.{name}.weight", tensor, geometry(2, 1)), tensor)


def test_a_checkpoint_converts_as_it_reads(tiny_checkpoint: Checkpoint) -> None:
    tile = replace(tiny_checkpoint, head_layout="tile")
    for name in tiny_checkpoint.names:
        tensor = tiny_checkpoint.tensor(name)
        assert torch.equal(tile.tensor(name), tile_to_interleave(name, tensor, tile.config))
    assert not torch.equal(tile.tensor(Q_PROJ), tiny_checkpoint.tensor(Q_PROJ))
    assert not torch.equal(tile.tensor(O_PROJ), tiny_checkpoint.tensor(O_PROJ))


def test_an_unknown_layout_is_refused_with_the_two_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"interleave, tile, got 'repeat'"):
        check_head_layout("repeat")
    with pytest.raises(ConfigError, match="'repeat'"):
        Checkpoint.open(tmp_path, head_layout="repeat")
