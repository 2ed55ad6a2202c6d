"""The GGUF that llama.cpp gets: rows in its order, every tensor there, the numbers of the configuration."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")

from benchmarks.gguf_export import deinterleave, gguf_tensors, interleave, write_gguf
from benchmarks.llama_names import tensor_names
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.loading import random_checkpoint

Array = npt.NDArray[np.float64]
HEADS, HEAD_DIM, DIM, LAYERS = 4, 16, 24, 3


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    config = CosmosAdvancedConfig(
        dim=DIM,
        n_layers=LAYERS,
        n_heads=HEADS,
        n_kv_heads=2,
        head_dim=HEAD_DIM,
        hidden_dim=40,
        vocab_size=50,
        max_sequence_length=64,
        rope_theta=12345.0,
    )
    return random_checkpoint(config, name="tiny")


@pytest.fixture
def rows() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((HEADS * HEAD_DIM, DIM)).astype(np.float32)


def angles(position: int) -> Array:
    return position / 10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def rotate_half(heads: Array, position: int) -> Array:
    """Channels (i, i + E/2) of heads (H, E) turned: the Cosmos form."""
    cos, sin = np.cos(angles(position)), np.sin(angles(position))
    first, second = heads[:, : HEAD_DIM // 2], heads[:, HEAD_DIM // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def rotate_interleaved(heads: Array, position: int) -> Array:
    """Channels (2i, 2i + 1) turned: llama.cpp's form for this architecture."""
    cos, sin = np.cos(angles(position)), np.sin(angles(position))
    even, odd = heads[:, ::2], heads[:, 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(heads.shape)


def test_interleaving_is_undone_by_its_inverse(rows: npt.NDArray[np.float32]) -> None:
    assert np.array_equal(deinterleave(interleave(rows, HEADS), HEADS), rows)


def test_interleaving_moves_rows_within_their_heads_only(rows: npt.NDArray[np.float32]) -> None:
    moved = interleave(rows, HEADS)
    assert np.array_equal(moved[0], rows[0])
    assert np.array_equal(moved[1], rows[HEAD_DIM // 2])
    assert np.array_equal(moved[HEAD_DIM + 2], rows[HEAD_DIM + 1])


@pytest.mark.parametrize("position", [0, 1, 37])
def test_interleaved_rotary_of_interleaved_rows_is_rotate_half(rows: npt.NDArray[np.float32], position: int) -> None:
    x = np.random.default_rng(1).standard_normal(DIM)
    ours = rotate_half((rows @ x).reshape(HEADS, HEAD_DIM), position)
    theirs = rotate_interleaved((interleave(rows, HEADS) @ x).reshape(HEADS, HEAD_DIM), position)
    assert np.allclose(deinterleave(theirs.reshape(-1, 1), HEADS).ravel(), ours.ravel(), atol=1e-12)


def test_scores_of_queries_and_keys_are_those_of_rotate_half() -> None:
    rng = np.random.default_rng(2)
    query, key = (rng.standard_normal((HEADS, HEAD_DIM)) for _ in range(2))
    ours = (rotate_half(query, 9) * rotate_half(key, 4)).sum(axis=1)
    query, key = (interleave(x.reshape(-1, 1), HEADS).reshape(HEADS, HEAD_DIM) for x in (query, key))
    theirs = (rotate_interleaved(query, 9) * rotate_interleaved(key, 4)).sum(axis=1)
    assert np.allclose(ours, theirs, atol=1e-12)


def test_every_checkpoint_tensor_has_a_name_and_none_has_two(checkpoint: Checkpoint) -> None:
    cosmos, gguf, hugging_face = (list(names) for names in zip(*tensor_names(LAYERS), strict=True))
    assert sorted(cosmos) == sorted(checkpoint.names)
    assert len(set(gguf)) == len(set(hugging_face)) == len(cosmos)


def test_only_query_and_key_rows_change(checkpoint: Checkpoint) -> None:
    exported = dict(gguf_tensors(checkpoint))
    for name, gguf_name, _ in tensor_names(LAYERS):
        tensor = checkpoint.tensor(name).numpy()
        assert exported[gguf_name].shape == tensor.shape
        moved = gguf_name.endswith(("attn_q.weight", "attn_k.weight"))
        assert np.array_equal(exported[gguf_name], tensor) is not moved


def test_queries_and_keys_go_back_to_the_checkpoint(checkpoint: Checkpoint) -> None:
    exported = dict(gguf_tensors(checkpoint))
    for part, heads in (("q", HEADS), ("k", 2)):
        original = checkpoint.tensor(f"layers.1.attention.{part}_proj.weight").numpy()
        assert np.array_equal(deinterleave(exported[f"blk.1.attn_{part}.weight"], heads), original)


def test_the_file_holds_every_tensor_and_the_geometry(checkpoint: Checkpoint, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(checkpoint, tmp_path / "f32.gguf")
    reader = gguf.GGUFReader(tmp_path / "f32.gguf")
    expected = dict(gguf_tensors(checkpoint))
    stored = {tensor.name: tensor.data.reshape(expected[tensor.name].shape) for tensor in reader.tensors}
    assert stored.keys() == expected.keys()
    assert all(np.array_equal(stored[name], expected[name]) for name in expected)
    settings = {
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": HEAD_DIM,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 12345.0,
        "llama.vocab_size": 50,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {name: reader.get_field(name).contents() for name in settings} == settings
