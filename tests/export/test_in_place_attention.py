"""Attention over a cache that is written where it lies: the same as over one that is passed on, and as no cache."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model import CosmosDecoder
from cosmos_export.onnx.programs import DecoderProgram

MakeConfig = Callable[..., CosmosAdvancedConfig]

GEOMETRIES = [
    pytest.param({}, id="grouped"),
    pytest.param({"n_kv_heads": 4}, id="as many key heads"),
    pytest.param({"n_kv_heads": 1, "head_dim": 6}, id="one key head, narrow"),
]
geometries = pytest.mark.parametrize("changes", GEOMETRIES)

# In float64: what is left is the order of sums.
CLOSE = {"rtol": 0, "atol": 1e-11}


@torch.no_grad()
def model_of(make_config: MakeConfig, **changes: Any) -> CosmosDecoder:
    """In float64, with weights so large that attention is not uniform."""
    torch.manual_seed(0)
    model = CosmosDecoder(make_config(**{"dim": 24, "hidden_dim": 40, **changes})).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter *= 12
    return model.requires_grad_(False)


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def cache_of(model: CosmosDecoder, batch: int, length: int, fill: float | None = None) -> list[Tensor]:
    """Places that hold no token yet have anything in them."""
    config, generator = model.config, torch.Generator().manual_seed(7)
    shape = (batch, config.n_kv_heads, length, config.head_dim)
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2 * config.n_layers)]
    return parts if fill is None else [torch.full_like(part, fill) for part in parts]


def mask_of(ends: Sequence[int]) -> Tensor:
    """(B, N): rows of these lengths, padded on the right."""
    return (torch.arange(max(ends)) < torch.tensor(ends)[:, None]).long()


def run(model: CosmosDecoder, attention: Any, ids: Tensor, ends: Sequence[int], offsets: Any, cache: Any) -> Any:
    """Logits, then the caches after the call."""
    logits, *after = DecoderProgram(model, attention=attention)((ids, mask_of(ends), torch.tensor(offsets), *cache))
    return logits, after


@geometries
@pytest.mark.parametrize("length", [12, 13, 40], ids=["L == N", "L == N + 1", "L > N"])
@pytest.mark.parametrize("new", [1, 4, 12])
def test_it_is_the_attention_that_passes_its_cache_on(
    make_config: MakeConfig, changes: dict[str, int], length: int, new: int
) -> None:
    """One row, `new` tokens that end at the twelfth."""
    model = model_of(make_config, **changes)
    ids, offsets = random_ids(1, new), list(range(new))
    logits, after = run(model, "in_place", ids, [12], offsets, cache := cache_of(model, 1, length))
    expected, expected_after = run(model, "standard", ids, [12], offsets, cache_of(model, 1, length))
    torch.testing.assert_close(logits, expected, **CLOSE)
    for mine, theirs, given in zip(after, expected_after, cache, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
        assert mine.data_ptr() == given.data_ptr(), "the very memory that was given"


@geometries
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 5), (3, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("length", [9, 30], ids=["L == N", "L > N"])
def test_pieces_of_a_sequence_give_the_logits_of_the_whole(
    make_config: MakeConfig, changes: dict[str, int], pieces: tuple[int, ...], length: int
) -> None:
    model, ids = model_of(make_config, **changes), random_ids(1, 9)
    cache, found, start = cache_of(model, 1, length), [], 0
    for piece in pieces:
        end = start + piece
        offsets = list(range(piece - 1, -1, -1))
        found.append(run(model, "in_place", ids[:, start:end], [end], offsets, cache)[0])
        start = end
    torch.testing.assert_close(torch.cat(found, 1).double(), model(ids), rtol=0, atol=1e-5)  # logits are float32


@geometries
def test_rows_of_unequal_lengths_are_those_alone(make_config: MakeConfig, changes: dict[str, int]) -> None:
    """A prefill with padding, then a token of each row at a time, which overwrites the padding."""
    model, prompts, steps = model_of(make_config, **changes), [5, 1, 7], 3
    ids = random_ids(3, 7 + steps, seed=2)
    cache = cache_of(model, 3, 12)
    prompt = torch.stack([torch.cat((row[:n], torch.full((7 - n,), 50))) for row, n in zip(ids, prompts, strict=True)])
    found = [run(model, "in_place", prompt, prompts, [0], cache)[0]]
    for step in range(steps):
        token = torch.stack([row[n + step] for row, n in zip(ids, prompts, strict=True)])[:, None]
        found.append(run(model, "in_place", token, [n + step + 1 for n in prompts], [0], cache)[0])
    logits = torch.cat(found, 1)  # (3, 1 + steps, V)
    for row, n in enumerate(prompts):
        alone = model(ids[row : row + 1, : n + steps])[0, n - 1 :]
        torch.testing.assert_close(logits[row].double(), alone, rtol=0, atol=1e-5)


def test_places_beyond_a_rows_tokens_are_neither_read_nor_written(make_config: MakeConfig) -> None:
    model = model_of(make_config)
    ids, before = random_ids(1, 3), cache_of(model, 1, 9, fill=0.0)
    clean, _ = run(model, "in_place", ids, [3], [0], before)
    poisoned = cache_of(model, 1, 9, fill=torch.nan)
    logits, _ = run(model, "in_place", ids, [3], [0], poisoned)
    assert torch.equal(logits, clean)
    for part in poisoned:
        assert bool(part[:, :, 3:].isnan().all())
        assert not bool(part[:, :, :3].isnan().any())


def test_what_was_there_before_stays_as_it_was(make_config: MakeConfig) -> None:
    model = model_of(make_config)
    cache = cache_of(model, 1, 9)
    before = [part.clone() for part in cache]
    run(model, "in_place", random_ids(1, 2), [6], [0], cache)
    for part, old in zip(cache, before, strict=True):
        assert torch.equal(part[:, :, :4], old[:, :, :4])
        assert torch.equal(part[:, :, 6:], old[:, :, 6:])
        assert not torch.equal(part[:, :, 4:6], old[:, :, 4:6])


def test_a_row_takes_its_place_in_a_larger_buffer(make_config: MakeConfig) -> None:
    """A cache may be a part of the memory of others."""
    model, ids = model_of(make_config), random_ids(1, 4)
    whole = cache_of(model, 3, 6)
    others = [part[[0, 2]].clone() for part in whole]
    logits, _ = run(model, "in_place", ids, [4], [0], [part[1:2] for part in whole])
    torch.testing.assert_close(logits[0, 0].double(), model(ids)[0, -1], rtol=0, atol=1e-5)
    assert all(torch.equal(part[[0, 2]], old) for part, old in zip(whole, others, strict=True))
